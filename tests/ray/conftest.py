"""One Ray for all tests here."""

import pytest

from cellray import cluster


@pytest.fixture(scope="session")
def ray_session():
    """A local Ray of four logical CPUs, as `cellray.cluster.connect` starts it."""
    with cluster.connect("local", cpus=4, object_store_bytes=256 << 20):
        yield
