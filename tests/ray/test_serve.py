import contextlib
import json
import os
import socket
import subprocess
import sys

import grpc
import httpx
import numpy as np
import pyarrow as pa
import pytest
from ray import serve

from cellray import bundle, cluster
from cellray.embedder import tokens_from
from cellray.train.progress import Progress
from cellray.train.recipe import load, override
from pipelines import ask
from pipelines.full import full
from serve import app
from tests import tiny
from tests.ray.test_cluster import _descendants, _listeners
from tests.test_serve_api import arrow, indexed, problem_of, vectors_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("model") / "bundle")
    bundle.write(url, tiny.embedder(), golden=tiny.tokens(5))
    return url


@pytest.fixture(scope="module")
def endpoint(ray_session, model):
    with ask.serving() as url, httpx.Client(base_url=url, timeout=60) as client:
        serve.run(app.build({"bundle": model, "replicas": "2"}), name="cells", route_prefix="/")
        yield client


def post(endpoint, body, kind, path="/v1/embed", accept="*/*"):
    content = body if isinstance(body, bytes) else json.dumps(body)
    return endpoint.post(path, content=content, headers={"content-type": kind, "accept": accept})


def test_a_serve_that_cannot_start_is_not_left_behind(ray_session, monkeypatch):
    """The first test here, as `endpoint` lives until the last one."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(ask, "held_port", lambda: contextlib.nullcontext(port))
        with (
            pytest.raises(RuntimeError, match=f"Failed to bind to address '127.0.0.1:{port}'"),
            ask.serving(),
        ):
            pass
    assert not serve.status().proxies
    ask.alone()


def test_the_endpoint_gives_the_offline_bits_from_every_replica(endpoint, model):
    offline = bundle.load(model)
    matrix = tiny.counts(100)
    cells = tokens_from(offline.tokenizer, matrix, tiny.GENES)[0]
    wanted = offline.embed(cells).vectors
    stream = "application/vnd.apache.arrow.stream"
    for _ in range(5):
        assert np.array_equal(vectors_of(post(endpoint, arrow(matrix), stream, accept=stream)), wanted)
        assert np.array_equal(vectors_of(post(endpoint, indexed(matrix), "application/json")), wanted)
    for i in range(0, 100, 17):
        assert np.array_equal(
            vectors_of(post(endpoint, indexed(matrix[i]), "application/json"))[0], wanted[i]
        )
    said = post(endpoint, arrow(matrix), stream, "/v1/annotate").json()["cells"]
    assert [cell["label"] for cell in said] == offline.annotate(cells).labels.tolist()


def test_the_endpoint_tells_its_model_and_health(endpoint, model):
    digest = bundle.load(model).hash
    assert endpoint.get("/v1/models").json()["models"][0]["sha256"] == digest
    assert endpoint.get("/readyz").json() == {"status": "ok", "model": digest[:12]}
    assert endpoint.get("/healthz").status_code == 200
    vocabulary = pa.ipc.open_stream(endpoint.get("/v1/vocabulary").content).read_all()
    assert vocabulary.num_rows == len(tiny.GENES) + len(tiny.PEAKS)


def test_bad_requests_are_problems_over_http_too(endpoint):
    problem_of(post(endpoint, b"{", "application/json"), 400, "invalid")
    problem_of(post(endpoint, b" " * (33 << 20), "application/json"), 413, "too_large")
    problem_of(endpoint.get("/nowhere"), 404, "not_found")
    problem_of(endpoint.get("/v1/embed"), 405, "method_not_allowed")


def test_a_bad_bundle_or_setting_is_refused_before_anything_is_deployed(tmp_path, model):
    folder = tmp_path / "bundle"
    bundle.write(str(folder), tiny.embedder(), golden=tiny.tokens(2))
    data = bytearray((folder / "student.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "student.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"student\.safetensors has sha256"):
        app.build({"bundle": str(folder)})
    with pytest.raises(ValueError, match="which model"):
        app.build({})
    with pytest.raises(ValueError, match="there is no setting 'bundel'; there are bundle, replicas"):
        app.build({"bundel": model})
    with pytest.raises(ValueError, match="replicas=two: expected a whole number"):
        app.build({"bundle": model, "replicas": "two"})


def test_a_ray_that_serves_already_is_not_stopped_by_asking(endpoint, tmp_path):
    with pytest.raises(ValueError, match="Ray Serve runs on this cluster already"), ask.serving():
        pass
    settings = {"atlas": "nothing-is-read.csv", "run": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="Ray Serve runs on this cluster already"):
        full(override(load("pipelines.recipes.tiny:recipe"), settings), Progress("quiet"))
    assert not (tmp_path / "run").exists()
    assert endpoint.get("/healthz").status_code == 200


def test_a_held_port_is_nobody_elses():
    with ask.held_port() as port, socket.socket() as other, socket.socket() as ours:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        ours.bind(("127.0.0.1", port))
        ours.listen()
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", port), 5), ours.accept()[0]:
                pass


def test_what_replicas_open_to_the_network_demands_the_token(endpoint):
    ours = _descendants(os.getpid())
    loopback = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    ports = {port for host, port, pid in _listeners() if pid in ours and host not in loopback}
    assert len(ports) == 2, "of each replica the port by which others of its application call it"
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_builder_warns_before_ray_starts_open_to_the_network(model, root):
    code = "import sys; from serve import app; app.build({'bundle': sys.argv[1]})"
    open_to_all = {k: v for k, v in os.environ.items() if k not in cluster.LOCAL}
    said = subprocess.run(
        [sys.executable, "-c", code, model],
        env=open_to_all | {"PYTHONPATH": f"{root / 'platform'}:{root}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "make serve BUNDLE=PATH" in said.stderr
