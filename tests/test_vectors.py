"""The teacher's vectors are computed once, in pieces; who is told to stop leaves at once, and loses none."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from cellray.data import arrow, storage
from cellray.train import chain as chains
from cellray.train.chain import chain
from cellray.train.ending import Stopped, on_terminate
from cellray.train.run import Run
from cellray.train.targets import teacher_table, teacher_vectors
from tests import stores
from tests.conftest import ROOT

SETTINGS = {"unimodal.epochs": 0.5, "joint.epochs": 0.5, "distil.epochs": 0.5}
PIECE = 64


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run whose teacher is trained, and the bytes of its vectors, computed without a pause."""
    run = stores.run(tmp_path_factory.mktemp("taught"), **SETTINGS, stages="unimodal,joint")
    chain(run, lambda event: None)
    teacher = run.trained_teacher()
    table = teacher_table(teacher, run.store, np.arange(len(run.store)))
    return run, arrow.encode(table.combine_chunks())


@pytest.fixture
def run(taught, tmp_path):
    """A copy of that run that goes on with the distillation."""
    fs, path = storage.locate(taught[0].url)
    fs.put(path + "/", str(tmp_path / "run") + "/", recursive=True)
    return stores.run(tmp_path / "run", **SETTINGS)


def parts(run):
    fs, path = storage.locate(run.path("teacher"))
    return sorted(os.path.basename(name) for name in fs.find(path)) if fs.exists(path) else []


def vectors(run):
    return storage.read_bytes(run.teacher_path())


def heard(event, *facts):
    return event["stage"] == "teacher" and (event["step"], event["steps"]) == facts


def test_who_is_told_to_stop_between_pieces_goes_on_with_the_next(run, taught, monkeypatch):
    monkeypatch.setattr(chains, "PIECE", PIECE)
    stop = threading.Event()

    def emit(event):
        if heard(event, 3, 7):
            stop.set()

    with pytest.raises(Stopped):
        chain(run, emit, "cpu", stop)
    assert parts(run) == [f"{number:04d}-of-0007.arrow" for number in range(3)]
    seen = []
    chain(Run(run.recipe), lambda event: seen.append(event) if event["stage"] == "teacher" else None)
    assert [event["step"] for event in seen] == [3, 4, 5, 6, 7, 7]
    assert vectors(run) == taught[1]
    assert parts(run) == [os.path.basename(run.teacher_path())]


def test_a_signal_in_the_middle_of_a_piece_is_not_kept_waiting(run, taught):
    computed = []

    def emit(event):
        if heard(event, 0, 1):
            signal.raise_signal(signal.SIGTERM)
        computed.append(event)

    with on_terminate() as told, pytest.raises(Stopped):
        chain(run, emit, "cpu", told)
    assert computed[-1] == {"stage": "teacher", "step": 0, "steps": 1}
    assert parts(run) == []
    chain(Run(run.recipe), lambda event: None)
    assert vectors(run) == taught[1]


WORKER = """
import sys, threading
import torch
import torch.distributed as dist
from cellray.train import chain as chains
from cellray.train.ending import Stopped
from tests import stores
from tests.test_vectors import PIECE, SETTINGS, heard

folder, rank, file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{file}", world_size=2, rank=rank)
chains.PIECE, stop = PIECE, threading.Event()
try:
    chains.chain(
        stores.run(folder, **SETTINGS),
        lambda event: stop.set() if rank == 1 and heard(event, 2, 7) else None,
        "cpu",
        stop,
    )
except Stopped:
    print("stopped")
dist.destroy_process_group()
"""


def test_two_workers_leave_when_one_is_told_and_one_goes_on_with_what_they_did(
    run, taught, tmp_path, monkeypatch
):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, run.url, str(rank), str(tmp_path / "rendezvous")],
            env={**environment, "PYTHONPATH": path},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert [process.communicate(timeout=120)[0] for process in processes] == ["stopped\n"] * 2
    finally:
        for process in processes:
            process.kill()
            process.wait()
    # The one that was told left its second piece; the other one, who was not, had its own done.
    assert parts(run) == [f"{number:04d}-of-0007.arrow" for number in range(3)]
    monkeypatch.setattr(chains, "PIECE", PIECE)
    chain(run, lambda event: None)
    assert vectors(run) == taught[1]


def test_chunks_are_what_one_call_gives(taught):
    run, _ = taught
    teacher = run.trained_teacher()
    rows = np.random.default_rng(0).permutation(len(run.store))[:150]
    table = teacher_table(teacher, run.store, rows)
    joint, summaries = teacher_vectors(teacher, run.store, rows)
    assert table["cell_id"].to_pylist() == run.store.cells["cell_id"].take(rows).to_pylist()
    for name, wanted in (("joint", joint), ("summaries", summaries)):
        found = np.array(table[name].to_pylist(), np.float32)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
