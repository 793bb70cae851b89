"""One Ray for all tests here."""

import os
import shutil
from pathlib import Path

import pytest

from cellray import cluster


@pytest.fixture(scope="session")
def ray_session():
    """A local Ray of four logical CPUs, as `cellray.cluster.connect` starts it."""
    with cluster.connect("local", cpus=4, object_store_bytes=256 << 20):
        yield


@pytest.fixture
def short(monkeypatch):
    """Where commands that are started keep what a killed Ray leaves; sockets in it need a short path."""
    folder = Path(f"/tmp/k{os.getpid() % 10**6}")
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield
    shutil.rmtree(folder)
