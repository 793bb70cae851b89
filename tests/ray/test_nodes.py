"""Nodes of a cluster die under a training: it waits for others, goes on, and comes to the same."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.ray.test_pretrain import outcome

pytestmark = pytest.mark.usefixtures("short")

CHANGES = {"stages": "unimodal", "workers": "2", "checkpoint_seconds": "0.1"}


def trained(folder, kills, epochs):
    """What a training on a cluster of two nodes comes to, of which so many are killed."""
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    words = [f"{key}={value}" for key, value in (CHANGES | {"unimodal.epochs": str(epochs)}).items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.node_driver", str(folder), str(kills), *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("killed a node") == kills, done.stdout
    assert done.stdout.count("resumed") >= kills, done.stdout
    found = outcome(folder)
    assert len(found) == 3
    return found


@pytest.mark.slow
def test_a_node_that_dies_changes_nothing(tmp_path):
    assert trained(tmp_path / "killed", 1, 20) == trained(tmp_path / "whole", 0, 20)


@pytest.mark.slow
def test_ten_nodes_that_die_change_nothing(tmp_path):
    assert trained(tmp_path / "killed", 10, 200) == trained(tmp_path / "whole", 0, 200)
