"""Processes that tests start, and what those start in turn."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path


def end(folder):
    """Kill whoever was started with this folder as TMPDIR or has a file in it open, and see them gone.

    Not this process. Ray's workers and agents write their titles over their environment, and keep logs open.
    """
    deadline = time.monotonic() + 30
    while left := _users(Path(folder)):
        assert time.monotonic() < deadline, left
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _users(folder):
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            started = f"TMPDIR={folder}".encode() in (process / "environ").read_bytes().split(b"\0")
            opened = (Path(os.readlink(file)) for file in (process / "fd").iterdir())
            if started or any(folder in path.parents for path in opened):
                found.append(int(process.name))
    return set(found) - {os.getpid()}
