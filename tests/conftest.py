"""What all tests share."""

import os
from pathlib import Path

import pytest

from cellray import cluster

# Test modules import Ray while they are collected; Ray reads its settings at its first import.
os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")
cluster.prepare("local")

ROOT = Path(__file__).resolve().parent.parent
HOURS = 2
"""What a slow test may take; others have the `timeout` of pyproject.toml."""


def pytest_collection_modifyitems(items):
    """Slow tests have time, whichever way they are started."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(HOURS * 3600))


@pytest.fixture(scope="session")
def root():
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared():
    """The folder with material that is no part of the repository; tests that need it skip without it."""
    folder = Path(os.environ.get("CELLRAY_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; set CELLRAY_SHARED to the one with data/ and k8s/")
    return folder


@pytest.fixture(scope="session")
def shared_data(shared):
    """Real single-cell files; see README.md in that folder."""
    folder = shared / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    return folder
