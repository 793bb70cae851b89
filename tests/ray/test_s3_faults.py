"""An object store that fails: every way in which a request can, over HTTP, and what we make of it."""

import io
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest

from cellray.data import faults, storage
from cellray.data.store import Store
from cellray.train.recipe import Recipe, override
from tests import proxy
from tests.crash import content, ingest_in_process
from tests.files import anndata, poisson, table, write

SHARE = 0.3


@pytest.fixture(scope="module")
def server():
    """A proxy before an object store with one bucket; clients of this process go through it."""
    with (
        proxy.object_store() as upstream,
        proxy.proxy(upstream) as server,
        proxy.pointed(server.server_port, read_timeout=0.5),
    ):
        fs, _ = storage.locate("s3://cells")
        fs.mkdir("cells")
        yield server


@pytest.fixture
def store(server):
    """The proxy, without a plan."""
    yield server
    server.plan, server.withheld, server.rewritten = None, (), (b"", b"")


def data_of(number, size=3000):
    return random.Random(number).randbytes(size)


def write_and_read(place, numbers):
    def both(number):
        url, data = storage.join(place, f"{number:05d}"), data_of(number, 500 + 37 * number)
        storage.write_bytes(url, data)
        assert storage.read_verified(url, storage.sha256(data)) == data

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(both, numbers))


def check_share(plan):
    """Faults were injected as planned, of every kind."""
    assert plan.injected.total() / plan.requests == pytest.approx(SHARE, abs=0.05)
    assert plan.injected.keys() >= set(plan.weights)


def test_two_hundred_reads_and_writes_come_through_when_every_third_request_fails(store):
    store.plan = proxy.Plan(SHARE, checksums=False)
    write_and_read("s3://cells/light", range(100))
    check_share(store.plan)


@pytest.mark.slow
def test_four_thousand_reads_and_writes_come_through(store):
    store.plan = proxy.Plan(SHARE, checksums=False)
    write_and_read("s3://cells/heavy", range(2000))
    check_share(store.plan)
    print(store.plan.requests, store.plan.injected)


@pytest.mark.parametrize("kind", ["short", "cut", "reset"])
def test_objects_are_read_whole_in_one_piece_or_several(store, monkeypatch, kind):
    monkeypatch.setattr(storage, "PIECE", 10_000)
    for size in (0, 1, 10_000, 10_001, 123_456):
        url, data = f"s3://cells/pieces/{kind}-{size}", data_of(size, size)
        store.plan = None
        storage.write_bytes(url, data)
        store.plan = proxy.Plan(SHARE, {kind: 1}, ranges=True, checksums=False)
        assert storage.read_bytes(url) == data
    assert store.plan.injected[kind] > 0


def test_objects_of_many_parts_are_written_whole_and_leave_no_parts(store, monkeypatch):
    monkeypatch.setattr(storage, "SINGLE", 1 << 20)
    monkeypatch.setattr(storage, "PART", 5 << 20)
    data = data_of(1, 12 << 20)
    # An upload whose very first reply is lost has a name that nobody knows.
    weights = {"error": 1, "throttle": 1, "reset": 1, "lost": 1}
    store.plan = proxy.Plan(SHARE, weights, seed=1, only="uploadId=")
    storage.write_bytes("s3://cells/parts/overwrite", data)
    assert storage.write_once("s3://cells/parts/once", data)
    assert not storage.write_once("s3://cells/parts/once", data)
    assert store.plan.injected.total() > 3
    store.plan = None
    for name in ("overwrite", "once"):
        assert storage.read_bytes(f"s3://cells/parts/{name}") == data
    assert parts() == []


def parts():
    fs, _ = storage.locate("s3://cells")
    return fs.list_multipart_uploads("cells")


@pytest.fixture
def hurried(monkeypatch, store):
    """Whatever fails is given up soon."""
    monkeypatch.setattr(faults, "DEADLINE", 0.3)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    return store


def test_an_upload_that_fails_for_good_leaves_no_parts(hurried, monkeypatch):
    monkeypatch.setattr(storage, "SINGLE", 1 << 20)
    monkeypatch.setattr(storage, "PART", 5 << 20)
    hurried.plan = proxy.Plan(1.0, {"error": 1}, only="partNumber=2")
    with pytest.raises(ConnectionError, match=r"s3://cells/parts/failed could not be reached: \d+ tries"):
        storage.write_bytes("s3://cells/parts/failed", data_of(1, 12 << 20))
    hurried.plan = None
    assert not storage.exists("s3://cells/parts/failed")
    assert parts() == []


