"""A process that hangs is killed, whatever it hangs in; one that gets further is left alone."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from cellray.train import watchdog
from tests.conftest import ROOT

LIMIT, LAST_WORDS = 0.6, 0.4
SCRIPT = f"""
import os, re, signal, sys, time
from cellray.train import watchdog

watchdog.LAST_WORDS = {LAST_WORDS}

def stuck(how):
    if how == "sleep":
        time.sleep(60)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "lock":  # of the interpreter: no other thread runs
        re.match("(a+)+$", "a" * 60 + "b")

with watchdog.watched({LIMIT}, lambda where: print("stands in", where, flush=True)):
    print("begun", flush=True)
    for _ in range(int(sys.argv[2])):
        watchdog.beat()
        time.sleep(0.1)
    print("hangs", flush=True)
    stuck(sys.argv[1])
print("left", flush=True)
time.sleep(1.3 * {LIMIT + LAST_WORDS})
"""


@contextmanager
def process(how, beats=10):
    """A process that beats ten times a second, longer than it may be without, and then hangs or does not."""
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, how, str(beats)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as found:
        assert found.stdout is not None
        try:
            assert found.stdout.readline() == "begun\n"
            yield found
        finally:
            found.kill()


def companion(parent):
    """The process that watches over `parent`."""
    found = []
    for thread in os.listdir(f"/proc/{parent}/task"):  # of which any may have started it
        with open(f"/proc/{parent}/task/{thread}/children") as file:
            found += file.read().split()
    (pid,) = found
    return int(pid)


def gone(pid):
    """Whether a process has ended, within some seconds."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("how", ["sleep", "stop", "lock"])
def test_a_process_that_hangs_is_killed_in_time_and_says_where_if_it_can(how):
    with process(how) as found:
        watcher = companion(found.pid)
        assert found.stdout.readline() == "hangs\n"
        begun = time.monotonic()
        said, _ = found.communicate(timeout=30)
        waited = time.monotonic() - begun
        assert found.returncode == -signal.SIGKILL
        # The last beat was up to a tenth of a second before.
        assert LIMIT + LAST_WORDS - 0.2 < waited < 2 * LIMIT + LAST_WORDS + 2, waited
        assert ("stands in stuck (<string>:" in said) == (how == "sleep"), said
        assert gone(watcher)


def test_a_process_that_does_not_hang_is_left_alone_then_and_later():
    with process("not") as found:
        watcher = companion(found.pid)
        said, _ = found.communicate(timeout=30)
        assert (found.returncode, said) == (0, "hangs\nleft\n")
        assert gone(watcher)


def test_a_companion_that_is_killed_is_replaced():
    with process("stop") as found:
        first = companion(found.pid)
        os.kill(first, signal.SIGKILL)
        assert found.stdout.readline() == "hangs\n"
        assert companion(found.pid) != first
        assert found.wait(timeout=30) == -signal.SIGKILL


def test_a_companion_ends_with_its_process():
    with process("sleep") as found:
        watcher = companion(found.pid)
        found.kill()
        assert gone(watcher)


def test_time_in_which_nothing_ran_does_not_count():
    with process("not", beats=5) as found:
        both = (found.pid, companion(found.pid))
        for pid in both:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5 * (LIMIT + LAST_WORDS))
        for pid in both:
            os.kill(pid, signal.SIGCONT)
        said, _ = found.communicate(timeout=30)
        assert (found.returncode, said) == (0, "hangs\nleft\n")


def test_without_a_limit_there_is_neither_thread_nor_companion():
    threads = threading.active_count()
    with watchdog.watched(0.0, pytest.fail):
        watchdog.beat()
        assert threading.active_count() == threads
    watchdog.beat()
