"""The benches measure what they say: shuffle quality, rounds, rows, and material made alike twice."""

import argparse
import json
import os

import numpy as np
import pyarrow as pa
import pytest

from cellray.data.modalities import RNA
from cellray.data.tokens import POOLED, Counts, Tokenizer, Vocabulary
from tests.bench.datalayer.quality import quality
from tests.bench.datalayer.synthetic import BLOCK, Cells, Peaks, cell_names, source_rows
from tests.bench.datalayer.writing import cut
from tests.bench.drivers import encodings
from tests.bench.drivers.packing import portion
from tests.bench.harness.report import Report, Row, ratio
from tests.bench.harness.rounds import Driver, in_turns, started
from tests.bench.harness.sections import Size, about, measure, sized

SMALL = Cells(cells=1_000, genes=2_000, nonzero=150.0, labels=4)


def label(rows):
    return rows * 8 // 8_192


def test_uniform_batches_have_the_best_quality_and_neighbours_the_worst():
    order = np.random.default_rng(1).permutation(8_192)
    uniform = quality(np.split(order, 32), cells=8_192, label=label)
    assert uniform.share == pytest.approx(1, abs=0.03)
    sorted_ = quality(np.split(np.arange(8_192), 32), cells=8_192, label=label)
    assert sorted_.share < 0.1


def test_blocks_of_neighbours_are_found_out():
    blocks = np.random.default_rng(1).permutation(512)
    rows = (blocks[:, None] * 16 + np.arange(16)).ravel()
    assert quality(np.split(rows, 32), cells=8_192, label=label).share < 0.5


def test_synthetic_cells_are_sparse_skewed_and_the_same_every_time():
    matrix = SMALL.block(1)
    assert (matrix != Cells(cells=1_000, genes=2_000, nonzero=150.0, labels=4).block(1)).nnz == 0
    lengths = np.concatenate([np.diff(block.indptr) for block in SMALL.blocks(0, SMALL.cells)])
    assert len(lengths) == SMALL.cells
    assert lengths.mean() == pytest.approx(150, rel=0.15)
    per_gene = np.sort(np.asarray(matrix.sum(0)).ravel())[::-1]
    assert per_gene[:20].sum() > 0.1 * per_gene.sum()
    assert matrix.has_sorted_indices
    assert matrix.data.min() >= 1


def test_every_gene_is_in_some_cell_and_every_label_is_one_run():
    total = np.sum([np.asarray(block.sum(0)).ravel() for block in SMALL.blocks(0, SMALL.cells)], axis=0)
    assert total.min() > 0
    labels = SMALL.label(np.arange(SMALL.cells))
    assert (np.diff(labels) >= 0).all()
    assert set(labels) == {0, 1, 2, 3}


def test_more_peaks_leave_the_tokens_of_a_cell_as_they_are():
    few, many = (Peaks(cells=BLOCK, peaks=peaks, drawn=300) for peaks in (120_000, 1_200_000))
    for one, other in zip(few.blocks(0, BLOCK), many.blocks(0, BLOCK), strict=True):
        np.testing.assert_array_equal(np.diff(one.indptr), np.diff(other.indptr))
        np.testing.assert_array_equal(one.data, other.data)
        assert other.indices.max() > 1_000_000


def test_our_encodings_and_the_lean_loops_agree():
    matrix = SMALL.block(0)
    genes = SMALL.genes
    sums = np.asarray(matrix.sum(0)).ravel().astype(np.int64)
    nonzero = matrix.getnnz(axis=0).astype(np.int64)
    words = tuple(f"ENSG{i:011d}" for i in range(genes))
    facts = ({POOLED: sums}, {POOLED: nonzero}, {POOLED: matrix.shape[0]})
    tokenizer = Tokenizer({"rna": Vocabulary(RNA, words, ("",) * genes, *facts)})
    total = np.asarray(matrix.sum(1)).ravel()
    counts = Counts(matrix.indptr.astype(np.int64), matrix.indices, matrix.data.astype(np.uint16), total)
    ranked = encodings.rank(tokenizer, matrix, counts)
    assert isinstance(ranked, Counts)
    np.testing.assert_array_equal(ranked.ids, np.concatenate(encodings.rank_lean(tokenizer, matrix, counts)))
    bound = encodings.Packed()
    for _ in range(2):
        np.testing.assert_array_equal(ranked.ids, bound(tokenizer, matrix, counts) & np.uint64(0xFFFFFFFF))
    binned = np.concatenate(encodings.bins_lean(tokenizer, matrix, counts))
    np.testing.assert_array_equal(encodings.bins(tokenizer, matrix, counts), binned)
    dense = encodings.bins_loop(tokenizer, matrix, counts)
    assert (dense[matrix.nonzero()] <= binned).all()


def test_source_rows_are_found_back_from_cell_ids():
    rows = np.array([0, 7, 123_456])
    np.testing.assert_array_equal(source_rows([f"part0:{name}" for name in cell_names(rows)]), rows)


