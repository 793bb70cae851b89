import os
import signal
import subprocess
from pathlib import Path

from tests import processes

NESTED = 'setsid sleep 600 & echo "$!"; wait'
OPEN = "exec 3> log; echo; exec sleep 600"


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def begun(script, folder, **environment):
    """A shell, and the line that it has printed."""
    shell = subprocess.Popen(
        ["sh", "-c", script], cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    assert shell.stdout is not None
    return shell, shell.stdout.readline()


def test_all_users_of_a_folder_are_ended_and_nobody_else(tmp_path):
    ours, theirs = tmp_path / "this", tmp_path / "this one"
    ours.mkdir()
    theirs.mkdir()
    started, child = begun(NESTED, tmp_path, TMPDIR=str(ours))
    other, others = begun(NESTED, tmp_path, TMPDIR=str(theirs))
    (writes, _), (apart, _) = begun(OPEN, ours), begun(OPEN, theirs)
    try:
        with (ours / "mine").open("w"):
            processes.end(ours)
        assert [started.wait(5), writes.wait(5)] == [-signal.SIGKILL] * 2
        assert not lives(int(child))
        assert lives(other.pid)
        assert lives(int(others))
        assert lives(apart.pid)
    finally:
        processes.end(theirs)
        for shell in (started, other, writes, apart):
            shell.communicate()
