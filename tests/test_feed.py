import threading

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data.copying import copy_pieces, widen_pieces
from cellray.data.shards import joined, parted
from cellray.data.store import Store
from cellray.data.tokens import Counts
from cellray.train import window
from cellray.train.feed import Feed, Plan, mix, uniform
from cellray.train.sampling import balanced, quality
from cellray.train.window import Room
from tests import stores


def plan(**changes):
    rng = np.random.default_rng(0)
    sizes = [100, 100, 37, 100, 64]
    cells = sum(sizes)
    wanted = {
        "starts": np.concatenate([[0], np.cumsum(sizes)]),
        "lengths": rng.integers(1, 60, cells),
        "eligible": rng.random(cells) < 0.8,
        "seed": 5,
        "epochs": 2.0,
        "tokens": 900,
        "cells": 40,
        "window": 2,
    }
    return Plan(**{**wanted, **changes})


def parts(found):
    return [found.rows(step) for step in range(found.steps)]


def test_every_eligible_cell_comes_once_an_epoch():
    one = plan(epochs=1.0)
    rows = np.concatenate([one.rows(step) for step in range(one.steps)])
    assert np.array_equal(np.sort(rows), np.flatnonzero(one.eligible))


def test_epochs_differ_and_the_same_plan_repeats():
    first, again, other = plan(), plan(), plan(seed=6)
    whole = [np.concatenate(list(p.epoch(e))) for p in (first, again, other) for e in (0, 1)]
    assert np.array_equal(whole[0], whole[2])
    assert not np.array_equal(whole[0], whole[1])
    assert not np.array_equal(whole[0], whole[4])


def test_budgets_hold_and_batches_are_of_like_size():
    found = plan()
    loads = []
    for rows in parts(found):
        assert len(rows) <= found.cells
        # A batch ends with the cell that reaches the budget.
        assert found.lengths[rows].sum() <= found.tokens + found.lengths.max()
        loads.append(max(len(rows) / found.cells, found.lengths[rows].sum() / found.tokens))
    assert min(loads) > 0.5
    assert np.mean(loads) > 0.75


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 40),
    st.integers(1, 2000),
    st.integers(1, 5),
    st.integers(0, 9),
)
def test_any_plan_has_every_cell_once_and_no_empty_step(sizes, cells, tokens, window, seed):
    rng = np.random.default_rng(seed)
    count = sum(sizes)
    eligible = rng.random(count) < rng.random()
    eligible[rng.integers(count)] = True
    lengths = rng.choice([0, 1, 7, 900], count)
    found = plan(
        starts=np.cumsum([0, *sizes]),
        lengths=lengths,
        eligible=eligible,
        cells=cells,
        tokens=tokens,
        window=window,
        epochs=2.0,
        seed=seed,
    )
    steps = parts(found)
    assert all(0 < len(rows) <= cells + 1 for rows in steps)
    assert all(lengths[rows][:-1].sum() <= tokens for rows in steps)
    assert np.array_equal(np.sort(np.concatenate(steps)), np.repeat(np.flatnonzero(eligible), 2))
    assert [len(list(found.epoch(0))), len(list(found.epoch(1)))] == np.diff(found._firsts).tolist()


def test_steps_are_found_in_any_order():
    found, again = plan(epochs=3.0), plan(epochs=3.0)
    steps = parts(found)
    for step in np.random.default_rng(0).permutation(found.steps).tolist():
        assert np.array_equal(again.rows(step), steps[step])
    with pytest.raises(IndexError, match=f"a plan with {found.steps} steps"):
        found.rows(found.steps)


def test_a_budget_without_end_is_no_limit():
    free = plan(tokens=1 << 62)
    assert np.array_equal(np.concatenate(parts(free)), np.concatenate(parts(plan(tokens=1 << 20))))
    assert {len(rows) for rows in free.epoch(0)} <= set(range(30, 41))


