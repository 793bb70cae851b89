"""Training workers that hang under Ray are ended and started again, and the run comes to the same."""

import os
import random
import signal
import time
from contextlib import contextmanager

import pytest

from cellray.train import checkpoint
from tests import stores
from tests.ray.test_pretrain import await_checkpoints, command, of, outcome

pytestmark = pytest.mark.usefixtures("short")

HANG = 10.0
"""Seconds without a step that are allowed: more than a busy machine takes for the first one."""
CHANGES = {"stages": "unimodal", "unimodal.epochs": "20", "workers": "2", "checkpoint_seconds": "0.1"}
LAST = "unimodal-rna"


@contextmanager
def begun(folder, **more):
    """A training command, of which nothing is left afterwards."""
    stores.write(str(folder / "store"))
    words = [f"{key}={value}" for key, value in (CHANGES | more).items()]
    process = command(folder, f"run={folder}", *words)
    try:
        yield process
    finally:
        for pid in of(process.pid):
            os.kill(pid, signal.SIGKILL)


def trainers(process):
    """Processes of the training workers of a command, and no others of its Ray."""
    return sorted(pid for pid, name in of(process.pid).items() if "RayTrainWorker" in name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What two workers come to that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with begun(folder) as process:
        said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    found = outcome(folder)
    assert len(found) == 3
    return found


def stopped(process, draw, number):
    """Stop `number` of the training workers; seconds until the last of the group has ended."""
    old = trainers(process)
    assert len(old) == 2
    begun = time.monotonic()
    for pid in draw.sample(old, number):
        os.kill(pid, signal.SIGSTOP)
    while set(old) & set(trainers(process)):
        assert time.monotonic() < begun + 120, "nobody has noticed"
        time.sleep(0.05)
    return time.monotonic() - begun


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_workers_that_are_stopped_are_replaced_and_change_nothing(tmp_path, whole, number):
    with begun(tmp_path, hang_seconds=HANG) as process:
        await_checkpoints(str(tmp_path / "checkpoints" / LAST), process)  # one may not be whole yet
        waited = stopped(process, random.Random(0), number)
        said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    print(f"\n{number} of 2 stopped: ended after {waited:.1f} s with hang_seconds={HANG:g}")
    assert waited < 2 * HANG
    assert "goes on from step" in said
    # The one that waits for the other says so, unless Ray has ended it before; who is stopped cannot.
    assert number == 1 or "has got no further" not in said, said
    assert outcome(tmp_path) == whole


@pytest.mark.slow
def test_a_run_whose_workers_hang_again_and_again_comes_to_its_end(tmp_path, whole):
    draw, waits = random.Random(1), []
    folder = str(tmp_path / "checkpoints" / LAST)
    with begun(tmp_path, hang_seconds=HANG) as process:
        for _ in range(5):  # more than Ray Train lets pass by itself
            before = max(checkpoint.steps(folder), default=0)
            while max(checkpoint.steps(folder), default=0) == before and process.poll() is None:
                time.sleep(0.05)
            if process.poll() is not None or len(trainers(process)) < 2:
                break
            waits.append(stopped(process, draw, 1))
        said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    print(f"\nended after {[round(w, 1) for w in waits]} s with hang_seconds={HANG:g}")
    assert len(waits) > 1
    assert max(waits) < 2 * HANG
    assert outcome(tmp_path) == whole
