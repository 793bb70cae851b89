import ctypes
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cellray.data.isolation import Isolation, isolated, isolated_map

GIB = 1 << 30


def square(name, number):
    return number**2


def process(name):
    return os.getpid()


def misbehave(name, how):
    """What a damaged file may make of its reader."""
    if how == "segfault":
        ctypes.string_at(0)
    if how == "abort":
        os.abort()
    if how == "exit":
        os._exit(3)
    if how == "hang":
        time.sleep(60)
    if how == "spin":
        while True:
            pass
    if how == "memory":
        return np.ones(GIB, np.int64).sum()
    if how == "refuse":
        raise ValueError(f"{name} is a web page")
    if how == "error":
        raise TypeError("codes is None")
    return np.arange(3)


BAD = {
    "segfault": r"a\.h5ad: reading it crashed the reader \(signal 11, SIGSEGV\); it is damaged or hostile",
    "abort": r"a\.h5ad: reading it crashed the reader \(signal 6, SIGABRT\)",
    "exit": r"a\.h5ad: reading it failed \(exit code 3\)",
    "memory": r"a\.h5ad: reading it needs more than 1 GiB of memory",
    "refuse": r"^a\.h5ad is a web page$",
    "error": r"a\.h5ad: reading it failed \(TypeError: codes is None\)",
}


def test_results_come_in_the_order_of_the_tasks_from_few_processes():
    tasks = [(f"{i}", i) for i in range(40)]
    assert isolated_map(square, tasks, workers=2) == [i**2 for i in range(40)]
    assert isolated_map(square, [], workers=2) == []
    pids = set(isolated_map(process, [("a",)] * 10, workers=2))
    assert 1 <= len(pids) <= 2
    assert os.getpid() not in pids


def test_what_goes_wrong_is_told_of_its_file_alone():
    tasks = [(f"{i}.h5ad", "fine") for i in range(4)]
    tasks[1:1] = [("a.h5ad", how) for how in BAD]
    found = isolated_map(misbehave, tasks, workers=2, memory=GIB)
    for (name, how), result in zip(tasks, found, strict=True):
        if how in BAD:
            with pytest.raises(ValueError, match=BAD[how]):
                raise result
        else:
            assert result.tolist() == [0, 1, 2], name


@pytest.mark.parametrize("how", ["hang", "spin"])
def test_what_takes_too_long_is_given_up(how):
    with Isolation(workers=1, seconds=3) as pool:
        slow, fine = pool.map(misbehave, [("a.h5ad", how), ("b.h5ad", "fine")])
        assert "a.h5ad: reading it took longer than 3 s" in str(slow)
        assert fine.tolist() == [0, 1, 2]
        # The next call has its own time.
        assert len(pool.map(process, [("c",)])) == 1


def test_processes_are_kept_from_call_to_call_and_ended_in_the_end():
    with Isolation(workers=1) as pool:
        (first,) = pool.map(process, [("a",)])
        (again,) = pool.map(process, [("a",)])
        assert first == again
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_one_call_returns_or_raises():
    assert isolated(square, "a", 3) == 9
    with pytest.raises(ValueError, match="is a web page"):
        isolated(misbehave, "a.h5ad", "refuse")


def test_names_are_those_given():
    (found,) = isolated_map(misbehave, [("a.h5ad", "abort")], workers=1, names=["data set 'x'"])
    assert str(found).startswith("data set 'x': ")


COMMAND = """
import os, sys
from tests.test_isolation import process, square
from cellray.data.isolation import isolated_map

if __name__ == "__main__":
    print("started")
    print(isolated_map(square, [("a", 2), ("b", 3)], workers=2))
"""


def test_a_command_is_not_started_again_by_its_processes(root, tmp_path):
    (tmp_path / "command.py").write_text(COMMAND)
    path = os.pathsep.join([str(root / "platform"), str(root), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-m", "command"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.stdout == "started\n[4, 9]\n", done.stderr


def test_a_process_ends_with_the_one_that_started_it(root, tmp_path):
    code = (
        "import os, signal; from cellray.data.isolation import Isolation; "
        "from tests.test_isolation import process; pool = Isolation(workers=1); "
        "print(pool.map(process, [('a',)])[0], flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = os.pathsep.join([str(root / "platform"), str(root)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} goes on")
