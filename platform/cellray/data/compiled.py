"""Loops over the tokens of sparse counts, compiled with numba. Beside each stands a reference in the tests.

Counts come as CSR arrays: `indptr` int64 [cells + 1], `ids` int32 [tokens] rising within a cell,
`counts` uint32 [tokens]. Compiling takes about a second a process, so only ingest imports this.
"""

import numpy as np
from numba import njit

from cellray.data.tokens import narrow

ID_BITS = 11
"""Bits of a feature id sorted by at a time."""


def _sorter(bits: int, passes: int):  # type: ignore[no-untyped-def]
    """A stable radix sort by the upper halves of items, `bits` bits a pass from below.

    Made for constants, so that the compiler unrolls what goes over the passes.
    """
    size = 1 << bits
    mask = np.uint64(size - 1)

    @njit(nogil=True, boundscheck=False)
    def sort(items, spare, n, tables):  # type: ignore[no-untyped-def]
        """`items[:n]` sorted, and the other array. `tables` is scratch, int32 [passes, 2**bits]."""
        tables[:] = 0
        for j in range(n):
            key = items[j] >> np.uint64(32)
            for p in range(passes):
                tables[p, (key >> np.uint64(p * bits)) & mask] += 1
        for p in range(passes):
            start = 0
            for z in range(size):
                here = tables[p, z]
                tables[p, z] = start
                start += here
        for p in range(passes):
            shift = np.uint64(32 + p * bits)
            for j in range(n):
                item = items[j]
                z = (item >> shift) & mask
                place = tables[p, z]
                tables[p, z] = place + 1
                spare[place] = item
            items, spare = spare, items
        return items, spare

    return sort


_by_ratio = _sorter(8, 4)
"""A ratio has 31 bits. Four small tables: a cell has as few tokens as a large table entries."""
_by_id = _sorter(ID_BITS, 3)
_by_small_id = _sorter(ID_BITS, 2)


@njit(nogil=True, boundscheck=False)
def _longest(indptr):  # type: ignore[no-untyped-def]
    most = 0
    for i in range(len(indptr) - 1):
        most = max(most, indptr[i + 1] - indptr[i])
    return most


@njit(nogil=True, boundscheck=False)
def _ranked(offsets, ids, counts, rows, target, weights, assay, out_offsets, out_ids, out_counts):  # type: ignore[no-untyped-def]
    most = _longest(offsets)
    one = np.empty(most, np.uint64)
    other = np.empty(most, np.uint64)
    tables = np.empty((4, 256), np.int32)
    filled = 0
    for i in range(len(rows)):
        first = offsets[rows[i]]
        n = 0
        for j in range(offsets[rows[i] + 1] - first):
            to = target[ids[first + j]]
            if to >= 0:
                ratio = np.float32(counts[first + j]) * weights[assay[i], to]
                falling = np.uint32(0x7FFFFFFF) - np.float32(ratio).view(np.uint32)
                one[n] = (np.uint64(falling) << np.uint64(32)) | np.uint64(j)
                n += 1
        one, other = _by_ratio(one, other, n, tables)
        for j in range(n):
            at = first + np.int64(one[j] & np.uint64(0xFFFFFFFF))
            out_ids[filled + j] = target[ids[at]]
            out_counts[filled + j] = counts[at]
        filled += n
        out_offsets[i + 1] = filled


