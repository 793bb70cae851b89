"""Shards that are damaged while an epoch is read from them."""

import os
import shutil

import numpy as np
import pytest

from cellray.data import storage
from cellray.data.shards import Index
from cellray.data.store import Store, encode_shard, index_of
from cellray.train.feed import Feed, Plan
from tests.test_store import cells, write


def spoil(path, how, rng):
    """Damage a shard while it is read."""
    data = path.read_bytes()
    index = Index(**index_of(data))
    batch = rng.integers(len(index.rows))
    first = index.offset[batch]
    place = int(rng.integers(first, first + index.front[batch]))
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, place)
    elif how == "flipped":
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([data[place] ^ (1 << rng.integers(8))]))
    else:
        other = path.with_suffix(".new")
        other.write_bytes(encode_shard(cells(sum(index.rows), seed=int(rng.integers(1000, 2000)))[0]))
        other.replace(path)
    return storage.sha256(data), storage.sha256(path.read_bytes()) if path.exists() else ""


def spoilt(original, folder, how, seed):
    """Read eight epochs, damage a shard on the way; the message of the error, and hashes it should name."""
    rng = np.random.default_rng(seed)
    shutil.copytree(original, folder)
    store, truth = Store(str(folder)), Store(str(original))
    every = np.ones(len(store), bool)
    plan = Plan(
        starts=store.starts,
        lengths=store.lengths("rna"),
        eligible=every,
        seed=seed,
        epochs=8.0,
        tokens=1 << 40,
        cells=40,
        window=1,
    )
    at, path = int(rng.integers(0, plan.steps // 8)), rng.choice(sorted((folder / "shards").iterdir()))
    seen: list = []
    hashes: list = []

    def consume():
        with Feed(store, plan, first=0, rank=0, world=1) as feed:
            for share in feed:
                wanted = truth.read(plan.share(len(seen), 0, 1)).counts["rna"].ids
                assert np.array_equal(share.batch.counts["rna"].ids, wanted)
                if share.step == at:
                    hashes.extend(spoil(path, how, rng))
                seen.append(share.step)

    with pytest.raises(ValueError, match="sha256") as error:
        consume()
    assert seen == list(range(len(seen)))
    assert at < len(seen) < plan.steps
    assert path.name in str(error.value)
    assert all(digest[:16] in str(error.value) for digest in hashes)
    shutil.rmtree(folder)


HOW = ("deleted", "replaced", "truncated", "flipped")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "store"
    write(str(folder), 150, 90, 120)
    return folder


@pytest.mark.parametrize("how", HOW)
def test_a_shard_that_is_damaged_while_it_is_read_is_named(small, tmp_path, how):
    for seed in range(3):
        spoilt(small, tmp_path / "copy", how, seed)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_a_shard_that_is_damaged_while_it_is_read_is_named_a_hundred_times(small, tmp_path, how):
    for seed in range(100):
        spoilt(small, tmp_path / "copy", how, 1000 + seed)
