"""What one unit read: counts of some cells, of which any range of cells can be had without the rest.

A file holds, one after another and in the byte order of x86 and ARM:

    rows, tokens, bytes of an id, bytes of a count | offsets [rows + 1] | ids [tokens]       | counts [tokens]
    int64 each                                     | int64              | unsigned, padded   | unsigned
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from cellray.data import storage

HEAD = 4 * 8
KINDS: dict[int, Any] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}


def encode(offsets: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> bytes:
    """The file of these ragged rows."""
    head = np.array([len(offsets) - 1, len(ids), ids.itemsize, counts.itemsize], "<i8")
    parts: list[Any] = [head, offsets.astype("<i8"), ids, b"\0" * (-ids.nbytes % 8), counts]
    return b"".join(parts)


def decode(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, ids and counts of all of a file."""
    rows, tokens, wide, high = np.frombuffer(data, "<i8", 4).tolist()
    places = _places(rows, tokens, wide)
    ids = np.frombuffer(data, KINDS[wide], tokens, places[0])
    counts = np.frombuffer(data, KINDS[high], tokens, places[1])
    return np.frombuffer(data, "<i8", rows + 1, HEAD), ids, counts


def _places(rows: int, tokens: int, wide: int) -> tuple[int, int]:
    """Where ids and counts begin."""
    ids = HEAD + 8 * (rows + 1)
    return ids, ids + -(-wide * tokens // 8) * 8


class Piece:
    """A file that is open."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        rows, tokens, wide, high = np.frombuffer(file.read(HEAD), "<i8").tolist()
        self.offsets = np.frombuffer(file.read(8 * (rows + 1)), "<i8")
        ids, counts = _places(rows, tokens, wide)
        self._arrays = (ids, KINDS[wide]), (counts, KINDS[high])

    def read(self, first: int, stop: int, ids: np.ndarray, counts: np.ndarray) -> None:
        """Fill the arrays, of these types or wider ones, with the tokens of rows first … stop - 1."""
        begin, end = self.offsets[first], self.offsets[stop]
        assert len(ids) == len(counts) == end - begin
        for (at, kind), into in zip(self._arrays, (ids, counts), strict=True):
            self._file.seek(at + kind.itemsize * int(begin))
            own = into if into.dtype == kind else np.empty(len(into), kind)
            got = self._file.readinto(own.view(np.uint8))  # type: ignore[attr-defined]
            assert got == own.nbytes, f"{got:,} bytes of a piece came, not {own.nbytes:,}"
            if own is not into:
                into[:] = own


@contextmanager
def opened(url: str) -> Iterator[Piece]:
    """The file at `url`."""
    with storage.open_blocks(url) as file:
        yield Piece(file)
