"""The bench of goodput counts what it says, on a run made up such that the answer is known."""

import os
import subprocess
import sys
import time

import pytest

from tests.bench.goodput import PARTS, Kill, Watched, below, cost, goodput, rate


def made(lost=2.0):
    """Steps of a second each; a kill at 10.5, of which the run goes on at 17 after losing `lost` steps."""
    rows: list[dict] = [
        {"time": t, "at": t + 0.1, "seconds": t, "step": int(t)} for t in map(float, range(1, 11))
    ]
    done = 10.0 - lost
    rows += [
        {"time": 17.0 + n, "at": 17.1 + n, "seconds": done + n, "step": int(done + n)} for n in range(1, 24)
    ]
    marks: list[dict] = [{"stage": "run", "begun": 2, "at": 0.5}, {"stage": "run", "begun": 2, "at": 15.0}]
    marks.append({"stage": "s", "resumed": int(done), "at": 16.5})
    events = sorted([*rows, *marks], key=lambda event: event["at"])
    return Watched(events, [Kill(10.5, gone=11.0, started=12.0)])


def test_the_parts_of_a_kill_add_up_to_what_it_cost():
    watched = made()
    (kill,) = watched.kills
    found = cost(watched, kill)
    # The row at 18 is the first step after it: 8 s after the row before, of which one went into a step
    # that counts, and two more had been done and were lost.
    assert sum(found.values()) == pytest.approx(8.0 - 1.0 + 2.0)
    assert [found[part] for part in PARTS[:-1]] == pytest.approx([0.5, 1.0, 3.0, 1.5])
    whole = watched.rows()[-1]["time"] - watched.rows()[0]["time"]
    assert goodput(watched.rows()) == pytest.approx(1 - sum(found.values()) / whole)
    assert rate(watched) == pytest.approx(goodput(watched.rows()))


def test_a_run_that_nobody_disturbed_has_all_of_it():
    watched = made()
    watched.events = [event for event in watched.events if event["at"] < 10.5]
    assert goodput(watched.rows()) == pytest.approx(1.0)


def test_only_descendants_are_seen_with_the_cpu_they_took():
    work = "import sys, time\nwhile time.process_time() < 0.1: pass\nprint(flush=True)\nsys.stdin.read()"
    before = time.time()
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = below(os.getpid())[child.pid]
        assert found.parent == os.getpid()
        assert found.cpu >= 0.08
        assert abs(found.started - before) < 5
        assert os.getpid() not in below(os.getpid())
        assert below(child.pid) == {}
        child.communicate()
