"""Matrices of counts as they are stored: whole, or sparse by rows (CSR) or by columns (CSC).

Nothing is taken for granted of the arrays of a sparse matrix: what is read of them is checked
against each other and against what was declared before it is used as an index.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import h5py
import numpy as np
import scipy.sparse as sp
import zarr

from cellray.data.chunks import Numbers
from cellray.data.counts import MOST
from cellray.data.guard import item, whole

KEPT = 32_000_000
"""Counts of a file stored by columns (CSC) up to which they are turned to rows once and kept."""
CHUNK = 8_000_000
"""Counts read at a time from a file stored by columns, and values at a time from a dense one."""
SLAB = 128_000_000
"""Values read at a time at most from a dense matrix whose chunks hold many rows."""

Check = Callable[[np.ndarray, np.ndarray | None], np.ndarray]
"""From numbers, and where rows of them start if they are flat, to counts; ValueError if they are none."""


class Dense:
    """A matrix stored whole."""

    by_column = False
    chunk_rows: int
    """Rows that a chunk of the file holds, 1 if these are too many to be read together."""

    def __init__(self, array: Any) -> None:
        self.array = array
        if len(array.shape) != 2:
            raise ValueError(f"counts have {len(array.shape)} dimensions, not cells x features")
        self.shape = (int(array.shape[0]), int(array.shape[1]))
        self.stored = int(np.prod(self.shape, dtype=np.int64))
        rows = int((array.chunks or (1,))[0])
        self.chunk_rows = rows if rows <= SLAB // max(1, self.shape[1]) else 1

    def some(self) -> np.ndarray:
        """Some of the numbers."""
        return np.asarray(self.array[:10])

    def rows(self, start: int, stop: int, check: Check) -> sp.csr_matrix:
        """Rows start … stop - 1 as CSR."""
        width = max(1, self.shape[1])
        step = max(1, CHUNK // width)
        if step < self.chunk_rows:
            # A chunk is decoded whole for any row of it: what is read ends where chunks end.
            step = self.chunk_rows
        parts = [sp.csr_matrix((0, self.shape[1]), dtype=np.uint32)]
        at = start
        while at < stop:
            end = min(at - at % step + step, stop)
            slab = np.asarray(self.array[at:end])
            small = max(1, CHUNK // width)
            for first in range(0, end - at, small):
                parts.append(sp.csr_matrix(check(slab[first : first + small], None)))
            at = end
        return sp.vstack(parts, format="csr")


class Sparse:
    """A matrix stored by rows (CSR) or by columns (CSC)."""

    chunk_rows: int
    """Rows whose values a chunk of the file holds, about."""

    def __init__(self, group: Any, by_column: bool, shape: Sequence[int] | np.ndarray) -> None:
        self.by_column = by_column
        self.shape = _shape(shape)
        self.data, self.indices, self._indptr = (item(group, k) for k in ("data", "indices", "indptr"))
        for name, array in (("data", self.data), ("indices", self.indices), ("indptr", self._indptr)):
            if not isinstance(array, h5py.Dataset | zarr.Array) or len(array.shape) != 1:
                raise _lies(f"{name} is no list of numbers")
            if name != "data" and array.dtype.kind not in "iu":
                raise _lies(f"{name} holds values of type {array.dtype}, not whole numbers")
        self._values, self._places = Numbers(self.data), Numbers(self.indices)
        self.stored = int(self.data.shape[0])
        outer, self._inner = (self.shape[1], self.shape[0]) if by_column else self.shape
        if self._indptr.shape[0] != outer + 1:
            raise _lies(f"indptr has {self._indptr.shape[0]:,} entries, {outer + 1:,} were expected")
        if self.indices.shape[0] != self.stored:
            raise _lies(f"there are {self.stored:,} values and {int(self.indices.shape[0]):,} indices")
        # Where rows begin is checked as they are read: of many cells it is a large array.
        self._pointers(0, 0)
        last = int(self._pointers(outer, outer)[0])
        if last != self.stored:
            raise _lies(f"indptr ends at {last:,}, with {self.stored:,} values")
        self.columns = whole_pointers(self._indptr, self.stored) if by_column else None
        values = int((self.data.chunks or (1,))[0])
        self.chunk_rows = 1 + self.shape[0] * min(values, SLAB) // max(1, self.stored)
        self._kept: sp.csr_matrix | None = None

    def some(self) -> np.ndarray:
        """Some of the numbers."""
        return np.asarray(self.data[:10_000])

    def _pointers(self, start: int, stop: int) -> np.ndarray:
        """Where rows start … stop begin among the values, int64 [stop - start + 1], checked."""
        return _checked(np.asarray(self._indptr[start : stop + 1]), self.stored, start == 0)

    def rows(self, start: int, stop: int, check: Check) -> sp.csr_matrix:
        """Rows start … stop - 1 as CSR, indices in the order they are stored."""
        if self.by_column:
            if self._kept is None and self.stored <= KEPT:
                self._kept = self._from_columns(0, self.shape[0], check)
            return self._from_columns(start, stop, check) if self._kept is None else self._kept[start:stop]
        starts = self._pointers(start, stop)
        first, last = int(starts[0]), int(starts[-1])
        starts -= first
        indices = self._indices(first, last)
        data = check(self._values.part(first, last), starts)
        return sp.csr_matrix((data, indices, starts), shape=(stop - start, self.shape[1]))

    def _from_columns(self, start: int, stop: int, check: Check) -> sp.csr_matrix:
        """Some rows of a matrix stored by columns: one pass over all of it, a part at a time."""
        parts = [(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.uint32))]
        for begin, end, first, last in self._column_parts():
            rows = self._indices(first, last)
            data = check(self._values.part(first, last), None)
            assert self.columns is not None
            lengths = np.diff(self.columns[begin : end + 1])
            columns = np.repeat(np.arange(begin, end, dtype=np.int32), lengths)
            keep = (rows >= start) & (rows < stop)
            parts.append((rows[keep] - start, columns[keep], data[keep]))
        within, across, values = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
        # Columns are in order already, and turning them into rows adds up nothing, which might not fit.
        starts = np.zeros(self.shape[1] + 1, np.int64)
        np.cumsum(np.bincount(across, minlength=self.shape[1]), out=starts[1:])
        return sp.csc_matrix((values, within, starts), shape=(stop - start, self.shape[1])).tocsr()

    def _column_parts(self) -> Iterator[tuple[int, int, int, int]]:
        """Ranges of columns with about CHUNK values each, and which values these are."""
        assert self.columns is not None
        begin = 0
        while begin < self.shape[1]:
            first = int(self.columns[begin])
            end = int(np.searchsorted(self.columns, first + CHUNK, side="right")) - 1
            end = min(max(end, begin + 1), self.shape[1])
            yield begin, end, first, int(self.columns[end])
            begin = end

    def _indices(self, first: int, last: int) -> np.ndarray:
        """Indices first … last - 1, checked."""
        indices = self._places.part(first, last)
        if not indices.size:
            return np.empty(0, np.int32)
        if not indices.dtype.isnative:
            indices = indices.astype(indices.dtype.newbyteorder("="))
        # A negative number is a large one without its sign: one look instead of two.
        unsigned = indices.view(indices.dtype.str.replace("i", "u"))
        if int(unsigned.max()) >= self._inner:
            raise _lies(f"an index lies outside 0 … {self._inner - 1:,}")
        return indices.astype(np.int32 if self._inner < 2**31 else np.int64, copy=False)


def _shape(shape: Sequence[int] | np.ndarray) -> tuple[int, int]:
    sides = np.asarray(shape)
    if sides.shape != (2,) or sides.dtype.kind not in "iu" or int(sides.min()) < 0:
        raise _lies(f"the shape is {np.array2string(sides, threshold=4)}")
    if int(sides.max()) >= 2**31:
        raise _lies(f"the shape is {int(sides[0]):,} x {int(sides[1]):,}, more than there can be")
    return int(sides[0]), int(sides[1])


def whole_pointers(indptr: Any, stored: int) -> np.ndarray:
    """All of `indptr` as int64, checked."""
    return _checked(whole(indptr), stored, True)


def _checked(starts: np.ndarray, stored: int, from_first: bool) -> np.ndarray:
    """Starts of rows as int64; ValueError unless they rise within 0 … stored."""
    if starts.size and (int(starts.min()) < 0 or int(starts.max()) > stored):
        raise _lies(f"indptr leaves 0 … {stored:,}, the values there are")
    starts = starts.astype(np.int64)
    if (from_first and starts[0] != 0) or (np.diff(starts) < 0).any():
        raise _lies("indptr does not start at 0 or falls")
    return starts


def canonical(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Counts sorted within rows, what occurs twice summed, no zeros. uint32, made only where it has to be."""
    if counts.has_canonical_format:
        if counts.nnz and not counts.data.all():
            counts.eliminate_zeros()
        return counts
    # There and back sorts in linear time; sums may be larger than what uint32 holds.
    wide = sp.csr_matrix((counts.data.astype(np.int64), counts.indices, counts.indptr), counts.shape)
    wide = wide.tocsc().tocsr()
    wide.sum_duplicates()
    wide.eliminate_zeros()
    if wide.nnz and int(wide.data.max()) > MOST:
        raise ValueError(f"counts of one cell and feature, stored in pieces, add up to more than {MOST:,}")
    return sp.csr_matrix((wide.data.astype(np.uint32), wide.indices, wide.indptr), wide.shape)


def _lies(what: str) -> ValueError:
    return ValueError(f"the sparse counts contradict themselves: {what}. The file is damaged; fetch it again")


def matrix_of(node: Any) -> Dense | Sparse:
    """The counts stored at `node`, unread."""
    if isinstance(node, h5py.Dataset | zarr.Array):
        return Dense(node)
    kind = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format"))
    shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
    if kind in ("csr_matrix", "csr", "csc_matrix", "csc") and shape is not None:
        return Sparse(node, str(kind).startswith("csc"), shape)
    raise ValueError(f"counts are stored as {kind!r}; a CSR, CSC or dense matrix is needed")
