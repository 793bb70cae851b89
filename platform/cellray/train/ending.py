"""Ending a run before it is done, without losing work. No Ray."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATED = 128 + signal.SIGTERM
"""Exit code of a process that was told to end, and did."""


class Stopped(Exception):
    """The run was told to stop, and has written down how far it came. All workers raise it alike."""


@contextmanager
def on_terminate() -> Iterator[threading.Event]:
    """An event that a SIGTERM to this process sets while the body runs; it does nothing else then.

    Schedulers send it, and kill some seconds later. In another thread than the main one, which alone
    hears of signals, the event stays unset.
    """
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def tell(number: int, frame: FrameType | None) -> None:
        told.set()

    before = signal.signal(signal.SIGTERM, tell)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