def test_rows_are_written_with_their_verdict(tmp_path):
    said: list[str] = []
    report = Report(tmp_path / "out" / "data.json", said.append)
    report.add(Row(what="a", value=2.0, unit="times", goal=1.5, baseline="b"))
    report.add(Row(what="memory", value=800.0, unit="MB", goal=700.0, at_most=True))
    report.add(Row(what="absent", value=None, unit="times", goal=1.0, note="left out"))
    written = json.loads(report.path.read_text())
    assert [row["met"] for row in written["rows"]] == [True, False, None]
    assert {"what", "value", "unit", "goal", "met", "baseline", "note"} == set(written["rows"][0])
    assert written["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert "MISSED" in said[2]
    assert "quick" not in written


def test_a_quick_report_says_so(tmp_path):
    said: list[str] = []
    report = Report(tmp_path / "data.json", said.append, quick="few cells")
    report.add(Row(what="a", value=2.0, unit="times"))
    assert json.loads(report.path.read_text())["quick"] == "few cells"
    assert "quick: few cells" in said[1]


def test_a_ratio_is_of_the_same_round():
    assert ratio([2.0, 20.0, 8.0], [1.0, 10.0, 1.0])[0] == 2.0


@pytest.fixture
def driver():
    own = Driver("burning", "tests.bench.drivers.burning")
    with started([own]):
        yield own


def test_sections_start_their_drivers_together_and_are_measured_one_after_another():
    seen = []

    def section(name):
        own = Driver(name, "tests.bench.drivers.burning")
        yield [own]
        seen.append((name, own.ask("round 0.05")["batches"]))

    measure({"one": lambda: section("one"), "other": lambda: section("other")})
    assert [name for name, batches in seen if batches] == ["one", "other"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (4_096, 3, 2.0)),
        (["--quick"], (1_024, 2, 0.5)),
        (["--quick", "--cells", "2048", "--seconds", "1"], (2_048, 2, 1.0)),
    ],
)
def test_a_bench_measures_as_much_as_it_is_told_to(words, expected, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", *words])
    found = sized(argparse.ArgumentParser(), Size(4_096, 3, 2.0), Size(1_024, 2, 0.5), cells="cells")
    assert (found.cells, found.rounds, found.seconds) == expected
    assert bool(about(found)) == found.quick


def test_a_bench_on_less_than_a_batch_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "--cells", "1000"])
    with pytest.raises(SystemExit):
        sized(argparse.ArgumentParser(), Size(4_096, 3, 2.0), Size(1_024, 2, 0.5), cells="cells")
    assert "--cells must be at least 1,024" in capsys.readouterr().err


def test_a_round_counts_the_time_of_threads_and_ends_at_a_whole_window(driver):
    found = in_turns([driver], rounds=2, seconds=0.1)
    assert driver.about == "a test"
    for measured in driver.rounds:
        assert measured.batches % 4 == 0
        assert measured.cells == 10 * measured.batches
        assert measured.tokens == 70 * measured.batches
        assert 0.01 <= measured.cpu / measured.batches < 0.03
    assert 5 < found["burning"]["peak"] < 200


def test_a_driver_tells_where_its_cells_come_from(driver):
    assert driver.ask("quality 2")["origins"] == [[1, 2], [2, 3]]
    found = driver.ask("round 0 85")
    assert found["cells"] >= 85


def test_drivers_started_together_are_measured_on_one_core_and_one_may_be_absent():
    drivers = [Driver(name, "tests.bench.drivers.burning") for name in ("one", "other")]
    absent = Driver("absent", "tests.bench.drivers.absent", optional=True)
    with started([absent, *drivers]):
        assert "ended with status 1" in absent.failed
        for driver in drivers:
            assert driver.process
            assert os.sched_getaffinity(driver.process.pid) == {max(os.sched_getaffinity(0))}
            assert driver.ask("round 0")["cells"] == 0
    assert all(driver.process and driver.process.returncode == 0 for driver in drivers)


def test_a_portion_packs_as_many_cells_as_are_decoded():
    batches = [pa.record_batch({"cell": list(range(first, first + 4))}) for first in (0, 4)]
    for cells in (1, 4, 7, 8, 19):
        rows = [row for batch in portion(batches, cells) for row in batch["cell"].to_pylist()]
        assert rows == [row % 8 for row in range(cells)]


def test_an_ingest_is_cut_into_eight_parts_or_more_and_never_more_coarsely_than_by_default(tmp_path):
    (tmp_path / "a.arrow").write_bytes(bytes(80_000))
    assert cut(tmp_path, 4_000) == {"unit_cells": 500, "shard_bytes": 9_000}
    assert cut(tmp_path, 1_000_000)["unit_cells"] == 4_096


def test_a_driver_that_fails_is_told_of():
    broken = Driver("broken", "tests.bench.drivers.absent")
    with pytest.raises(RuntimeError, match="ended with status 1"), broken:
        pass