@pytest.mark.parametrize("kind", ["hang", "error", "throttle", "reset"])
def test_a_server_that_never_answers_is_given_up_at_the_deadline(hurried, kind):
    storage.write_bytes("s3://cells/dead", b"data")
    hurried.plan = proxy.Plan(1.0, {kind: 1})
    for call in (storage.exists, lambda url: storage.write_bytes(url, b"other")):
        begun = time.monotonic()
        with pytest.raises(ConnectionError, match=r"s3://cells/dead could not be reached: \d+ tries in \d"):
            call("s3://cells/dead")
        assert time.monotonic() - begun < 8
    hurried.plan = None
    assert storage.read_bytes("s3://cells/dead") == b"data"


def test_answers_are_not_faults(store):
    store.plan = proxy.Plan(0.0)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("s3://cells/nowhere")
    with pytest.raises(FileNotFoundError):
        storage.write_bytes("s3://no-such-bucket/file", b"data")
    assert not storage.exists("s3://cells/nowhere")
    assert store.plan.requests < 8


def test_wrong_bytes_are_read_again_and_named_if_they_stay(store):
    url, data = "s3://cells/wrong", data_of(1)
    storage.write_bytes(url, data)
    store.plan = proxy.Plan(1.0, {"wrong": 1}, checksums=False, limit=2)
    assert storage.read_verified(url, storage.sha256(data)) == data
    assert store.plan.injected["wrong"] == 2
    store.plan = None
    storage.write_bytes(url, data[:-1])
    with pytest.raises(ValueError, match=r"s3://cells/wrong has sha256 (\w+)…, it should be (\w+)…") as error:
        storage.read_verified(url, storage.sha256(data))
    assert storage.sha256(data)[:16] in str(error.value)
    assert storage.sha256(data[:-1])[:16] in str(error.value)


def test_a_checksum_of_the_server_finds_wrong_bytes_without_a_hash(store):
    url, data = "s3://cells/checked", data_of(2)
    storage.write_bytes(url, data)
    store.plan = proxy.Plan(1.0, {"wrong": 1}, limit=1)
    assert storage.read_bytes(url) == data
    assert store.plan.injected["wrong"] == 1


@pytest.mark.parametrize("kind", ["lost", "conflict", "reset", "error"])
def test_who_wrote_it_first_is_told_so_though_the_first_try_failed(store, kind):
    url = f"s3://cells/once/{kind}"
    store.plan = proxy.Plan(1.0, {kind: 1}, only="PUT", limit=1)
    assert storage.write_once(url, b"mine")
    assert store.plan.injected[kind] == 1
    assert storage.read_bytes(url) == b"mine"
    assert not storage.write_once(url, b"mine"), "another writer of the same bytes was later"
    assert not storage.write_once(url, b"other")


def test_a_refusal_that_does_not_say_which_condition_failed_is_understood(store):
    url = "s3://cells/once/bare"
    assert storage.write_once(url, b"mine")
    store.rewritten = (b"<Condition>If-None-Match</Condition>", b"")
    assert not storage.write_once(url, b"other")
    assert storage.read_bytes(url) == b"mine"


def test_a_store_without_conditional_writes_is_refused(store, monkeypatch):
    monkeypatch.setattr(storage, "_conditional", set())
    store.withheld = ("if-none-match",)
    with pytest.raises(ValueError, match=r"s3://cells/no/a: this object store ignores conditional writes"):
        storage.write_once("s3://cells/no/a", b"mine")
    store.withheld = ()
    store.plan = proxy.Plan(1.0, {"unable": 1})
    with pytest.raises(ValueError, match=r"s3://cells/no/b: .* does not implement conditional writes"):
        storage.write_once("s3://cells/no/b", b"mine")


def race(place, rounds, committers=8):
    """Many commit under one name, again and again: one wins, and all others see what it wrote."""
    ready = threading.Barrier(committers)

    def commit(who):
        won = []
        for number in range(rounds):
            url, mine = storage.join(place, f"{number:04d}"), b"%d:" % who + data_of(who)
            ready.wait(250)
            try:
                won.append(storage.write_once(url, mine))
                seen = storage.read_bytes(url)
                assert len(seen) == len(mine)
                assert won[-1] == (seen == mine)
            except BaseException:
                ready.abort()
                raise
        return won

    with ThreadPoolExecutor(committers) as pool:
        done = [pool.submit(commit, who) for who in range(committers)]
    errors = [future.exception() for future in done]
    assert not [error for error in errors if error and not isinstance(error, threading.BrokenBarrierError)]
    won = np.array([future.result() for future in done])
    np.testing.assert_array_equal(won.sum(0), 1)
    found = content(place)
    assert len(found) == rounds
    for number, data in enumerate(value for _, value in sorted(found.items())):
        who = int(won[:, number].argmax())
        assert data == b"%d:" % who + data_of(who)


def test_of_eight_committers_one_wins_on_a_disk(tmp_path):
    race(str(tmp_path / "race"), 25)
    assert len(list((tmp_path / "race").iterdir())) == 25, "nothing but the winners' files"


def test_of_eight_committers_one_wins_in_a_bucket(store):
    race("s3://cells/race", 8)