def test_a_window_holds_some_batches_where_few_cells_are_eligible():
    rare = np.random.default_rng(1).random(401) < 0.1
    found = plan(eligible=rare, cells=10, window=1)
    assert found.window > 1
    assert min(len(rows) for rows in found.epoch(0)) >= 5


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_global_batch_is_the_same_for_any_number_of_workers(world):
    found = plan()
    for step in range(found.steps):
        shares = [found.share(step, rank, world) for rank in range(world)]
        assert np.array_equal(np.sort(np.concatenate(shares)), np.sort(found.rows(step)))
        loads = [found.lengths[share].sum() for share in shares]
        assert max(loads) - min(loads) <= found.lengths.max()


def test_half_an_epoch_is_half_the_cells():
    assert sum(len(rows) for rows in parts(plan(epochs=0.5))) == pytest.approx(
        plan().eligible.sum() / 2, abs=40
    )


def test_nothing_to_train_on_is_said():
    with pytest.raises(ValueError, match="no cell is left"):
        plan(eligible=np.zeros(401, bool))


def test_too_many_workers_for_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"raise feed\.cells"):
        plan(cells=2).share(0, 0, 9)


def test_the_feed_gives_the_cells_of_the_plan_from_any_step(tmp_path):
    run = stores.run(tmp_path)
    cells = len(run.store)
    found = Plan(
        starts=run.store.starts,
        lengths=np.ones(cells, np.int64),
        eligible=np.ones(cells, bool),
        seed=1,
        epochs=2.0,
        tokens=1000,
        cells=48,
        window=1,
    )
    with Feed(run.store, found, first=3, rank=1, world=2) as feed:
        shares = list(feed)
    assert [share.step for share in shares] == list(range(3, found.steps))
    for share in shares:
        rows = found.share(share.step, 1, 2)
        assert np.array_equal(share.batch.rows, rows)
        direct = run.store.read(rows)
        for name, counts in share.batch.counts.items():
            assert np.array_equal(counts.ids, direct.counts[name].ids)
            assert np.array_equal(counts.offsets, direct.counts[name].offsets)
        assert share.cells == len(found.rows(share.step))


def test_an_error_while_reading_reaches_the_consumer(tmp_path):
    run = stores.run(tmp_path)
    shard = next((tmp_path / "store" / "shards").iterdir())
    whole = shard.read_bytes()
    shard.write_bytes(whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:])
    every = np.ones(len(run.store), bool)
    found = Plan(
        starts=run.store.starts,
        lengths=every.astype(np.int64),
        eligible=every,
        seed=1,
        epochs=1.0,
        tokens=1000,
        cells=400,
        window=9,
    )
    with (
        pytest.raises(ValueError, match=r"sha256 .* the manifest says"),
        Feed(run.store, found, first=0, rank=0, world=1) as feed,
    ):
        list(feed)


def on(store, **changes):
    every = np.ones(len(store), bool)
    lengths = sum(store.lengths(name) for name in store.names)
    wanted = {"starts": store.starts, "lengths": lengths, "eligible": every, "seed": 1, "epochs": 2.0}
    return Plan(**{**wanted, "tokens": 1 << 40, "cells": 24, "window": 2, **changes})


def assert_same(batch, direct):
    assert np.array_equal(batch.rows, direct.rows)
    assert np.array_equal(batch.present, direct.present)
    for name, counts in batch.counts.items():
        for what in ("offsets", "ids", "counts", "total"):
            assert np.array_equal(getattr(counts, what), getattr(direct.counts[name], what)), (name, what)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """400 cells of three modalities in 8 record batches."""
    folder = str(tmp_path_factory.mktemp("feed") / "store")
    stores.write(folder, shard=50)
    return Store(folder)


def test_a_share_stays_as_it_was_while_it_is_kept(store):
    found = on(store, epochs=4.0)
    with Feed(store, found, first=0, rank=0, world=1) as feed:
        kept = list(feed)
    assert len(kept) == found.steps
    for share in kept:
        assert_same(share.batch, store.read(found.share(share.step, 0, 1)))