def ranked(
    offsets: np.ndarray,
    ids: np.ndarray,
    counts: np.ndarray,
    weights: np.ndarray,
    assay: np.ndarray,
    *,
    rows: np.ndarray | None = None,
    target: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, ids and counts of each cell by falling count x weight; ties keep id order.

    `weights` is float32 [assays, features], positive; `assay` the row of it for each cell, int64.
    The product is taken in float32. Positive floats sort as their bits do. Only the cells `rows`,
    in that order, if they are given; with feature f under the id `target[f]`, -1 leaving it out:
    targets that are not -1 must rise. Ids and counts may be of any unsigned or signed type.
    """
    rows = np.arange(len(offsets) - 1) if rows is None else rows
    target = np.arange(weights.shape[1], dtype=np.int32) if target is None else target
    assert (np.diff(target[target >= 0]) > 0).all(), "targets do not rise"
    tokens = int((offsets[rows + 1] - offsets[rows]).sum())
    found = np.zeros(len(rows) + 1, np.int64)
    out_ids, out_counts = np.empty(tokens, narrow(weights.shape[1])), np.empty(tokens, counts.dtype)
    _ranked(offsets, ids, counts, rows, target, weights, assay, found, out_ids, out_counts)
    return found, out_ids[: found[-1]], out_counts[: found[-1]]


@njit(nogil=True, boundscheck=False)
def _projected(indptr, ids, counts, target, small, out_indptr, out_ids, out_counts):  # type: ignore[no-untyped-def]
    most = _longest(indptr)
    one = np.empty(most, np.uint64)
    other = np.empty(most, np.uint64)
    tables = np.empty((3, 1 << ID_BITS), np.int32)
    filled = 0
    for i in range(len(indptr) - 1):
        n = 0
        rising = True
        last = np.int64(-1)
        for j in range(indptr[i], indptr[i + 1]):
            to = np.int64(target[ids[j]])
            if to < 0 or counts[j] == 0:
                continue
            if to <= last:
                rising = False
            last = to
            one[n] = (np.uint64(to) << np.uint64(32)) | np.uint64(counts[j])
            n += 1
        if not rising:
            if small:
                one, other = _by_small_id(one, other, n, tables)
            else:
                one, other = _by_id(one, other, n, tables)
        before = filled
        for j in range(n):
            to = np.int64(one[j] >> np.uint64(32))
            count = np.uint32(one[j] & np.uint64(0xFFFFFFFF))
            if filled > before and out_ids[filled - 1] == to:
                if np.uint64(out_counts[filled - 1]) + np.uint64(count) > np.uint64(0xFFFFFFFF):
                    return -1
                out_counts[filled - 1] += count
            else:
                out_ids[filled] = to
                out_counts[filled] = count
                filled += 1
        out_indptr[i + 1] = filled
    return filled


def projected(
    indptr: np.ndarray, ids: np.ndarray, counts: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CSR arrays with feature f moved to `target[f]`; -1 leaves it out, equal targets are summed.

    Without zeros, ids rising within a cell. ValueError for a sum that is no uint32.
    """
    small = int(target.max(initial=0)) < 1 << 2 * ID_BITS
    out_indptr = np.zeros(len(indptr), np.int64)
    out_ids, out_counts = np.empty(len(ids), np.int32), np.empty(len(ids), np.uint32)
    filled = _projected(indptr, ids, counts, target, small, out_indptr, out_ids, out_counts)
    if filled < 0:
        raise ValueError("columns of one feature add up to more than 4,294,967,295 in a cell: no counts")
    return out_indptr, out_ids[:filled], out_counts[:filled]


@njit(nogil=True, boundscheck=False)
def tally(indptr, ids, counts, group, sums, nonzero):  # type: ignore[no-untyped-def]
    """Add the cells to `sums` and `nonzero`, int64 [groups, features]; cells of group -1 are left out."""
    for i in range(len(indptr) - 1):
        if group[i] < 0:
            continue
        for j in range(indptr[i], indptr[i + 1]):
            sums[group[i], ids[j]] += counts[j]
            nonzero[group[i], ids[j]] += 1


@njit(nogil=True, boundscheck=False)
def sums(offsets, values):  # type: ignore[no-untyped-def]
    """Sum of each ragged row of `values`, int64 [rows]."""
    found = np.empty(len(offsets) - 1, np.int64)
    for i in range(len(found)):
        total = np.int64(0)
        for j in range(offsets[i], offsets[i + 1]):
            total += np.int64(values[j])
        found[i] = total
    return found


@njit(nogil=True, boundscheck=False)
def placed(offsets, values, starts, out):  # type: ignore[no-untyped-def]
    """Copy ragged row i of `values` to `out`, from `starts[i]` on."""
    for i in range(len(starts)):
        to = starts[i]
        for j in range(offsets[i], offsets[i + 1]):
            out[to] = values[j]
            to += 1
