"""A training that a bench lets on step by step, as it is: nothing of its loop is written anew.

The gate stands where a stage makes its losses. So a step, as it is counted, goes from there through the
update, the meters and the feed to the same place of the next one.
"""

import itertools
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from cellray.data.store import Batch
from tests.bench.harness.serve import Delivery, serve

PAUSE = 0.03
"""Seconds at the gate that make a pause: between two rounds there are more, within one far fewer."""
Row = dict[str, Any]


class Gate:
    """Holds a training at every step until it may pass, and hands out what a step was."""

    def __init__(self, pauses: Path) -> None:
        """`pauses`: a file that gets the clock time of the end of every pause, a line each."""
        self._pauses = pauses
        self._leave = threading.Semaphore(0)
        self._done: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._under_way: tuple[int, int] | None = None
        self._open = threading.Event()

    def step(self, cells: int, tokens: int) -> None:
        """The training is about to make a step of so many cells and tokens, the one before is done."""
        if self._under_way is not None:
            self._done.put(self._under_way)
        self._under_way = (cells, tokens)
        if self._open.is_set():
            return
        before = time.monotonic()
        self._leave.acquire()
        if time.monotonic() - before > PAUSE:
            with self._pauses.open("a") as file:
                file.write(f"{time.time():.3f}\n")

    def deliveries(self) -> Iterator[Delivery]:
        """Steps that were made, each when it is asked for. From another thread than the training."""
        while True:
            self._leave.release()
            yield (*self._done.get(), None)

    def open(self) -> None:
        """Let all further steps pass."""
        self._open.set()
        self._leave.release()


def hold(kind: type, gate: Gate, *, workers: int = 1) -> None:
    """Put `gate` into the stages of class `kind`, in this process; this is one of so many like workers."""
    plain, name = vars(kind)["losses"], "losses"

    def losses(stage: Any, batch: Batch, step: int) -> Any:
        tokens = sum(len(counts.ids) for counts in batch.counts.values())
        gate.step(len(batch.rows) * workers, tokens * workers)
        return plain(stage, batch, step)

    setattr(kind, name, losses)


def served(
    gate: Gate, over: Callable[[], object], commands: TextIO | None = None, answers: TextIO | None = None
) -> threading.Thread:
    """A thread that answers commands from the steps at `gate`; when there are no more it says so by `over`
    and opens the gate."""

    def run() -> None:
        try:
            # The first step also counts operations and makes the optimiser's state.
            serve(gate.deliveries, first=2, commands=commands, answers=answers)
        finally:
            over()
            gate.open()

    thread = threading.Thread(target=run, name="bench", daemon=True)
    thread.start()
    return thread


def undisturbed(run: Path) -> list[Row]:
    """Rows of metrics.jsonl that no pause lies in: what a run on its own would have printed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    pauses = [float(line) for line in (run / "pauses").read_text().splitlines()]
    return between(rows, pauses)


def between(rows: Sequence[Row], pauses: Sequence[float]) -> list[Row]:
    """Those of `rows` since whose predecessor no pause ended."""
    return [
        row
        for before, row in itertools.pairwise(rows)
        if not any(before["time"] < pause <= row["time"] for pause in pauses)
    ]