def test_memory_of_shares_that_are_gone_is_used_again(store, monkeypatch):
    made = []
    fresh = np.empty

    def empty(size, dtype=None):
        made.append(size)
        return fresh(size, dtype)

    found = on(store, epochs=12.0)
    monkeypatch.setattr(window.np, "empty", empty)
    with Feed(store, found, first=0, rank=0, world=1) as feed:
        for share in feed:
            assert share.batch.rows.size
    # Ids and counts of three modalities; without reuse six arrays a step.
    assert len(made) < found.steps * 6 / 4


def test_a_record_batch_is_decoded_once_an_epoch(store):
    for epochs in (1, 3):
        found = on(store, epochs=float(epochs))
        with Feed(store, found, first=0, rank=0, world=1) as feed:
            assert sum(share.cells for share in feed) == epochs * len(store)
        assert feed.decoded == epochs * (len(store.starts) - 1)


def test_any_worker_from_any_step_reads_what_the_plan_says(store):
    rng = np.random.default_rng(0)
    found = on(store, weights=rng.random(len(store)) * 3)
    for _ in range(6):
        world = int(rng.integers(1, 5))
        rank, first = int(rng.integers(world)), int(rng.integers(found.steps))
        with Feed(store, found, first=first, rank=rank, world=world) as feed:
            steps = []
            for share in feed:
                steps.append(share.step)
                assert_same(share.batch, store.read(found.share(share.step, rank, world)))
        assert steps == list(range(first, found.steps))


def test_a_feed_that_is_left_early_ends_its_threads(store):
    before = threading.active_count()
    with Feed(store, on(store, epochs=50.0), first=0, rank=0, world=1) as feed:
        for share in feed:
            if share.step == 3:
                break
    assert threading.active_count() == before


def test_weights_say_how_often_a_cell_comes():
    weights = np.random.default_rng(2).random(401) + 0.05
    found = plan(weights=weights, epochs=40.0)
    seen = np.bincount(np.concatenate(parts(found)), minlength=401) / 40
    share = np.where(found.eligible, weights, 0)
    share *= found.eligible.sum() / share.sum()
    assert np.abs(seen - share).max() < 0.3
    assert seen.sum() == pytest.approx(found.eligible.sum(), rel=0.02)
    for rows in list(found.epoch(3)):
        assert (np.bincount(rows, minlength=401) <= np.ceil(share)).all()
    again = plan(weights=weights, epochs=40.0)
    assert np.array_equal(again.rows(77), found.rows(77))


@pytest.mark.parametrize("weights", [-1.0, np.nan, 0.0])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="weights of cells must be finite"):
        plan(weights=np.full(401, weights))


def test_rare_groups_weigh_more():
    cells = pa.table({"dataset": ["a"] * 90 + ["b"] * 10, "label": ["x"] * 50 + ["y"] * 50})
    even = balanced(cells, by=("dataset",), power=0.0)
    assert even[:90].sum() == pytest.approx(even[90:].sum(), rel=1e-5)
    root = balanced(cells, by=("dataset", "label"), power=0.5)
    sums = [root[:50].sum(), root[50:90].sum(), root[90:].sum()]
    np.testing.assert_allclose(np.array(sums) / sums[0], np.sqrt([50, 40, 10]) / np.sqrt(50), rtol=1e-5)
    assert np.array_equal(balanced(cells, power=1.0, by=("label",)), np.ones(100, np.float32))
    lone = pa.table({"label": ["x"] * 9999 + ["y"]})
    assert balanced(lone, by=("label",), power=0.0)[-1] == 10
    with pytest.raises(ValueError, match="power 2"):
        balanced(lone, by=("label",), power=2.0)


def test_weights_of_a_store_are_those_of_its_table(store):
    by = ("dataset", "label", "donor")
    assert np.array_equal(balanced(store.cells, by), balanced(store.cells.select(by), by))


