"""An object store over HTTP: every part of the path that reads or writes a bucket."""

import io
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs
import torch
from moto.server import DomainDispatcherApplication, create_backend_app
from torch import nn
from werkzeug.serving import WSGIRequestHandler, make_server

from cellray import bundle
from cellray.cli import main
from cellray.data import storage
from cellray.data.store import Store
from cellray.train import checkpoint
from tests import tiny
from tests.files import anndata, poisson, table, write


class Silent(WSGIRequestHandler):
    def log(self, type, message, *args):
        """Requests are not worth a line."""


@pytest.fixture(scope="module")
def bucket():
    """The URL of an empty bucket, and the environment in which fsspec finds it."""
    moto, turns = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def application(environ, start):
        # S3 checks and writes in one step. moto does one after the other, so requests take turns.
        with turns:
            return moto(environ, start)

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Silent)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            fs, _ = storage.locate("s3://cells")
            fs.mkdir("cells")
            yield "s3://cells"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def model(bucket):
    url = storage.join(bucket, "bundle")
    bundle.write(url, tiny.embedder(), golden=tiny.tokens(5))
    return url


def upload(local, url):
    fs, path = storage.locate(url)
    fs.put(str(local), path, recursive=True)
    return url


def content(url):
    """Every file below a folder, with what is in it."""
    fs, path = storage.locate(url)
    return {name[len(path) + 1 :]: fs.cat_file(name) for name in fs.find(path)}


def test_of_several_writers_one_writes_once(bucket):
    for number in range(5):
        url = storage.join(bucket, f"once/{number}")
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i, url=url: storage.write_once(url, b"%d" % i), range(8)))
        assert sum(won) == 1
        assert storage.read_bytes(url) == b"%d" % won.index(True)
        assert not storage.write_once(url, b"later")


def test_bundles_are_written_read_and_replaced(bucket, model):
    cells = tiny.tokens(20)
    assert np.array_equal(bundle.load(model).embed(cells).vectors, tiny.embedder().embed(cells).vectors)
    url = storage.join(bucket, "other")
    first = bundle.write(url, tiny.embedder(), golden=tiny.tokens(5))
    assert bundle.write(url, tiny.embedder(labelled=False), golden=tiny.tokens(5)) != first
    assert not bundle.load(url).classes
    storage.write_bytes(storage.join(url, "card.md"), b"another")
    with pytest.raises(ValueError, match=r"s3://cells/other/card\.md has sha256"):
        bundle.load(url)
    with pytest.raises(ValueError, match="no bundle at s3://cells/nowhere"):
        bundle.load(storage.join(bucket, "nowhere"))


def test_checkpoints_are_saved_found_and_restored(bucket):
    folder, stage = (storage.join(bucket, "run", name) for name in ("checkpoints", "stage"))
    assert checkpoint.newest(folder, "work", pytest.fail) is None
    assert checkpoint.committed(stage) is None
    root, optimizer = fresh()
    for step in (1, 2, 3):
        update(root, optimizer)
        checkpoint.save(folder, step, root, optimizer, {"key": "work"})
    assert checkpoint.steps(folder) == [2, 3]
    storage.write_bytes(storage.join(folder, "00000004/state.safetensors"), b"killed on the way")
    heard: list[str] = []
    found = checkpoint.newest(folder, "work", heard.append)
    assert found is not None
    tensors, manifest = found
    assert manifest["step"] == 3
    assert len(heard) == 1
    assert "00000004 is not whole" in heard[0]
    again, optimizer_again = fresh()
    checkpoint.restore(tensors, again, optimizer_again)
    update(root, optimizer)
    update(again, optimizer_again)
    assert torch.equal(root.weight, again.weight)
    checkpoint.commit(stage, root, {"steps": 4})
    assert checkpoint.load(stage, again)["steps"] == 4
    storage.remove_folder(folder)
    assert checkpoint.steps(folder) == []


def fresh():
    root = nn.Linear(4, 3)
    return root, torch.optim.AdamW(root.parameters())


def update(root, optimizer):
    root(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_laptop_command_embeds_a_file_of_a_bucket(bucket, model, tmp_path):
    file = write(anndata(tiny.counts(50), features=tiny.GENES), tmp_path / "cells.h5ad")
    url, out = upload(file, storage.join(bucket, "laptop.h5ad")), storage.join(bucket, "laptop.npz")
    assert main(["embed", url, "--bundle", model, "--output", out, "--quiet"]) == 0
    with np.load(io.BytesIO(storage.read_bytes(out))) as arrays:
        assert np.array_equal(arrays["embedding"], tiny.embedder().embed(tiny.tokens(50)).vectors)


PATHS = """
import sys
from cellray import cluster
from pipelines import command, embed, ingest

model, bucket, local = sys.argv[1:]
with cluster.connect("local", cpus=2, object_store_bytes=128 << 20):
    for place in (bucket, local):
        words = ["pipelines.recipes.tiny:recipe", f"atlas={place}/atlas/atlas.csv", f"run={place}/run"]
        assert command.main("", ingest.run, [*words, "ingest.shard_bytes=2000", "--quiet"]) == 0
    for _ in range(2):
        words = [model, f"{bucket}/embeddings", f"{bucket}/atlas/atlas.csv", "--rows", "30"]
        assert embed.main([*words, "--workers", "1", "--quiet"]) == 0
"""


def test_workers_turn_an_atlas_in_a_bucket_into_the_same_store_and_embeddings(bucket, model, tmp_path, root):
    (tmp_path / "atlas").mkdir()
    write(anndata(tiny.counts(50), features=tiny.GENES), tmp_path / "atlas/rna.h5ad")
    write(anndata(poisson(50, 30), features=tiny.PEAKS), tmp_path / "atlas/atac.zarr")
    rows = [
        {"dataset": "a", "modality": "rna", "url": "rna.h5ad"},
        {"dataset": "a", "modality": "atac", "url": "atac.zarr"},
    ]
    table(tmp_path / "atlas/atlas.csv", *rows)
    upload(f"{tmp_path}/atlas/", storage.join(bucket, "atlas/"))
    done = subprocess.run(
        [sys.executable, "-c", PATHS, model, bucket, str(tmp_path)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": f"{root / 'platform'}:{root}"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    here, there = content(str(tmp_path / "run/store")), content(storage.join(bucket, "run/store"))
    manifests = [json.loads(files.pop("store.json")) for files in (here, there)]
    assert len(here) > 3, "shards and a vocabulary"
    assert here == there
    assert manifests[0]["shards"] == manifests[1]["shards"]
    assert manifests[0]["ingest"] == manifests[1]["ingest"]
    assert len(Store(storage.join(bucket, "run/store")).batch(0).rows) > 0
    written = content(storage.join(bucket, "embeddings"))
    assert len(json.loads(written.pop("manifest.json"))["files"][0]["tag"]) == 32
    parts = [pq.read_table(io.BytesIO(data)) for _, data in sorted(written.items())]
    assert [len(part) for part in parts] == [30, 20]
    vectors = [row for part in parts for row in part["embedding"].to_pylist()]
    assert np.array_equal(np.array(vectors, np.float32), tiny.embedder().embed(tiny.tokens(50)).vectors)
