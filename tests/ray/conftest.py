"""One Ray for all tests here, and a cluster that others have started."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cellray import cluster
from tests import processes


@pytest.fixture(scope="session")
def ray_session():
    """A local Ray of four logical CPUs, as `cellray.cluster.connect` starts it."""
    with cluster.connect("local", cpus=4, object_store_bytes=256 << 20):
        yield


@pytest.fixture
def short(monkeypatch):
    """Where commands that are started keep what a killed Ray leaves; sockets in it need a short path.

    Afterwards nothing is left of these commands, nor of what they started, however the test has ended.
    """
    folder = Path(f"/tmp/k{os.getpid() % 10**6}")
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield
    processes.end(folder)
    shutil.rmtree(folder)


@pytest.fixture
def remote(tmp_path):
    """A cluster that `ray start` made: its address, and the environment with its token."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    options = ["--num-cpus=2", "--include-dashboard=false", "--object-store-memory=134217728", "--block"]
    with tempfile.TemporaryDirectory(prefix="cellray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--port=0", *options]
        with (Path(folder) / "log").open("w") as log:
            head = subprocess.Popen(
                [*command, f"--temp-dir={folder}"], env=environment, stdout=log, stderr=log, cwd=tmp_path
            )
        try:
            deadline = time.monotonic() + 60
            while "will now block forever" not in (text := (Path(folder) / "log").read_text()):
                assert head.poll() is None, text
                assert time.monotonic() < deadline, text
                time.sleep(0.1)
            yield (Path(folder) / "ray_current_cluster").read_text(), environment
        finally:
            head.terminate()
            try:
                head.wait(90)  # half a minute where a training was waiting in it
            finally:
                processes.end(folder)