def test_shuffled_stores_mix_as_well_as_uniform_batches_and_sorted_ones_do_not():
    cells, size = 20_000, 1000
    starts = np.arange(0, cells + 1, size)
    found = plan(
        starts=starts,
        lengths=np.ones(cells, np.int64),
        eligible=np.ones(cells, bool),
        cells=500,
        window=4,
        epochs=1.0,
    )
    rising = np.arange(cells) // 50
    shuffled = np.random.default_rng(0).permutation(rising)
    told = quality(found, {"sorted": rising, "shuffled": shuffled})
    assert told["shuffled"]["distinct_ratio"] > 0.98
    assert told["shuffled"]["entropy_ratio"] > 0.98
    assert told["sorted"]["distinct_ratio"] < 0.5
    # 500 draws of 400 chunks leave 400 * (1 - e**-1.25) of them.
    assert told["shuffled"]["uniform_distinct"] == pytest.approx(400 * (1 - np.exp(-1.25)), rel=0.02)


def test_pieces_are_copied_to_where_they_belong():
    rng = np.random.default_rng(0)
    for width in (np.uint8, np.uint16, np.uint32):
        source = rng.integers(0, 200, 5000).astype(width)
        sizes = rng.integers(0, 40, 100)
        firsts = rng.integers(0, 4900, 100)
        ends = np.cumsum([0, *sizes])
        into = np.zeros(ends[-1], width)
        copy_pieces(source, firsts, sizes, into.ctypes.data + ends[:-1] * into.itemsize)
        wanted = [source[a : a + n] for a, n in zip(firsts, sizes, strict=True)]
        assert np.array_equal(into, np.concatenate(wanted))
        with pytest.raises(AssertionError):
            copy_pieces(source, firsts + 4990, sizes, ends[:-1])


@pytest.mark.parametrize("width", [np.uint16, np.uint32])
def test_bytes_are_widened_on_the_way_and_large_counts_put_in(width):
    rng, most = np.random.default_rng(0), np.iinfo(width).max
    values = np.where(rng.random(5000) < 0.02, rng.integers(0, most, 5000, endpoint=True), 3).astype(width)
    offsets = np.concatenate([[0], np.sort(rng.integers(0, 5000, 200)), [5000]])
    low, ends, high = parted(Counts(offsets, np.zeros(5000, np.uint16), values, np.zeros(201)))
    assert low.dtype == np.uint8
    assert len(high) == (values > 255).sum() > 50
    assert np.array_equal(joined(offsets, low, np.dtype(width), ends, high), values)
    rows = rng.permutation(201)[:150]
    firsts, sizes = offsets[rows], np.diff(offsets)[rows]
    places = np.cumsum([0, *sizes])
    into = np.zeros(places[-1], width)
    addresses = into.ctypes.data + places[:-1] * into.itemsize
    its = ends[rows], ends[rows + 1], high
    widen_pieces(low, firsts, sizes, addresses, into.dtype, its)
    wanted = [values[a : a + n] for a, n in zip(firsts, sizes, strict=True)]
    assert np.array_equal(into, np.concatenate(wanted))
    with pytest.raises(AssertionError):
        widen_pieces(low, firsts + 4990, sizes, addresses, into.dtype, its)
    with pytest.raises(AssertionError):  # a place beyond the cell's last token
        widen_pieces(low, firsts, sizes, addresses, into.dtype, (*its[:2], high + np.uint64(5000 << 32)))


def test_room_lends_no_memory_twice():
    room = Room()
    first = room.array(100, np.dtype(np.uint16))
    first[:] = 7
    view = first[10:20][2:4]
    del first
    held = [room.array(100, np.dtype(np.uint16)) for _ in range(3)]
    for other in held:
        other[:] = 9
    assert view.tolist() == [7, 7]
    addresses = {other.ctypes.data for other in held}
    del held, other
    assert room.array(98, np.dtype(np.uint16)).ctypes.data in addresses


def test_random_numbers_are_a_pure_function_of_their_keys():
    keys = np.arange(10_000)
    assert np.array_equal(mix(3, keys)[::-1], mix(3, keys[::-1]))
    drawn = uniform(3, keys)
    assert abs(drawn.mean() - 0.5) < 0.01
    assert abs(drawn.var() - 1 / 12) < 0.01
    assert len(np.unique(drawn)) == len(keys)
    assert abs(np.corrcoef(drawn, uniform(4, keys))[0, 1]) < 0.05
