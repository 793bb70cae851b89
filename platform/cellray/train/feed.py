"""The feed: a deterministic plan of batches over a store, and threads that read ahead.

(store, seed, epoch, step) fixes the global batch, whatever the number of workers; worker r of W
takes every W-th of its cells, longest first, so that workers carry like loads. The whole state
of the feed is the step.

A pass goes over the record batches in random order, a window of them at a time. A window is cut, on
its own, into as many batches of like size as the budget asks for. So the number of steps follows
from sums over record batches, any step is found without those before it, and each record batch is
decoded once in a pass.
"""

import itertools
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cellray.data.store import Store
from cellray.data.tokens import Counts
from cellray.train.window import Share, Step, Window, room_of

MANY = 1 << 20
"""Cells that sums over all cells are made of at a time."""


def mix(*keys: int | np.ndarray) -> np.ndarray:
    """Keys (integers or arrays of them, broadcast) -> well-mixed uint64. A pure function, so random
    choices made from it do not depend on batch, worker or order.

    Source: Steele 2014, splitmix64, doi:10.1145/2660193.2660195.
    """
    state = np.zeros((), np.uint64)
    for key in keys:
        state = stir(state, key)
    return state


def stir(state: np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """`mix` of one more key: `mix(a, b)` is `stir(mix(a), b)`. So keys that many have in common cost once."""
    with np.errstate(over="ignore"):
        state = np.asarray(state + np.asarray(key).astype(np.uint64, copy=False))
        state += np.uint64(0x9E3779B97F4A7C15)
        state ^= state >> np.uint64(30)
        state *= np.uint64(0xBF58476D1CE4E5B9)
        state ^= state >> np.uint64(27)
        state *= np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """`mix` as float64 in [0, 1)."""
    return fraction(mix(*keys))


def uniform_tokens(rows: np.ndarray, counts: Counts, *keys: int) -> np.ndarray:
    """`uniform` of the keys, of the cell's number in `rows`, and of the feature, for every token."""
    from cellray.data.jit import still  # numba, which an embedder need not import
    from cellray.train import compiled

    found: np.ndarray = compiled.uniform(mix(*keys, rows), *still(counts.offsets, counts.ids))
    return found


def fraction(state: np.ndarray) -> np.ndarray:
    """What `mix` or `stir` returned as float64 in [0, 1)."""
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class _Pass:
    """The windows of one epoch, and how many steps each of them has."""

    order: np.ndarray
    """Record batches in the order of this epoch."""
    bounds: np.ndarray
    """First place in `order` of every window, and the end."""
    firsts: np.ndarray
    """First step, in the epoch, of every window, and the number of steps."""


class Plan:
    """Which cells every step of a stage trains on. Pure integers, the same on every worker."""

    FULL = 4
    """Batches that a window holds at the least, so that their sizes come near the budget."""

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
        weights: np.ndarray | None = None,
    ) -> None:
        """`starts` as `Store.starts`; `lengths` tokens of each cell; `eligible` bool [cells].

        A global batch holds at most `cells` cells and `tokens` tokens (but always one cell, and one
        more than fits where that ends it); cells mix within `window` record batches, or as many as
        hold FULL batches. `weights` [cells], positive or 0, says how often a cell comes, against the
        others: in each epoch as often as its share of the number of eligible cells, rounded up or
        down at random. Raises ValueError if no cell is eligible, or none has a weight.
        """
        if not eligible.any():
            raise ValueError("no cell is left to train on: the split or the modalities leave none")
        self.starts, self.eligible = starts, np.asarray(eligible, bool)
        self.lengths = np.asarray(lengths).astype(np.int32)
        self.weights = None if weights is None else _shares(weights, self.eligible)
        self.seed, self.cells = seed, cells
        # More tokens than `cells` of the longest have are no limit, but too large a number below.
        self.tokens = min(tokens, cells * max(1, int(self.lengths.max())))
        self._batches = len(starts) - 1
        self._sums = self._loads(0)
        mean = self._sums.sum() / (self._batches * self._full)
        self.window = max(window, math.ceil(self.FULL / mean)) if mean > 0 else window
        self._epoch = lru_cache(maxsize=2)(self._made)
        self._parts = lru_cache(maxsize=2)(self._cut)
        whole, part = int(epochs + 1e-9), epochs - int(epochs + 1e-9)
        steps = [int(self._epoch(e).firsts[-1]) for e in range(whole)]
        if part > 1e-9:
            steps.append(max(1, math.ceil(part * int(self._epoch(whole).firsts[-1]))))
        self._firsts = np.cumsum([0, *steps])
        """First step of every epoch, and the number of steps."""

    @property
    def steps(self) -> int:
        return int(self._firsts[-1])

    def rows(self, step: int) -> np.ndarray:
        """Rows of the store in the global batch of `step`."""
        epoch, window, part = self.place(step)
        return self._parts(epoch, window)[part]

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
        """The global batches of one pass. Without weights it has each eligible cell once."""
        for window in range(len(self._epoch(epoch).bounds) - 1):
            yield from self._parts(epoch, window)

    def place(self, step: int) -> tuple[int, int, int]:
        """Epoch of a step, window within it, and number of its batch within that."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a plan with {self.steps} steps")
        epoch = int(np.searchsorted(self._firsts, step, side="right")) - 1
        left = step - int(self._firsts[epoch])
        firsts = self._epoch(epoch).firsts
        window = int(np.searchsorted(firsts, left, side="right")) - 1
        return epoch, window, left - int(firsts[window])

    @property
    def _full(self) -> int:
        """The load of a full batch. Loads are integers: their sums are the same on any machine."""
        return self.tokens * self.cells

    def _load(self, rows: np.ndarray | slice) -> np.ndarray:
        """How much of a full batch each cell takes: its share of the tokens or cells, the larger."""
        share = np.maximum(self.lengths[rows].astype(np.int64) * self.cells, self.tokens)
        return np.minimum(share, self._full)

    def _copies(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """How often each of `rows` comes in an epoch."""
        if self.weights is None:
            return self.eligible[rows].astype(np.int64)
        return np.floor(self.weights[rows] + uniform(self.seed, epoch, rows, 0)).astype(np.int64)

    def _loads(self, epoch: int) -> np.ndarray:
        """Load of every record batch, int64."""
        found = np.zeros(self._batches, np.int64)
        edges = np.searchsorted(self.starts, np.arange(0, self.starts[-1] + MANY, MANY))
        for first, last in itertools.pairwise(np.unique(np.minimum(edges, self._batches)).tolist()):
            rows = np.arange(self.starts[first], self.starts[last])
            loads = self._load(rows) * self._copies(epoch, rows)
            found[first:last] = np.add.reduceat(loads, self.starts[first:last] - self.starts[first])
        return found

    def _made(self, epoch: int) -> _Pass:
        order = np.argsort(mix(self.seed, epoch, np.arange(self._batches)), kind="stable")
        number = math.ceil(self._batches / self.window)
        bounds = np.arange(number + 1) * self._batches // number
        sums = self._sums if self.weights is None else self._loads(epoch)
        loads = np.add.reduceat(sums[order], bounds[:-1])
        return _Pass(order, bounds, np.concatenate([[0], np.cumsum(-(-loads // self._full))]))

    def _cut(self, epoch: int, window: int) -> list[np.ndarray]:
        """The batches of a window: its cells in random order, cut where like shares of the load end."""
        made = self._epoch(epoch)
        mine = made.order[made.bounds[window] : made.bounds[window + 1]]
        rows = np.concatenate([np.arange(self.starts[b], self.starts[b + 1]) for b in mine])
        copies = self._copies(epoch, rows)
        rows = np.repeat(rows, copies)
        turn = np.arange(len(rows)) - np.repeat(np.cumsum(copies) - copies, copies)
        # No two keys are equal, so a sort that is not stable gives one order everywhere.
        rows = rows[np.argsort(mix(self.seed, epoch, rows, 1 + turn))]
        steps = int(made.firsts[window + 1] - made.firsts[window])
        if not steps:
            return []
        loads = self._load(rows)
        ends = np.cumsum(loads)
        whole = int(ends[-1])
        wanted = [whole * i // steps for i in range(1, steps)]
        cuts = np.searchsorted(ends - loads, wanted)
        # A step has a cell even where long cells fill those beside it.
        turns = np.arange(1, steps)
        cuts = np.minimum(np.maximum.accumulate(cuts - turns) + turns, len(rows) - steps + turns)
        return np.split(rows, np.maximum(cuts, turns))


def _shares(weights: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """How often each cell comes in an epoch on average, float32; 1 on average over the eligible."""
    weights = np.where(eligible, weights, 0).astype(np.float64)
    if not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
        raise ValueError("weights of cells must be finite, 0 or more, and not all 0 where cells may be used")
    return (weights * (int(eligible.sum()) / weights.sum())).astype(np.float32)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Feed:
    """Shares of `plan` for one worker, read ahead by threads. Use as a context manager.

    READERS threads, or as many as there are cores, read and decode record batches, and copy each cell
    from there to where it will be in its share. While shares of a window are consumed the next one is
    filled; so two windows are held, of the cells of this worker alone, whatever the size of the store.
    """

    AHEAD, READERS = 4, 2

    def __init__(self, store: Store, plan: Plan, *, first: int, rank: int, world: int) -> None:
        self.store, self.plan, self.rank, self.world = store, plan, rank, world
        self.waited = 0.0
        """Seconds that `__iter__` waited for data."""
        self.decoded = 0
        """Record batches decoded so far."""
        self._first = first
        self._ready: queue.Queue[Share | BaseException | None] = queue.Queue(self.AHEAD)
        self._stop = threading.Event()
        # More than there are cores only take turns: 4 % of CPU time on one core.
        readers = min(self.READERS, _cores())
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="feed-reader")
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
        self._pool.shutdown(wait=True, cancel_futures=True)

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
            for share in self._shares():
                self._ready.put(share)
                if self._stop.is_set():
                    return
                del share
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def _shares(self) -> Iterator[Share]:
        room = room_of(self.store)
        flight: deque[tuple[Window, list[Future[None]]]] = deque()
        for steps in itertools.chain(self._windows(), [None]):
            if steps is not None:
                window = Window(self.store, steps, room)
                flight.append((window, [self._pool.submit(window.fill, *part) for part in window.parts]))
            # The next window is under way while this one is handed out.
            while flight and (len(flight) > 1 or steps is None):
                window, filling = flight.popleft()
                for part in filling:
                    part.result()
                    self.decoded += 1
                    if self._stop.is_set():
                        return
                yield from window.shares(self.plan.lengths)
                del window

    def _windows(self) -> Iterator[list[Step]]:
        """The steps of a window, of each window from the first step on."""
        steps: list[Step] = []
        for number in range(self._first, self.plan.steps):
            mine = self.plan.share(number, self.rank, self.world)
            steps.append(Step(number, self.plan.rows(number), mine))
            last = number + 1 == self.plan.steps
            if last or self.plan.place(number + 1)[:2] != self.plan.place(number)[:2]:
                yield steps
                steps = []
