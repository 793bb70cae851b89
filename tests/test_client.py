import threading
import time
from contextlib import contextmanager

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import uvicorn

from cellray import bundle
from cellray.client import Client
from cellray.embedder import tokens_from
from serve.api import Limits
from serve.endpoint import application
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("model") / "bundle")
    bundle.write(url, tiny.embedder(), golden=tiny.tokens(5))
    return bundle.load(url)


@contextmanager
def running(app):
    """A real HTTP server on a free port of this machine; its URL."""
    config = uvicorn.Config(app, port=0, log_level="error", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(model):
    with running(application(model)) as address:
        yield address


def atlas(matrix=None, **parts):
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(60)])
    var = pd.DataFrame({"symbol": tiny.SYMBOLS}, index=list(tiny.GENES))
    return ad.AnnData(tiny.counts(60) if matrix is None else matrix, obs=obs, var=var, **parts)


def logged():
    matrix = tiny.counts(60)
    matrix.data = np.log1p(matrix.data)
    return matrix


def test_an_anndata_comes_back_with_the_offline_bits(url, model):
    cells, match = tokens_from(model.tokenizer, tiny.counts(60), tiny.GENES)
    seen = []
    with Client(url, chunk=25, progress=lambda done, total: seen.append((done, total))) as client:
        adata = client.annotate(client.embed(atlas()))
        chances = client.translate(adata, "atac")
    said = model.embed(cells)
    assert np.array_equal(adata.obsm["X_cellray"], said.vectors)
    assert np.array_equal(adata.obs["cellray_ood"], said.ood)
    assert np.array_equal(adata.obs["cellray_genes"], match.genes)
    assert adata.obs["cellray_label"].tolist() == model.annotate(cells).labels.tolist()
    assert adata.uns["cellray"]["model"] == model.hash
    assert adata.uns["cellray"]["counts_kept"] == pytest.approx(1)
    assert np.array_equal(chances.X, model.translate(cells, "atac"))
    assert chances.var_names.tolist() == list(tiny.PEAKS)
    assert seen[:3] == [(25, 60), (50, 60), (60, 60)]


def test_counts_are_found_wherever_they_are(url, model):
    wanted = model.embed(tokens_from(model.tokenizer, tiny.counts(60), tiny.GENES)[0]).vectors
    layered = atlas(logged(), layers={"counts": tiny.counts(60)})
    raw = atlas(logged())
    raw.raw = ad.AnnData(tiny.counts(60), var=raw.var)
    dense = atlas(tiny.counts(60).toarray().astype(int))
    with Client(url) as client:
        for adata in (layered, raw, dense):
            assert np.array_equal(client.embed(adata).obsm["X_cellray"], wanted)
        by_name = client.embed(layered, layer="counts", names="symbol", key="X_other")
    assert np.array_equal(by_name.obsm["X_other"], wanted)


def test_no_raw_counts_is_said_before_anything_is_sent():
    with Client("http://127.0.0.1:9") as client:
        with pytest.raises(ValueError, match="no raw counts here: X has values that are not whole"):
            client.embed(atlas(logged()))
        with pytest.raises(ValueError, match="has no layer 'counts'"):
            client.embed(atlas(), layer="counts")
        with pytest.raises(ValueError, match="var has no column 'gene'"):
            client.embed(atlas(), names="gene")


def test_a_refusal_is_told_in_the_endpoints_words_and_leaves_the_anndata(url):
    adata = atlas()
    adata.var_names = [f"odd{i}" for i in range(120)]
    with Client(url) as client, pytest.raises(ValueError, match=r"refused \(422\): .*0 of 120 genes"):
        client.embed(adata)
    assert not adata.obsm
    assert not len(adata.obs.columns)


def test_small_limits_are_kept_to(model):
    wanted = model.embed(tokens_from(model.tokenizer, tiny.counts(60), tiny.GENES)[0]).vectors
    limits = Limits(bytes=9000, cells=40)
    with running(application(model, limits)) as address, Client(address) as client:
        assert np.array_equal(client.embed(atlas()).obsm["X_cellray"], wanted)


class Flaky:
    """An endpoint that answers the first `busy` requests with 503 and then as it should."""

    def __init__(self, app, busy):
        self.app, self.busy = app, busy

    async def __call__(self, scope, receive, send):
        if self.busy:
            self.busy -= 1
            headers = [(b"retry-after", b"0"), (b"content-length", b"0")]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self.app(scope, receive, send)


def test_a_busy_endpoint_is_asked_again(model):
    wanted = model.embed(tokens_from(model.tokenizer, tiny.counts(60), tiny.GENES)[0]).vectors
    with running(Flaky(application(model), busy=5)) as address, Client(address) as client:
        assert np.array_equal(client.embed(atlas()).obsm["X_cellray"], wanted)


def test_an_endpoint_that_never_answers_is_named(model):
    silent = r"/v1/models did not answer in 3 tries: status 503"
    with (
        running(Flaky(application(model), busy=10**6)) as address,
        Client(address, tries=3) as client,
        pytest.raises(ConnectionError, match=silent),
    ):
        client.embed(atlas())
    with Client("http://127.0.0.1:9", tries=1) as client, pytest.raises(ConnectionError, match="refused"):
        client.model()
