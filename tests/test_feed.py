import numpy as np
import pytest

from cellray.train.feed import Feed, Plan, mix, uniform
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


def test_budgets_hold():
    found = plan()
    for step in range(found.steps):
        rows = found.rows(step)
        # A short remainder joins the batch before it: at most half of it again.
        assert len(rows) <= 1.5 * found.cells
        assert found.lengths[rows].sum() <= 1.5 * found.tokens + found.lengths.max()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_global_batch_is_the_same_for_any_number_of_workers(world):
    found = plan()
    for step in range(found.steps):
        shares = [found.share(step, rank, world) for rank in range(world)]
        assert np.array_equal(np.sort(np.concatenate(shares)), np.sort(found.rows(step)))
        loads = [found.lengths[share].sum() for share in shares]
        assert max(loads) - min(loads) <= found.lengths.max()


def test_half_an_epoch_is_half_the_cells():
    assert sum(len(rows) for _, rows in plan(epochs=0.5)._batches) == pytest.approx(
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
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
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


def test_random_numbers_are_a_pure_function_of_their_keys():
    keys = np.arange(10_000)
    assert np.array_equal(mix(3, keys)[::-1], mix(3, keys[::-1]))
    drawn = uniform(3, keys)
    assert abs(drawn.mean() - 0.5) < 0.01
    assert abs(drawn.var() - 1 / 12) < 0.01
    assert len(np.unique(drawn)) == len(keys)
    assert abs(np.corrcoef(drawn, uniform(4, keys))[0, 1]) < 0.05
