"""The process is killed at every call that writes, and the disk is full from every one on."""

import functools
import itertools
from pathlib import Path

import pytest

from cellray.data import storage
from cellray.data.store import Store
from cellray.train.recipe import Recipe, override
from tests import proxy
from tests.crash import Crash, content, crashing, enumerate_crashes, ingest_in_process
from tests.files import anndata, poisson, table, write

OLD, NEW = b"old" * 1000, b"newer" * 1000


@pytest.fixture(scope="module")
def bucket():
    with proxy.object_store() as port, proxy.pointed(port):
        fs, _ = storage.locate("s3://crashes")
        fs.mkdir("crashes")
        yield "s3://crashes"


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """A folder of a disk or a bucket."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")


numbers = itertools.count()


def places(root):
    """Fresh URLs below the root."""
    return (storage.join(root, f"place-{number}") for number in numbers)


def with_old(root):
    """Fresh URLs, with an old file under each."""
    for place in places(root):
        storage.write_bytes(storage.join(place, "file"), OLD)
        yield place


def replace(place):
    storage.write_bytes(storage.join(place, "file"), NEW)


def create(place):
    url = storage.join(place, "deep", "file")
    assert storage.write_once(url, NEW) or storage.read_bytes(url) == NEW


def old_or_new(place):
    assert storage.read_bytes(storage.join(place, "file")) in (OLD, NEW)


def nothing_or_new(place):
    url = storage.join(place, "deep", "file")
    assert not storage.exists(url) or storage.read_bytes(url) == NEW


@pytest.mark.parametrize("torn", [False, True])
def test_a_file_that_is_replaced_is_the_old_or_the_new_one(root, torn):
    assert enumerate_crashes(root, with_old(root), replace, old_or_new, torn=torn) >= 1


@pytest.mark.parametrize("torn", [False, True])
def test_a_file_that_is_written_once_is_there_whole_or_not_at_all(root, torn):
    assert enumerate_crashes(root, places(root), create, nothing_or_new, torn=torn) >= 1


@pytest.mark.parametrize("torn", [False, True])
def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path, torn):
    root = str(tmp_path)
    assert enumerate_crashes(root, with_old(root), replace, old_or_new, torn=torn, full=True) >= 1
    assert enumerate_crashes(root, places(root), create, nothing_or_new, torn=torn, full=True) >= 1
    assert not list(tmp_path.rglob("*.part")), "who goes on living tidies up"


def test_a_full_disk_says_which_file_needs_how_much(tmp_path):
    with (
        crashing(str(tmp_path), 2, full=True),
        pytest.raises(OSError, match=r"No space left.*5,000 bytes.*Make room.*a\.bin"),
    ):
        storage.write_bytes(str(tmp_path / "a.bin"), NEW)


def test_all_calls_that_write_are_points_to_crash_at(tmp_path, bucket):
    with crashing(str(tmp_path)) as calls:
        storage.write_bytes(str(tmp_path / "a" / "b"), b"data")
        storage.write_once(str(tmp_path / "c"), b"data")
        storage.write_bytes(storage.join(bucket, "d"), b"data")
        storage.read_bytes(storage.join(bucket, "d"))
        fs, path = storage.locate(storage.join(bucket, "d"))
        fs.rm(path)
        storage.locate(str(tmp_path))[0].rm(str(tmp_path / "a"), recursive=True)
    local = ["open", "write", "fsync"]
    assert calls.names == [
        *("mkdir", *local, "replace", "unlink", "fsync"),
        *("mkdir", *local, "link", "unlink", "fsync"),
        *("put_object", "delete_objects"),
        *("unlink", "rmdir"),
    ]


def test_the_dead_write_no_more(tmp_path):
    def write():
        try:
            (tmp_path / "a").write_bytes(b"first")
        finally:
            (tmp_path / "b").write_bytes(b"tidied up")

    with crashing(str(tmp_path), 2, torn=True), pytest.raises(Crash):
        write()
    assert content(str(tmp_path)) == {"a": b"fi"}


def test_a_writer_without_care_is_found_out(tmp_path):
    def careless(place):
        fs, path = storage.locate(place)
        fs.makedirs(path, exist_ok=True)
        fs.pipe_file(f"{path}/file", NEW)

    def whole_if_there(place):
        url = storage.join(place, "file")
        assert not storage.exists(url) or storage.read_bytes(url) == NEW

    with pytest.raises(AssertionError) as error:
        enumerate_crashes(str(tmp_path), places(str(tmp_path)), careless, whole_if_there, torn=True)
    assert error.value.__notes__ == ["after a crash torn call 3 of 3, write"]


def atlas(folder, *, datasets, cells, paired=False, seed=0):
    """The table of a small atlas: some data sets of RNA, with `paired` ATAC beside."""
    rows = []
    for number in range(datasets):
        rna = write(anndata(poisson(cells, 8, seed=seed + number)), folder / f"rna{seed}-{number}.h5ad")
        rows.append({"dataset": f"d{number}", "modality": "rna", "url": rna})
        if paired:
            peaks = [f"chr1:{i * 1000}-{i * 1000 + 500}" for i in range(6)]
            data = anndata(poisson(cells, 6, seed=seed + 50 + number), features=peaks)
            url = write(data, folder / f"atac{seed}-{number}.h5ad")
            rows.append({"dataset": f"d{number}", "modality": "atac", "url": url})
    return table(folder / f"atlas{seed}.csv", *rows)


def recipe(url, unit, shard):
    return override(Recipe(atlas=url), {"ingest.unit_cells": unit, "ingest.shard_bytes": shard})


def whole_store_or_none(place):
    """What the manifest names is there with its hash; without a manifest there is no store."""
    if not storage.exists(storage.join(place, "store.json")):
        with pytest.raises(ValueError, match="no store at"):
            Store(place)
        return
    store = Store(place)
    assert len(store) > 0
    for shard in range(len(store.shards)):
        assert len(store.batch(shard).rows) > 0


@pytest.mark.parametrize("kind", ["before", "torn", "full"])
def test_an_ingest_that_is_killed_leaves_no_half_store_and_can_be_run_again(tmp_path, kind):
    url = atlas(tmp_path, datasets=2, cells=12, paired=True)
    action = functools.partial(ingest_in_process, recipe(url, 6, 150))
    root = str(tmp_path / "stores")
    every = {"before": 14, "torn": 4, "full": 14}[kind]
    points = enumerate_crashes(
        root,
        places(root),
        action,
        whole_store_or_none,
        torn=kind == "torn",
        full=kind == "full",
        every=every,
        first=3,
    )
    assert points >= 4


def grown(folder, root, *, unit, shard):
    """Fresh URLs with a store of all data sets but the last under each, and what adds the last."""
    url = atlas(folder, datasets=3, cells=10, seed=7)
    fewer = folder / "fewer.csv"
    fewer.write_text(Path(url).read_text().rpartition("d2,")[0])

    def stores():
        for place in places(root):
            ingest_in_process(recipe(str(fewer), unit, shard), place)
            assert len(Store(place)) == 20
            yield place

    return stores(), functools.partial(ingest_in_process, recipe(url, unit, shard))


def old_store_or_new(place):
    whole_store_or_none(place)
    assert len(Store(place)) in (20, 30)


def test_a_store_that_is_added_to_stays_readable_when_that_is_killed(tmp_path):
    root = str(tmp_path / "stores")
    stores, action = grown(tmp_path, root, unit=10, shard=150)
    points = enumerate_crashes(root, stores, action, old_store_or_new, every=14, first=4)
    assert points >= 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["before", "torn", "full"])
def test_a_store_that_is_added_to_stays_readable_at_every_point(tmp_path, kind):
    root = str(tmp_path / "stores")
    stores, action = grown(tmp_path, root, unit=5, shard=150)
    points = enumerate_crashes(
        root,
        stores,
        action,
        old_store_or_new,
        torn=kind == "torn",
        full=kind == "full",
    )
    assert points > 5


ATLASES = [
    {"datasets": 1, "cells": 9},
    {"datasets": 2, "cells": 12},
    {"datasets": 3, "cells": 10},
    {"datasets": 1, "cells": 12, "paired": True},
    {"datasets": 2, "cells": 8, "paired": True},
    {"datasets": 5, "cells": 6},
]
SETTINGS = [(2, 60), (3, 80), (6, 150), (5, 10_000)]


@pytest.mark.slow
def test_none_of_five_thousand_crashes_leaves_half_a_store(tmp_path, bucket):
    points = dict.fromkeys(("before", "torn", "full", "s3 before", "s3 torn"), 0)
    for seed, about in enumerate(ATLASES):
        url = atlas(tmp_path, **about, seed=seed * 100)
        for unit, shard in SETTINGS:
            action = functools.partial(ingest_in_process, recipe(url, unit, shard))
            for kind in points:
                if kind.startswith("s3") and unit != 6:
                    continue
                root = bucket if kind.startswith("s3") else str(tmp_path / "stores")
                points[kind] += enumerate_crashes(
                    root,
                    places(root),
                    action,
                    whole_store_or_none,
                    torn=kind.endswith("torn"),
                    full=kind == "full",
                )
    print(points)
    assert sum(points.values()) >= 5_000
