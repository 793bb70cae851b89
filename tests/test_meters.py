"""What a row says, against counts by hand and against what was really trained."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cellray.model.attention import Compute
from cellray.model.encoder import Encoder, Tokens
from cellray.train import meters
from cellray.train.chain import chain
from cellray.train.feed import Feed
from cellray.train.fit import adamw, plan_of, step
from cellray.train.meters import Gauges, Meter, matmul_peak, operations, peak_memory, positions, repeated
from cellray.train.recipe import Optim
from tests import stores
from tests.test_stages import stage


def tokens_of(lengths):
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    total = int(offsets[-1])
    return Tokens(
        torch.arange(total) % 50, torch.ones(total), torch.zeros(total, dtype=torch.bool), offsets,
        torch.ones(len(lengths)),
    )  # fmt: skip


def counted(encoder, lengths):
    with operations() as counter:
        encoded = encoder(tokens_of(lengths))
        (encoded.summary.sum() + encoded.states.sum()).backward()
    return counter.get_total_flops()


def by_hand(lengths, width, layers):
    """Operations of an encoder: three products a linear layer, two if its input is data; 8 rows at least."""
    cells, tokens = max(8, len(lengths)), max(8, sum(lengths))
    places = len(lengths) + sum(lengths)
    layer = 3 * 2 * 12 * width**2 * places + 7 * 2 * width * sum((n + 1) ** 2 for n in lengths)
    value = 2 * 2 * width * tokens + 3 * 2 * width**2 * tokens
    depth = 2 * 2 * width * cells
    bag = 3 * 2 * (4 + 2 * 2 * 16 + 4) * width**2 * cells
    summary = 3 * 2 * width**2 * cells
    return layers * layer + value + depth + bag + summary


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("lengths", [[7] * 5, [30] * 2, [0] * 3 + [4], [3, 60, 9]])
def test_operations_are_those_counted_by_hand(lengths, layers):
    encoder = Encoder(50, 16, layers, 2, context=64)
    assert counted(encoder, lengths) == by_hand(lengths, 16, layers)


@pytest.mark.parametrize("lengths", [[7] * 5, [3, 60, 9]])
def test_what_is_computed_again_is_not_counted_as_use(lengths):
    encoder = Encoder(50, 16, 2, 2, context=64)
    encoder.compute = Compute(recompute=True, together=20)
    useful, computed, pairs = positions(tokens_of(lengths).offsets, 64, 20)
    assert useful == computed == sum(lengths) + len(lengths)
    assert counted(encoder, lengths) - repeated(encoder, computed, pairs) == by_hand(lengths, 16, 2)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=40), st.integers(1, 70), st.integers(1, 200))
def test_positions_are_those_the_layers_see(lengths, context, together):
    encoder, seen = Encoder(50, 8, 1, 1, context), []
    encoder.compute = Compute(together=together)
    encoder.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(len(args[0])))
    with torch.inference_mode():
        encoder(tokens_of(lengths))
    own = [min(n, context) + 1 for n in lengths]
    wanted = (sum(own), sum(seen), sum(n * n for n in own))
    assert positions(tokens_of(lengths).offsets, context, together) == wanted


def test_gathers_are_no_operations():
    bag = nn.EmbeddingBag(50, 8, mode="sum")
    with operations() as counter:
        bag(torch.arange(20), torch.tensor([0, 7]), per_sample_weights=torch.ones(20)).sum().backward()
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("name", ["unimodal-rna", "joint", "distil"])
def test_one_counted_step_stands_for_the_others(name, tmp_path):
    run = stores.run(tmp_path)
    work, root = stage(run, name)
    for module in work.trained():
        module.requires_grad_(True)
    parameters, optimizer = adamw(work.trained(), Optim())
    plan = plan_of(run.store, run.recipe, ~run.test, work.needs(), work.reads(), 2.0)
    ratios = []
    with Feed(run.store, plan, first=0, rank=0, world=1) as feed:
        for share in feed:
            with Gauges(root, Meter(), device="cpu", halved=False, first_worker=True) as gauges:
                with gauges.counted(share.tokens):
                    step(work, share, parameters, optimizer, 1.0)
                ratios.append(gauges._work)
    assert len(ratios) > 3
    assert ratios[0] == pytest.approx(np.mean(ratios), rel=0.1)


def test_counting_changes_no_number():
    lengths = [3, 9, 40, 41, 0]
    found = []
    for counting in (False, True):
        torch.manual_seed(0)
        encoder = Encoder(50, 16, 1, 2, context=64)
        if counting:
            counted(encoder, lengths)
        else:
            encoded = encoder(tokens_of(lengths))
            (encoded.summary.sum() + encoded.states.sum()).backward()
        found.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_peak_is_measured_once():
    peak = matmul_peak("cpu", torch.float32)
    assert 1e8 < peak < 1e16
    assert matmul_peak("cpu", torch.float32) == peak
    assert matmul_peak("cpu", torch.bfloat16) != peak


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory("cpu")
    held = np.ones(100 << 17)
    assert held.nbytes == 100 << 20
    assert peak_memory("cpu") >= before
    del held
    assert 20 << 20 < before < 64 << 30


def test_rows_are_means_over_the_steps_since_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(meters, "ROW_SECONDS", (0.0, 0.0))
    run = stores.run(tmp_path, track="", **{"unimodal.epochs": 0.5, "distil.epochs": 1.0})
    events: list = []
    chain(run, events.append)
    rows = [event for event in events if "losses" in event]
    done = {event["stage"]: event["finished"] for event in events if "finished" in event}
    for name, facts in done.items():
        own = [row for row in rows if row["stage"] == name]
        assert [row["step"] for row in own] == list(range(1, facts["steps"] + 1))
        assert own[-1]["cells"] == facts["cells"]
        cells = np.diff([0, *(row["cells"] for row in own)])
        speeds = np.array([row["cells_per_second"] for row in own])
        assert float((cells / speeds).sum()) == pytest.approx(own[-1]["seconds"], abs=2e-3)
        assert own[-1]["loss"] == own[-1]["losses"]["loss"]
        assert all(row["mfu"] > 0 and 0.5 < row["packing"] <= 1 for row in own)
        assert all(0 <= row["data_wait_share"] <= 1 for row in own)
        assert {f"loss/{part}" for part in own[0]["losses"]} >= {k for k in own[0] if "/" in k} != set()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_stretch_weighs_time_not_rows():
    meter = Meter()
    gauges = Gauges(nn.Linear(1, 1), meter, device="cpu", halved=False, first_worker=True)
    for seconds, cells, loss in ((1.0, 10, 3.0), (3.0, 10, 1.0)):
        meter.seconds, meter.cells = meter.seconds + seconds, meter.cells + cells
        gauges.add({"loss": loss, "part": loss / 2, "gradient_norm": float("inf")}, 0.1)
    row, _ = gauges.row("s", 2, 4)
    assert (row["cells_per_second"], row["loss"], row["loss/part"]) == (5.0, 2.0, 1.0)
    assert (row["gradient_norm"], row["mfu"], row["packing"]) == (None, None, 1.0)
    meter.seconds, meter.cells = meter.seconds + 1, meter.cells + 7
    gauges.add({"loss": 9.0, "part": 1.0, "gradient_norm": 1.0}, 0.1)
    row, _ = gauges.row("s", 3, 4)
    assert (row["cells_per_second"], row["loss"]) == (7.0, 9.0)


def test_rows_come_less_often_in_a_long_stage():
    gauges = Gauges(nn.Linear(1, 1), Meter(), device="cpu", halved=False, first_worker=True)

    def least(began):
        gauges._told, gauges._began = 0.0, -began
        return next(seconds for seconds in np.arange(0, 40, 0.25) if gauges.due(seconds))

    assert [least(began) for began in (0, 400, 5_000, 1e6)] == [0.5, 0.5, 5.25, 30.0]