@pytest.mark.slow
def test_of_eight_committers_one_wins_two_hundred_times(store, tmp_path):
    race(str(tmp_path / "race"), 200)
    race("s3://cells/long-race", 200)


@pytest.mark.slow
def test_of_eight_committers_one_wins_while_requests_fail(store):
    # Wrong bytes are for read_verified to find, and here nobody knows a hash.
    store.plan = proxy.Plan(SHARE, {k: w for k, w in proxy.ORDINARY.items() if k != "wrong"})
    race("s3://cells/rough-race", 30)
    check_share(store.plan)


def test_hdf5_is_read_right_from_a_store_that_fails(store):
    sink = io.BytesIO()
    counts = np.random.default_rng(0).integers(0, 50, (400, 300))
    with h5py.File(sink, "w") as file:
        file.create_dataset("x", data=counts, chunks=(50, 60), compression="gzip")
    url = "s3://cells/counts.h5"
    storage.write_bytes(url, sink.getvalue())
    store.plan = proxy.Plan(SHARE, {"error": 3, "throttle": 2, "short": 3, "reset": 3, "cut": 3}, ranges=True)
    with storage.open_blocks(url, 4096) as remote, h5py.File(remote, "r") as file:
        assert np.array_equal(file["x"][:], counts)
    assert store.plan.injected.total() > 10
    assert store.plan.injected["cut"] > 0


def test_blocks_are_read_like_a_file(store, tmp_path):
    data = data_of(3, 10_000)
    url, local = "s3://cells/blocks", str(tmp_path / "blocks")
    for place in (url, local):
        storage.write_bytes(place, data)
    draw = random.Random(0)
    with storage.open_blocks(url, 700) as remote, storage.open_blocks(local) as here:
        for _ in range(200):
            offset, size = draw.randrange(-50, 11_000), draw.randrange(0, 3000)
            whence = os.SEEK_SET if offset >= 0 else os.SEEK_END
            assert remote.seek(offset, whence) == here.seek(offset, whence)
            assert remote.read(size) == here.read(size)
            assert remote.tell() == here.tell()
    with pytest.raises(FileNotFoundError):
        storage.open_blocks("s3://cells/nowhere")


def atlas(folder, place):
    """An atlas of two data sets, here and in the bucket."""
    folder.mkdir()
    rows = []
    for number in range(2):
        rna = write(anndata(poisson(40, 20, seed=number)), folder / f"rna{number}.h5ad")
        rows.append({"dataset": f"d{number}", "modality": "rna", "url": os.path.basename(rna)})
    table(folder / "atlas.csv", *rows)
    fs, path = storage.locate(place)
    fs.put(f"{folder}/", f"{path}/", recursive=True)


def test_an_ingest_from_and_to_a_store_that_fails_gives_the_same_bytes(store, tmp_path):
    atlas(tmp_path / "atlas", "s3://cells/light-atlas")
    made = {}
    for name, plan in {"calm": None, "rough": proxy.Plan(0.08)}.items():
        store.plan = plan
        recipe = override(
            Recipe(atlas="s3://cells/light-atlas/atlas.csv"),
            {"ingest.unit_cells": 40, "ingest.shard_bytes": 1000},
        )
        made[name] = f"s3://cells/light-{name}"
        ingest_in_process(recipe, made[name])
    assert store.plan.injected.total() > 2
    store.plan = None
    assert content(made["rough"]) == content(made["calm"])
    assert len(Store(made["rough"])) == 80


INGEST = """
import sys
from cellray import cluster
from pipelines import command, ingest

atlas, run = sys.argv[1:]
with cluster.connect("local", cpus=2, object_store_bytes=128 << 20):
    words = ["pipelines.recipes.tiny:recipe", f"atlas={atlas}", f"run={run}", "ingest.unit_cells=15"]
    assert command.main("", ingest.run, [*words, "ingest.shard_bytes=150", "--quiet"]) == 0
"""


@pytest.mark.slow
def test_workers_ingest_from_and_to_a_store_that_fails(store, tmp_path, root):
    atlas(tmp_path / "atlas", "s3://cells/atlas")
    made = {}
    for name, plan in {"calm": None, "rough": proxy.Plan(SHARE)}.items():
        store.plan = plan
        made[name] = f"s3://cells/{name}"
        done = subprocess.run(
            [sys.executable, "-c", INGEST, "s3://cells/atlas/atlas.csv", made[name]],
            cwd=root,
            env=os.environ
            | proxy.environment(store.server_port, read_timeout=0.5)
            | {"PYTHONPATH": f"{root / 'platform'}:{root}"},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert store.plan.injected.total() > 50
    print(store.plan.requests, store.plan.injected)
    store.plan = None
    assert content(storage.join(made["rough"], "store")) == content(storage.join(made["calm"], "store"))
