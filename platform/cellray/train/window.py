"""A window of the feed: the cells of some steps, copied from record batches to where their shares are."""

import contextlib
import itertools
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cellray.data.store import Batch, Store
from cellray.data.tokens import Counts, narrow


class Step(NamedTuple):
    """Which cells one worker reads for a step."""

    number: int
    whole: np.ndarray
    """Rows of the global batch."""
    mine: np.ndarray
    """Rows of this worker, in their order."""


@dataclass(frozen=True)
class Share:
    """What one worker trains on in one step.

    Keep it as long as you like: the memory of its arrays is used again when none of them, and nothing
    made from them without a copy, is alive.
    """

    step: int
    cells: int
    """Cells of the global batch."""
    tokens: int
    """Tokens of the global batch."""
    batch: Batch
    """This worker's cells."""


class Room:
    """Memory for arrays, used again when no array that was made from it is alive.

    Fresh memory costs the system a page fault a page: up to a third of the time of decoding into it.
    """

    def __init__(self) -> None:
        # Taken from and added to by several threads, and by the collector in the middle of anything:
        # each a single step of a deque.
        self._free: deque[np.ndarray] = deque()

    def array(self, size: int, width: np.dtype) -> np.ndarray:
        """An array of `size` items, of any content."""
        memory = self._memory(size * width.itemsize)
        # Views of views refer to the first array that has its memory from something that is no array:
        # this one. So it goes when the last of them does.
        lent = np.frombuffer(memory.data, width, size)
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return lent

    def _memory(self, wanted: int) -> np.ndarray:
        for _ in range(len(self._free)):
            try:
                found = self._free.popleft()
            except IndexError:
                break
            if wanted <= len(found) <= 2 * wanted + 4096:
                return found
            self._free.append(found)
        # Nothing fits: one that did not goes, so that no more is held than was in use at a time.
        if self._free:
            with contextlib.suppress(IndexError):
                self._free.popleft()
        return np.empty(wanted + wanted // 8 + 1, np.uint8)


_rooms: weakref.WeakKeyDictionary[Store, Room] = weakref.WeakKeyDictionary()


def room_of(store: Store) -> Room:
    """One for all feeds over a store, one after the other: the stages of a run."""
    return _rooms.setdefault(store, Room())


@dataclass
class _Tokens:
    """Tokens of one modality of the cells of a window. Lists have an array a step."""

    sizes: np.ndarray
    """Tokens of each cell, int64 [cells]."""
    offsets: list[np.ndarray]
    ids: list[np.ndarray]
    counts: list[np.ndarray]
    id_places: np.ndarray
    """Address of the first id of each cell, int64 [cells]."""
    count_places: np.ndarray
    total: np.ndarray


class Window:
    """The cells that one worker reads in some steps. Fill it with every one of `parts`, from any thread."""

    def __init__(self, store: Store, steps: list[Step], room: Room) -> None:
        self._store, self._steps = store, steps
        self._rows = np.concatenate([step.mine for step in steps])
        self._ends = np.cumsum([0, *(len(step.mine) for step in steps)]).tolist()
        self._present = np.zeros(len(self._rows), np.uint32)
        self._tokens = {
            name: self._space(name, np.dtype(narrow(len(vocabulary))), room)
            for name, vocabulary in store.tokenizer.vocabularies.items()
        }
        order = np.argsort(self._rows)  # (of a row that comes twice, either may be first)
        numbers = np.searchsorted(store.starts, self._rows[order], side="right") - 1
        cuts = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)).tolist()
        self.parts = [(int(numbers[a]), order[a:b]) for a, b in itertools.pairwise(cuts)]
        """Record batches, and which cells of the window are theirs."""

    def _space(self, name: str, width: np.dtype, room: Room) -> _Tokens:
        """Arrays for a modality, empty."""
        sizes = self._store.lengths(name)[self._rows].astype(np.int64)
        found = _Tokens(sizes, [], [], [], np.zeros_like(sizes), np.zeros_like(sizes), np.zeros_like(sizes))
        for a, b in itertools.pairwise(self._ends):
            offsets = np.concatenate([[0], np.cumsum(sizes[a:b])])
            ids = room.array(int(offsets[-1]), width)
            counts = room.array(int(offsets[-1]), self._store.widths[name])
            found.offsets.append(offsets)
            found.ids.append(ids)
            found.counts.append(counts)
            found.id_places[a:b] = ids.ctypes.data + offsets[:-1] * ids.itemsize
            found.count_places[a:b] = counts.ctypes.data + offsets[:-1] * counts.itemsize
        return found

    def fill(self, number: int, mine: np.ndarray) -> None:
        """Copy the cells `mine` of the window from record batch `number`, which is read and decoded."""
        from cellray.data.copying import copy_pieces, widen_pieces  # numba, for those who train alone

        record = self._store.record(number)
        rows = self._rows[mine] - record.rows[0]
        self._present[mine] = record.present[rows]
        for name, found in record.tokens.items():
            into = self._tokens[name]
            firsts, sizes = found.offsets[rows], into.sizes[mine]
            if not np.array_equal(found.offsets[rows + 1] - firsts, sizes):
                raise ValueError(
                    f"record batch {number} of {self._store.url} has cells with other numbers of {name} "
                    "tokens than their lengths say: it was written wrong. Ingest into a new folder."
                )
            into.total[mine] = found.total[rows]
            ids = found.ids.astype(into.ids[0].dtype, copy=False)
            copy_pieces(ids, firsts, sizes, into.id_places[mine])
            width, places = into.counts[0].dtype, into.count_places[mine]
            if found.low.dtype == np.uint8 != width:
                high = found.ends[rows], found.ends[rows + 1], found.high
                widen_pieces(found.low, firsts, sizes, places, width, high)
            else:
                copy_pieces(found.low.astype(width, copy=False), firsts, sizes, places)

    def shares(self, lengths: np.ndarray) -> Iterator[Share]:
        """The shares of the steps, when every part is filled. `lengths` as the plan counts tokens.

        They are handed over: the window keeps none.
        """
        for step, (a, b) in zip(self._steps, itertools.pairwise(self._ends), strict=True):
            counts = {
                name: Counts(t.offsets.pop(0), t.ids.pop(0), t.counts.pop(0), t.total[a:b])
                for name, t in self._tokens.items()
            }
            batch = Batch(self._rows[a:b], counts, self._present[a:b])
            yield Share(step.number, len(step.whole), int(lengths[step.whole].sum(dtype=np.int64)), batch)
