"""A training that is told to end (SIGTERM) does so at once and loses nothing; one that is killed, little."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from cellray.train import checkpoint
from cellray.train.chain import chain
from cellray.train.ending import TERMINATED, on_terminate
from tests import stores
from tests.conftest import ROOT

GRACE = 10.0
"""Seconds that a scheduler waits at the least before it kills."""
SETTINGS = {"stages": "unimodal,joint", "unimodal.epochs": "2", "joint.epochs": "12"}
LAST = "joint"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The stages of an undisturbed run: hash of the weights and loss curve of each."""
    run = stores.run(tmp_path_factory.mktemp("whole"), **SETTINGS)
    chain(run, lambda event: None)
    return outcome(run.url)


def outcome(url):
    found = {}
    for name in ("unimodal-rna", "unimodal-atac", "unimodal-protein", LAST):
        facts = checkpoint.committed(f"{url}/stages/{name}")
        assert facts is not None, name
        found[name] = facts["sha256"], facts["curve"], facts["cells"], facts["tokens"]
    return found


def start(folder, **settings):
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    words = [f"{key}={value}" for key, value in (SETTINGS | settings).items()]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.train_worker", str(folder), *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def interrupted(folder, wanted, signals, **settings):
    """Send the signals, one each, to runs at random times; then let the last run end.

    Seconds that those took to leave that were told to.
    """
    draw, waits, places = random.Random(len(signals)), [], itertools.count()
    place, left = folder / f"{next(places)}", list(signals)
    while left:
        process = start(place, **settings)
        time.sleep(draw.uniform(0.0, 3.0))
        begun = time.monotonic()
        process.send_signal(left[0])
        said, _ = process.communicate(timeout=60)
        if "done" in said:  # it had come to its end, if not yet to that of the process
            assert process.returncode in (0, -left[0]), said
            assert outcome(place) == wanted
            place = folder / f"{next(places)}"
            continue
        number = left.pop(0)
        if number == signal.SIGTERM:
            waits.append(time.monotonic() - begun)
        assert process.returncode == (TERMINATED if number == signal.SIGTERM else -number), said
        assert ("stopped" in said) == (number == signal.SIGTERM)
    process = start(place, **settings)
    said, _ = process.communicate(timeout=250)
    assert process.returncode == 0, said
    assert outcome(place) == wanted
    print(f"\n{len(waits)} told to end, seconds: {[round(w, 2) for w in waits]}; {next(places)} runs whole")
    return waits


def test_a_run_that_is_told_to_end_or_killed_goes_on_as_if_nothing_had_been(tmp_path, whole):
    # No checkpoint but the last: what is gone on from is what the first signal left.
    waits = interrupted(tmp_path, whole, [signal.SIGTERM, signal.SIGKILL], checkpoint_seconds=1e9)
    assert max(waits) < GRACE


@pytest.mark.slow
def test_fifty_of_fifty_runs_that_are_told_to_end_are_gone_in_time(tmp_path, whole):
    waits = interrupted(tmp_path, whole, [signal.SIGTERM] * 50, checkpoint_seconds=1e9)
    assert len(waits) == 50
    assert max(waits) < GRACE


@pytest.mark.slow
def test_thirty_of_thirty_kills_change_nothing(tmp_path, whole):
    interrupted(tmp_path, whole, [signal.SIGKILL] * 30, checkpoint_seconds=0.05)


def test_the_signal_does_what_it_did_before_when_the_body_is_left():
    before = signal.getsignal(signal.SIGTERM)
    with on_terminate() as told:
        assert not told.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert told.is_set()
    assert signal.getsignal(signal.SIGTERM) is before
