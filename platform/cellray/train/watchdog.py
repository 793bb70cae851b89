"""A worker that hangs is ended, so that it can be started again. No Ray, and no torch.

A stuck collective, a file system that does not answer, a process that was stopped: nothing within such a
process can be relied on to act. So a small process stands beside it, hears of every step, and kills it when
it has heard of none for too long. A thread within says where it hangs, if it still can.

Seconds are counted while they are lived through, one pause after the other: where the whole machine, or
worker and companion together, did not run for a while, nobody has hung.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LAST_WORDS = 1.0
"""Seconds in which a worker that hangs can say so, before it is killed."""
FRAMES = 4
"""Innermost calls that are named as the place where a worker hangs."""


class Watchdog:
    """Kills this process when the thread that made it does not `beat` for `seconds`; a context manager.

    `say` is told where that thread stands, in another thread and shortly before.
    """

    def __init__(self, seconds: float, say: Callable[[str], None]) -> None:
        self.seconds, self.say = seconds, say
        self.beats = 0
        self._pause = min(1.0, seconds / 10)
        self._owner = threading.get_ident()
        self._over = threading.Event()
        self._companion: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._companion = self._beside()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=10)
        if self._companion is not None:
            _dismiss(self._companion)

    def _beside(self) -> "subprocess.Popen[bytes]":
        """The companion: this file, by an interpreter that loads nothing else."""
        words = [str(os.getpid()), str(self.seconds + LAST_WORDS), str(self._pause)]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *words],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is not meant for it
        )

    def _watch(self) -> None:
        """Pass on to the companion that there were beats."""
        seen, quiet = self.beats, 0.0
        while not self._over.wait(self._pause):
            if seen != self.beats:
                seen, quiet = self.beats, 0.0
                self._tell()
                continue
            before, quiet = quiet, quiet + self._pause
            if before < self.seconds <= quiet:
                self.say(_stand(self._owner))

    def _tell(self) -> None:
        assert self._companion is not None
        assert self._companion.stdin is not None
        try:
            os.write(self._companion.stdin.fileno(), b".")
        except BrokenPipeError:  # somebody killed it
            _dismiss(self._companion)
            self._companion = self._beside()


def _dismiss(companion: "subprocess.Popen[bytes]") -> None:
    assert companion.stdin is not None
    companion.stdin.close()
    companion.wait()


def _stand(thread: int) -> str:
    """The innermost calls of a thread, the innermost first."""
    frame = sys._current_frames().get(thread)
    calls = traceback.extract_stack(frame)[-FRAMES:] if frame is not None else []
    return " < ".join(f"{call.name} ({Path(call.filename).name}:{call.lineno})" for call in reversed(calls))


_on: Watchdog | None = None


@contextmanager
def watched(seconds: float, say: Callable[[str], None]) -> Iterator[None]:
    """While the body runs, this process is killed when it does not `beat` for `seconds`; 0 for never.

    `say` is told where it hangs before it is killed, if it is not the whole process that stands still.
    """
    global _on
    assert _on is None, "a process has one watchdog"
    if not seconds:
        yield
        return
    with Watchdog(seconds, say) as _on:
        try:
            yield
        finally:
            _on = None


def beat() -> None:
    """Note that this process got further. It costs nothing, and does nothing where nobody watches."""
    if _on is not None:
        _on.beats += 1


def _companion(parent: int, seconds: float, pause: float) -> None:
    """Kill `parent` when nothing comes from it for `seconds`; return when it has ended, or is done."""
    quiet = 0.0
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], pause)
        if ready:
            if not os.read(sys.stdin.fileno(), 4096):
                return
            quiet = 0.0
            continue
        if os.getppid() != parent:
            return
        quiet += pause
        if quiet >= seconds:
            os.kill(parent, signal.SIGKILL)
            return


if __name__ == "__main__":
    _companion(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
