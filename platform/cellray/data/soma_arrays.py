"""The arrays of TileDB-SOMA: tables of what is known of cells and features, counts by ranges of rows.

Rows go by their joinids, which rise and may leave gaps. Nothing is taken for granted of what comes out of an
array: joinids are looked up before they are used, and no more is kept than was declared.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from cellray.data.formats import decoded, text
from cellray.data.guard import WHOLE
from cellray.data.matrices import CHUNK

JOINID = "soma_joinid"
ARRAY = ("soma_dim_0", "soma_dim_1", "soma_data")
"""Columns of a sparse array: joinids of cell and feature, and the number."""
MOST_ROWS = 4_096
"""Rows of tiles up to which they are read together: more would not fit memory if cells are rich."""
SPARSITY = 4
"""Joinids are asked for as one range if it is at most so many times as long as they are many."""
TRIED = 64
"""Cells whose counts are looked at to tell whether a layer holds counts."""


@contextmanager
def told() -> Iterator[None]:
    """Errors of TileDB, and of Arrow over what it hands out, become OSError, as others' are."""
    import tiledbsoma

    try:
        yield
    except (tiledbsoma.SOMAError, pa.ArrowException) as error:
        raise OSError(str(error)) from error


class Frame:
    """obs or var: what is known of the rows or columns of counts, in the order of their joinids."""

    columns: list[str]
    """Columns but for joinids and names."""

    def __init__(self, frame: Any, name: str, names: Sequence[str]) -> None:
        if frame.soma_type != "SOMADataFrame":
            raise ValueError(f"{name} is a {frame.soma_type}, not a table; the experiment is damaged")
        self._frame, self._name = frame, name
        self.size = int(frame.count)
        if self.size * 8 > WHOLE:
            raise ValueError(f"{name} declares {self.size:,} rows, more than there can be")
        every = list(frame.schema.names)
        self._own = next((column for column in names if column in every), JOINID)
        self.columns = [column for column in every if column not in (JOINID, self._own)]

    @cached_property
    def _in_a_row(self) -> bool:
        """Whether joinids are 0 … size - 1, each once, told without reading them."""
        if tuple(self._frame.index_column_names) != (JOINID,) or not self.size:
            return False
        ((first, last),) = self._frame.non_empty_domain()
        return bool((first, last) == (0, self.size - 1))

    @cached_property
    def _every_id(self) -> np.ndarray:
        """Joinids as they rise, int64 [size]."""
        if self._in_a_row:
            return np.arange(self.size)
        found = np.sort(self._joinids(self._read(JOINID)))
        if (np.diff(found) == 0).any():
            raise ValueError(f"{self._name} has the same {JOINID} more than once; the experiment is damaged")
        return found

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Joinids of rows start … stop - 1, which rise, int64."""
        return np.arange(start, stop) if self._in_a_row else self._every_id[start:stop]

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Which row each of `ids` is, int64. ValueError for one that is none."""
        if self._in_a_row:
            found, there = ids, not ids.size or 0 <= int(ids.min()) <= int(ids.max()) < self.size
        else:
            found = np.searchsorted(self._every_id, ids)
            there = not ids.size or bool((np.append(self._every_id, -1)[found] == ids).all())
        if not there:
            raise ValueError(f"there are counts of a {JOINID} that {self._name} has not; it is damaged")
        return found

    @cached_property
    def names(self) -> np.ndarray:
        return self.column(self._own)

    def column(self, name: str) -> np.ndarray:
        """A column as text, "" for missing values, str [size]."""
        table = self._read(*dict.fromkeys((JOINID, name)))
        ids = self._joinids(table)
        values = _text(table.column(name))
        return values if (np.diff(ids) > 0).all() else values[np.argsort(ids, kind="stable")]

    def _joinids(self, table: pa.Table) -> np.ndarray:
        ids: np.ndarray = table.column(JOINID).to_numpy()
        if ids.dtype != np.int64 or (ids.size and int(ids.min()) < 0):
            raise ValueError(f"{self._name} has a {JOINID} that is no number from 0 on; it is damaged")
        return ids

    def _read(self, *columns: str) -> pa.Table:
        """Some columns of all rows, in any order."""
        tables = [self._frame.schema.empty_table().select(list(columns))]
        size = rows = 0
        for table in self._frame.read(column_names=list(columns)):
            size, rows = size + table.nbytes, rows + len(table)
            if size > WHOLE or rows > self.size:
                raise ValueError(
                    f"{self._name} holds more than its {self.size:,} rows can take: it is damaged"
                )
            tables.append(table.select(list(columns)))
        return pa.concat_tables(tables[1:] or tables)


