"""The bench of training measures what it says: steps that are held, tensors kept, networks of known cost."""

import json
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cellray.train import meters, stages
from cellray.train.chain import chain
from cellray.train.ending import Stopped
from cellray.train.meters import operations
from cellray.train.run import Run
from tests import stores
from tests.bench.drivers import training
from tests.bench.harness.report import Report
from tests.bench.training import costs, gpu
from tests.bench.training.gate import PAUSE, Gate, between, hold, undisturbed
from tests.bench.training.networks import Favor, Linear, Shape, cheapest, published
from tests.bench.training.stores import batch, stored


def test_the_published_network_costs_what_its_paper_says():
    with torch.device("meta"), operations() as counter:
        published(Shape())(torch.zeros(1, 16_906, dtype=torch.int64))
    assert counter.get_total_flops() == pytest.approx(307e9, rel=0.01)


def test_the_cheapest_network_costs_little_more_than_its_linear_layers():
    shape = Shape()
    with torch.device("meta"), operations() as counter:
        cheapest(shape)(torch.zeros(1, shape.genes, dtype=torch.int64))
    linear = 2 * shape.genes * shape.layers * 12 * shape.width**2
    assert linear < counter.get_total_flops() < 1.15 * linear


def test_random_features_estimate_softmax_attention():
    torch.manual_seed(0)
    q, k, v = (0.5 * torch.randn(1, 2, 12, 8) for _ in range(3))
    found = Favor(8, 20_000)(q, k, v)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v), atol=0.02, rtol=0)
    assert Linear()(q, k, v).shape == v.shape


def test_cells_of_the_comparison_have_the_genes_it_says():
    words, cells = batch(cells=3, genes=2_000, nonzero=180)
    assert cells.counts["rna"].lengths.tolist() == [180] * 3
    assert len(words.vocabularies["rna"]) == 2_000


def test_a_store_is_made_once_with_every_modality(tmp_path):
    path = stored(tmp_path, cells=256, peaks=500)
    before = (path / "store.json").stat().st_mtime_ns
    store = stores.Run(training.recipe(str(path), str(tmp_path / "run"), [])).store
    assert store.names == ["rna", "atac"]
    assert 1_300 < store.lengths("rna").mean() < 2_100
    assert store.lengths("atac").min() > 100
    assert stored(tmp_path, cells=256, peaks=500) == path
    assert (path / "store.json").stat().st_mtime_ns == before


def test_packing_is_counted_where_the_layers_are():
    assert costs.packed([63] * 4) == costs.packed([70] * 4, context=63) == 1.0
    mixed = costs.lengths(64, 0.5, 0)
    assert np.median(mixed) == pytest.approx(1_660, rel=0.2)


def test_logits_are_counted_where_they_are_made():
    words, cells = batch(cells=4, genes=2_000, nonzero=100)
    before = costs.FEATURES
    costs.FEATURES = 2_000
    try:
        heads, wanted, decoder, tokens = costs.computed(words, cells)
    finally:
        costs.FEATURES = before
    assert heads == wanted < tokens == 400
    assert decoder == 2_000


def test_a_held_training_makes_the_steps_it_is_let_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(meters, "ROW_SECONDS", (0.0, 0.0))
    run = stores.run(tmp_path, **{"unimodal.epochs": 50.0, "stages": "unimodal"})
    plain = vars(stages.Unimodal)["losses"]
    gate, stop = Gate(tmp_path / "pauses"), threading.Event()
    ended: list[str] = []

    def trained() -> None:
        try:
            chain(Run(run.recipe), lambda event: None, "cpu", stop)
        except Stopped:
            ended.append("stopped")

    hold(stages.Unimodal, gate, workers=2)
    try:
        thread = threading.Thread(target=trained)
        thread.start()
        steps = gate.deliveries()
        made = [next(steps) for _ in range(3)]
        assert all(cells > 2 and cells % 2 == 0 and tokens > cells for cells, tokens, _ in made)
        stop.wait(4 * PAUSE)
        next(steps)
        stop.set()
        gate.open()
        thread.join()
    finally:
        setattr(stages.Unimodal, "losses", plain)  # noqa: B010
    assert ended == ["stopped"]
    assert len((tmp_path / "pauses").read_text().split()) >= 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(undisturbed(tmp_path)) < len(rows)


def test_rows_with_a_pause_in_them_are_left_out():
    rows = [{"time": float(time)} for time in range(6)]
    assert [row["time"] for row in between(rows, [0.5, 3.0])] == [2.0, 4.0, 5.0]


def test_tensors_that_are_kept_are_those_that_would_be_made(tmp_path, monkeypatch):
    run = stores.run(tmp_path)
    monkeypatch.setattr(training, "RESIDENT", 2)
    losses = []
    for kept in (False, True):
        memory = training.Memory()
        made: list[dict[str, float]] = []
        with monkeypatch.context() as patch:
            for name in training.MADE:
                patch.setattr(stages, name, vars(stages)[name])
            if kept:
                training.remember(memory)
            plain = stages.Unimodal.losses

            def watched(stage, batch, step, made=made, plain=plain):
                found = plain(stage, batch, step)
                made.append({name: float(loss.sum.detach()) for name, loss in found.items()})
                return found

            patch.setattr(stages.Unimodal, "losses", watched)
            steps = training.bare(run, memory)
            for _ in range(6):
                next(steps)
        losses.append(made)
    assert losses[0] == losses[1]
    assert memory.made == 2 * 3  # tokens, what is asked of the decoder, its targets


def test_rows_of_a_gpu_are_there_without_one_and_are_measured_on_any_device(tmp_path):
    said: list[str] = []
    report = Report(tmp_path / "train.json", said.append)
    small = gpu.Size(width=16, layers=1, heads=2, context=32, genes=300, cells=4, nonzero=40)
    gpu.measure(report, "cpu", small, 1, 1, compiled=False)
    assert {row.what for row in report.rows} < set(gpu.WHATS)
    assert len(report.rows) == 3
    if not torch.cuda.is_available():
        next(rows := gpu.rows(report, 1, 1))
        assert next(rows, None) is None
        assert [row.what for row in report.rows[3:]] == list(gpu.WHATS)
        assert all(row.met is None for row in report.rows[3:])
