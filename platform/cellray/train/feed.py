"""The feed: a deterministic plan of batches over a store, and a thread that reads ahead.

(store, seed, epoch, step) fixes the global batch, whatever the number of workers; worker r of W
takes every W-th of its cells, longest first, so that workers carry like loads. The whole state
of the feed is the step.
"""

import queue
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cellray.data.store import Batch, Store


def mix(*keys: int | np.ndarray) -> np.ndarray:
    """Keys (integers or arrays of them, broadcast) -> well-mixed uint64. A pure function, so random
    choices made from it do not depend on batch, worker or order.

    Source: Steele 2014, splitmix64, doi:10.1145/2660193.2660195.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = state + np.asarray(key).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """`mix` as float64 in [0, 1)."""
    return (mix(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Plan:
    """Which cells every step of a stage trains on. Pure integers, the same on every worker."""

    def __init__(
        self,
        *,
        starts: np.ndarray,
        lengths: np.ndarray,
        eligible: np.ndarray,
        seed: int,
        epochs: float,
        tokens: int,
        cells: int,
        window: int,
    ) -> None:
        """`starts` as `Store.starts`; `lengths` tokens of each cell; `eligible` bool [cells].

        A global batch holds at most `cells` cells and `tokens` tokens (but always one cell);
        cells mix within `window` record batches. Raises ValueError if no cell is eligible.
        """
        if not eligible.any():
            raise ValueError("no cell is left to train on: the split or the modalities leave none")
        self.starts, self.lengths, self.eligible = starts, lengths, eligible
        self.seed, self.tokens, self.cells, self.window = seed, tokens, cells, window
        self._target = round(epochs * int(eligible.sum()))

    @cached_property
    def _batches(self) -> list[tuple[int, np.ndarray]]:
        """(epoch, rows) of every step."""
        found: list[tuple[int, np.ndarray]] = []
        seen, epoch = 0, 0
        while seen < self._target:
            for rows in self.epoch(epoch):
                if seen >= self._target:
                    break
                found.append((epoch, rows))
                seen += len(rows)
            epoch += 1
        return found

    @property
    def steps(self) -> int:
        return len(self._batches)

    def rows(self, step: int) -> np.ndarray:
        """Rows of the store in the global batch of `step`."""
        return self._batches[step][1]

    def share(self, step: int, rank: int, world: int) -> np.ndarray:
        """The rows of worker `rank` of `world`: every world-th cell by falling length, ties by place."""
        rows = self.rows(step)
        if len(rows) < world:
            raise ValueError(
                f"step {step} has {len(rows)} cells for {world} workers: raise feed.cells and "
                "feed.tokens, or use fewer workers"
            )
        return rows[np.argsort(-self.lengths[rows], kind="stable")][rank::world]

    def epoch(self, epoch: int) -> Iterator[np.ndarray]:
        """The global batches of one pass, each eligible cell once."""
        order = np.argsort(mix(self.seed, epoch, np.arange(len(self.starts) - 1)), kind="stable")
        tail = np.empty(0, np.int64)
        windows = [order[i : i + self.window] for i in range(0, len(order), self.window)]
        for i, window in enumerate(windows):
            rows = np.concatenate([np.arange(self.starts[b], self.starts[b + 1]) for b in window])
            rows = rows[self.eligible[rows]]
            rows = rows[np.argsort(mix(self.seed, epoch, rows, 1), kind="stable")]
            tail = yield from self._cut(np.concatenate([tail, rows]), last=i == len(windows) - 1)

    def _cut(self, rows: np.ndarray, *, last: bool) -> Generator[np.ndarray, None, np.ndarray]:
        """Batches from the front of `rows`; returns what is left for the next window.

        A remainder under half a batch joins the one before it, so that no step is tiny.
        """
        ends = np.cumsum(self.lengths[rows])
        first, pending = 0, np.empty(0, np.int64)
        while first < len(rows):
            used = ends[first - 1] if first else 0
            stop = int(np.searchsorted(ends, used + self.tokens, side="right"))
            stop = min(max(stop, first + 1), first + self.cells)
            if stop >= len(rows) and not last:
                break
            batch = rows[first:stop]
            if stop >= len(rows) and 2 * len(batch) < len(pending):
                batch, pending = np.concatenate([pending, batch]), batch[:0]
            if len(pending):
                yield pending
            pending, first = batch, stop
        if len(pending):
            yield pending
        return rows[first:]


@dataclass(frozen=True)
class Share:
    """What one worker trains on in one step."""

    step: int
    cells: int
    """Cells of the global batch."""
    tokens: int
    """Tokens of the global batch."""
    batch: Batch
    """This worker's cells."""


class Feed:
    """Shares of `plan` for one worker, read ahead by a thread. Use as a context manager."""

    AHEAD = 4

    def __init__(self, store: Store, plan: Plan, *, first: int, rank: int, world: int) -> None:
        self.store, self.plan, self.rank, self.world = store, plan, rank, world
        self.waited = 0.0
        """Seconds that `__iter__` waited for data."""
        self._first = first
        self._ready: queue.Queue[Share | BaseException | None] = queue.Queue(self.AHEAD)
        self._stop = threading.Event()
        self._cached: dict[int, Batch] = {}
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)

    def __enter__(self) -> "Feed":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def __iter__(self) -> Iterator[Share]:
        while True:
            before = time.perf_counter()
            item = self._ready.get()
            self.waited += time.perf_counter() - before
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _run(self) -> None:
        try:
            for step in range(self._first, self.plan.steps):
                if self._stop.is_set():
                    return
                rows = self.plan.rows(step)
                batch = self._read(self.plan.share(step, self.rank, self.world))
                self._ready.put(Share(step, len(rows), int(self.plan.lengths[rows].sum()), batch))
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def _read(self, rows: np.ndarray) -> Batch:
        return self.store.read(rows, self._decoded)

    def _decoded(self, numbers: np.ndarray) -> list[Batch]:
        """Record batches, those of the last two windows kept at hand."""
        for number in numbers:
            if number not in self._cached:
                self._cached[number] = self.store.batch(int(number))
        spare = [n for n in self._cached if n not in numbers]
        for number in spare[: max(0, len(self._cached) - 2 * self.plan.window)]:
            del self._cached[number]
        return [self._cached[number] for number in numbers]