def _text(values: pa.ChunkedArray) -> np.ndarray:
    """Values as text, "" for missing ones, object."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        parts = [_decoded(chunk) for chunk in values.chunks]
        return np.concatenate(parts) if parts else np.empty(0, object)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        values = values.cast(pa.large_string())
    if not pa.types.is_integer(kind):
        return text(values.to_pandas())
    # Whole numbers with gaps would come as fractions.
    missing = values.is_null().to_numpy()
    return np.where(missing, "", text(values.fill_null(0).to_numpy()))


def _decoded(chunk: pa.DictionaryArray) -> np.ndarray:
    codes = chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return decoded(codes.astype(np.int64), chunk.dictionary.to_pandas().to_numpy())


class Matrix:
    """A layer of X, by the rows of obs and var. Sparse, or dense."""

    by_column = False
    chunk_rows: int
    """Rows of a tile, which is decoded whole for any of them."""

    def __init__(self, array: Any, name: str, cells: Frame, features: Frame) -> None:
        if array.soma_type not in ("SOMASparseNDArray", "SOMADenseNDArray") or array.ndim != 2:
            raise ValueError(f"{name} is no array of cells x features; the experiment is damaged")
        self.shape = (cells.size, features.size)
        if max(self.shape) >= 2**31:
            raise ValueError(f"{name} has {cells.size:,} cells and {features.size:,} features: too many")
        self._array, self._name, self._cells, self._features = array, name, cells, features
        self._sparse = array.soma_type == "SOMASparseNDArray"
        tile = json.loads(array.schema_config_options().dims).get("soma_dim_0", {}).get("tile", 1)
        self.chunk_rows = max(1, min(int(tile), MOST_ROWS))

    @cached_property
    def stored(self) -> int:
        """Numbers stored. Looked up only when asked for: fragments that overlap are read for it."""
        with told():
            return int(self._array.nnz) if self._sparse else self.shape[0] * self.shape[1]

    def some(self) -> np.ndarray:
        """Some of the numbers."""
        ids = self._cells.ids(0, min(TRIED, self.shape[0]))
        if self._sparse:
            return np.concatenate([np.empty(0, np.uint32), *(data for _, _, data in self._entries(ids))])
        return self._slab(ids)

    def rows(self, start: int, stop: int, check: Callable[..., np.ndarray]) -> sp.csr_matrix:
        """Rows start … stop - 1 as CSR, in memory that goes with what they hold."""
        if self._sparse:
            return self._of_sparse(self._cells.ids(start, stop), check)
        step = max(1, CHUNK // max(1, self.shape[1]))
        parts = [sp.csr_matrix((0, self.shape[1]), dtype=np.uint32)]
        for at in range(start, stop, step):
            parts.append(sp.csr_matrix(check(self._slab(self._cells.ids(at, min(at + step, stop))), None)))
        return sp.vstack(parts, format="csr")

    def _of_sparse(self, ids: np.ndarray, check: Callable[..., np.ndarray]) -> sp.csr_matrix:
        rows, columns = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
        data, found = [], 0
        for own, across, values in self._entries(ids):
            found += len(values)
            if found > len(ids) * self.shape[1]:
                raise ValueError(f"{self._name} has more numbers than {len(ids):,} cells can: it is damaged")
            rows.append(own.astype(np.int32))
            columns.append(self._features.places(across).astype(np.int32))
            data.append(values)
        # Each number as a column of its own, turned to rows: sorts by row in linear time, and sums nothing.
        ends = np.arange(found + 1, dtype=np.int32 if found < 2**31 else np.int64)
        marks = np.ones(found, np.int8)
        by_row = sp.csc_matrix((marks, np.concatenate(rows), ends), shape=(len(ids), found)).tocsr()
        order, starts = by_row.indices, by_row.indptr.astype(np.int64)
        counts = np.concatenate(data)[order] if data else np.empty(0, np.uint32)
        return sp.csr_matrix(
            (check(counts, starts), np.concatenate(columns)[order], starts), shape=(len(ids), self.shape[1])
        )

    def _entries(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of the cells `ids`: which of them, which joinid of a feature, the number; a buffer at a time."""
        ids = ids[: np.searchsorted(ids, self._array.shape[0])]
        if not len(ids):
            return
        first, last = int(ids[0]), int(ids[-1])
        wanted = slice(first, last) if last - first < SPARSITY * len(ids) else pa.array(ids)
        for table in self._array.read((wanted,)).tables():
            cells, features, values = (table.column(n).to_numpy() for n in ARRAY)
            at = np.searchsorted(ids, cells)
            own = ids[np.minimum(at, len(ids) - 1)] == cells
            yield (at, features, values) if own.all() else (at[own], features[own], values[own])

    def _slab(self, ids: np.ndarray) -> np.ndarray:
        """Numbers of the cells `ids` of a dense array, [cells, features]."""
        features = self._features.ids(0, self.shape[1])
        found = np.zeros((len(ids), self.shape[1]), self._array.type.to_pandas_dtype())
        if not found.size:
            return found
        width = int(features[-1] - features[0]) + 1
        if width > SPARSITY * len(features) or features[-1] >= self._array.shape[1]:
            raise ValueError(f"{self._name} has not the features of var; the experiment is damaged")
        for first, last in _runs(ids[: np.searchsorted(ids, self._array.shape[0])]):
            across = slice(int(features[0]), int(features[-1]))
            slab = self._array.read((slice(int(ids[first]), int(ids[last - 1])), across)).to_numpy()
            found[first:last] = slab[:, features - features[0]]
        return found


def _runs(ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where `ids` go on without a gap, as ranges of places."""
    ends = [*(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), len(ids)]
    for first, last in zip([0, *ends], ends, strict=False):
        if last > first:
            yield first, last
