"""Loops over the tokens of sparse counts, compiled with numba. Beside each stands a reference in the tests.

Counts come as CSR arrays: `indptr` int64 [cells + 1], `ids` int32 [tokens] rising within a cell,
`counts` uint32 [tokens]. Only ingest imports this: numba takes most of a second, and compiling two.
"""

import numpy as np

from cellray.data.jit import jit, still
from cellray.data.qc import STEPS, SURPRISE, TELLING, Metrics
from cellray.data.tokens import narrow


@jit
def _by_id(items, spare, n, bits, passes):  # type: ignore[no-untyped-def]
    """`items[:n]` sorted by their upper halves, and the other array: a stable radix sort from below."""
    table = np.empty(1 << bits, np.int32)
    mask = np.uint64((1 << bits) - 1)
    for p in range(passes):
        shift = np.uint64(32 + p * bits)
        table[:] = 0
        for j in range(n):
            table[(items[j] >> shift) & mask] += 1
        start = 0
        for z in range(len(table)):
            here = table[z]
            table[z] = start
            start += here
        for j in range(n):
            item = items[j]
            z = (item >> shift) & mask
            spare[table[z]] = item
            table[z] += 1
        items, spare = spare, items
    return items, spare


@jit
def _longest(indptr):  # type: ignore[no-untyped-def]
    most = 0
    for i in range(len(indptr) - 1):
        most = max(most, indptr[i + 1] - indptr[i])
    return most


_DIGIT = 10
"""Bits of a product sorted by at a time. Small tables: a cell has as few tokens as these have entries."""


@jit
def _ranked(offsets, ids, counts, rows, target, base, weights, assay, top, shift, out):  # type: ignore[no-untyped-def]
    out_offsets, out_ids, out_counts = out
    most = _longest(offsets)
    one = np.empty(most, np.uint64)
    other = np.empty(most, np.uint64)
    own_ids = np.empty(most, out_ids.dtype)
    own_counts = np.empty(most, counts.dtype)
    low = np.empty(1 << _DIGIT, np.int32)
    high = np.empty(1 << _DIGIT, np.int32)
    mask = np.uint64((1 << _DIGIT) - 1)
    to_low = np.uint64(32) + shift
    to_high = to_low + np.uint64(_DIGIT)
    filled = 0
    for i in range(len(rows)):
        mine = target[base[i] :]
        weight = weights[assay[i]]
        low[:] = 0
        high[:] = 0
        n = 0
        for j in range(offsets[rows[i]], offsets[rows[i] + 1]):
            to = mine[ids[j]]
            if to >= 0:
                ratio = np.float32(counts[j]) * weight[to]
                item = np.uint64(top - np.float32(ratio).view(np.uint32)) << np.uint64(32) | np.uint64(n)
                low[(item >> to_low) & mask] += 1
                high[(item >> to_high) & mask] += 1
                one[n] = item
                own_ids[n] = to
                own_counts[n] = counts[j]
                n += 1
        below, beneath = 0, 0
        for z in range(1 << _DIGIT):
            here = low[z]
            low[z] = below
            below += here
            here = high[z]
            high[z] = beneath
            beneath += here
        for j in range(n):
            z = (one[j] >> to_low) & mask
            other[low[z]] = one[j]
            low[z] += 1
        for j in range(n):
            z = (other[j] >> to_high) & mask
            one[high[z]] = other[j]
            high[z] += 1
        _settle(one, n)
        for j in range(n):
            at = one[j] & np.uint64(0xFFFFFFFF)
            out_ids[filled + j] = own_ids[at]
            out_counts[filled + j] = own_counts[at]
        filled += n
        out_offsets[i + 1] = filled


@jit
def _settle(items, n):  # type: ignore[no-untyped-def]
    """Sort `items[:n]`, which are in order but for their low bits: by insertion, as few are out of place.

    Where many are, because the weights of features are all but equal, by a sort like any other.
    """
    moves = 0
    for j in range(1, n):
        item = items[j]
        if item > items[j - 1]:
            continue
        k = j
        while k > 0 and items[k - 1] > item:
            items[k] = items[k - 1]
            k -= 1
        items[k] = item
        moves += j - k
        if moves > n:
            items[:n].sort()
            return


def ranked(
    offsets: np.ndarray,
    ids: np.ndarray,
    counts: np.ndarray,
    weights: np.ndarray,
    assay: np.ndarray,
    *,
    rows: np.ndarray | None = None,
    target: np.ndarray | None = None,
    base: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, ids and counts of each cell by falling count x weight; ties keep id order.

    `weights` is float32 [assays, features], positive; `assay` the row of it for each cell, int64. The
    product is taken in float32. Positive floats sort as their bits do: by two digits of the bits that
    products differ in, then by insertion. Only the cells `rows`, in that order, if they are given; with
    feature f under the id `target[f]`, -1 leaving it out: targets that are not -1 must rise. Cells of
    several files have `target[base + f]`, with the `base` of each, int64 [rows]. Ids and counts may be
    of any unsigned or signed type, no count is 0.
    """
    rows = np.arange(len(offsets) - 1) if rows is None else rows
    target = np.arange(weights.shape[1], dtype=np.int32) if target is None else target
    assert base is not None or rising(target), "targets do not rise"
    base = np.zeros(len(rows), np.int64) if base is None else base
    # No product is below the first of these or above the second; counts are 1 or more.
    ends = np.array([weights.min(initial=1), np.float32(counts.max(initial=1)) * weights.max(initial=1)])
    least, top = ends.astype(np.float32).view(np.uint32)
    shift = np.uint64(max(0, int(top - least).bit_length() - 2 * _DIGIT))
    tokens = int((offsets[rows + 1] - offsets[rows]).sum())
    found = np.zeros(len(rows) + 1, np.int64)
    out_ids, out_counts = np.empty(tokens, narrow(weights.shape[1])), np.empty(tokens, counts.dtype)
    given = still(offsets, ids, counts, rows, target, base, weights, assay)
    _ranked(*given, top, shift, (found, out_ids, out_counts))
    return found, out_ids[: found[-1]], out_counts[: found[-1]]


def rising(target: np.ndarray) -> bool:
    """Whether the entries of `target` that are not -1 rise."""
    return bool((np.diff(target[target >= 0]) > 0).all())


@jit
def _projected(indptr, ids, counts, target, bits, passes, out_indptr, out_ids, out_counts):  # type: ignore[no-untyped-def]
    most = _longest(indptr)
    one = np.empty(most, np.uint64)
    other = np.empty(most, np.uint64)
    filled = 0
    for i in range(len(indptr) - 1):
        n = 0
        sorted_already = True
        last = np.int64(-1)
        for j in range(indptr[i], indptr[i + 1]):
            to = np.int64(target[ids[j]])
            if to < 0 or counts[j] == 0:
                continue
            if to <= last:
                sorted_already = False
            last = to
            one[n] = (np.uint64(to) << np.uint64(32)) | np.uint64(counts[j])
            n += 1
        if not sorted_already:
            one, other = _by_id(one, other, n, bits, passes)
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
    digits = max(1, int(target.max(initial=0)).bit_length())
    passes = -(-digits // 11)
    out_indptr = np.zeros(len(indptr), np.int64)
    out_ids, out_counts = np.empty(len(ids), np.int32), np.empty(len(ids), np.uint32)
    bits = -(-digits // passes)
    given = still(indptr, ids, counts, target)
    filled = _projected(*given, bits, passes, out_indptr, out_ids, out_counts)
    if filled < 0:
        raise ValueError("columns of one feature add up to more than 4,294,967,295 in a cell: no counts")
    return out_indptr, out_ids[:filled], out_counts[:filled]


@jit
def _measured(indptr, ids, counts, target, hashes, mito, offsets, out_ids, out_counts, cells):  # type: ignore[no-untyped-def]
    depth, features, mitochondrial, digest = cells
    filled = 0
    for i in range(len(indptr) - 1):
        first = filled
        for j in range(indptr[i], indptr[i + 1]):
            to = target[ids[j]]
            if to >= 0:
                out_ids[filled] = to
                out_counts[filled] = counts[j]
                filled += 1
        total = np.int64(0)
        among = np.int64(0)
        mixed = np.uint64(0)
        for j in range(first, filled):
            count = np.int64(out_counts[j])
            total += count
            among += count * mito[out_ids[j]]
            word = hashes[out_ids[j]] + np.uint64(count) * np.uint64(0x9E3779B97F4A7C15)
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed += word ^ (word >> np.uint64(31))
        if filled - first < TELLING:
            # A single count is a nat, larger ones are more: only cells of few features need to be summed.
            told = 0
            for j in range(first, filled):
                count = np.int64(out_counts[j])
                told += SURPRISE[count] if count < len(SURPRISE) else SURPRISE[-1]
            if told < TELLING * STEPS:
                mixed = np.uint64(0)
        depth[i] = total
        features[i] = filled - first
        mitochondrial[i] = among
        digest[i] = mixed
        offsets[i + 1] = filled


def measured(
    indptr: np.ndarray,
    ids: np.ndarray,
    counts: np.ndarray,
    target: np.ndarray,
    hashes: np.ndarray,
    mito: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Metrics]:
    """Offsets, ids and counts in narrow types, and the metrics of each cell.

    Feature f becomes `target[f]`; -1 leaves it out, equal targets are summed. `hashes` (`name_hashes`)
    and `mito` say of each feature that it may become what its name hashes to, uint64, and whether it is
    mitochondrial, bool. Counts without zeros, ids rising within a cell.

    The digest of a cell is the sum of a mixed hash of every (feature, count): the order of the columns
    plays no part, so a cell has the same digest in two files. It is 0 for a cell that says too little
    for equality to mean anything: the chance that another cell of the same composition has the same
    counts is taken to be that of independent Poisson counts with the cell's own as their means, and
    has to be below exp(-TELLING).
    Source: Steele 2014, splitmix64 (the finaliser), doi:10.1145/2660193.2660195.
    """
    if not rising(target):
        indptr, ids, counts = projected(indptr, ids, counts, target)
        target = np.arange(len(hashes), dtype=np.int32)
    most = int(counts.max(initial=0))
    width = np.uint8 if most < 1 << 8 else np.uint16 if most < 1 << 16 else np.uint32
    size = len(indptr) - 1
    offsets = np.zeros(size + 1, np.int64)
    out_ids, out_counts = np.empty(len(ids), narrow(len(hashes))), np.empty(len(ids), width)
    depth, among, digest = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, np.uint64)
    cells = depth, np.zeros(size, np.int32), among, digest
    given = still(indptr, ids, counts, target, hashes, mito.astype(np.uint8))
    _measured(*given, offsets, out_ids, out_counts, cells)
    metrics = Metrics(counts=depth, features=cells[1], mito=among, digest=digest)
    return offsets, out_ids[: offsets[-1]], out_counts[: offsets[-1]], metrics


@jit
def tally(indptr, ids, counts, group, sums, nonzero):  # type: ignore[no-untyped-def]
    """Add the cells to `sums` and `nonzero`, int64 [groups, features]; cells of group -1 are left out."""
    for i in range(len(indptr) - 1):
        if group[i] < 0:
            continue
        for j in range(indptr[i], indptr[i + 1]):
            sums[group[i], ids[j]] += counts[j]
            nonzero[group[i], ids[j]] += 1


@jit
def sums(offsets, values):  # type: ignore[no-untyped-def]
    """Sum of each ragged row of `values`, int64 [rows]."""
    found = np.empty(len(offsets) - 1, np.int64)
    for i in range(len(found)):
        total = np.int64(0)
        for j in range(offsets[i], offsets[i + 1]):
            total += np.int64(values[j])
        found[i] = total
    return found


@jit
def _taken(offsets, ids, counts, rows, out_offsets, out_ids, out_counts):  # type: ignore[no-untyped-def]
    filled = 0
    for k in range(len(rows)):
        for j in range(offsets[rows[k]], offsets[rows[k] + 1]):
            out_ids[filled] = ids[j]
            out_counts[filled] = counts[j]
            filled += 1
        out_offsets[k + 1] = filled


def taken(
    offsets: np.ndarray, ids: np.ndarray, counts: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ragged `rows`, in that order."""
    tokens = int((offsets[rows + 1] - offsets[rows]).sum())
    out = np.zeros(len(rows) + 1, np.int64), np.empty(tokens, ids.dtype), np.empty(tokens, counts.dtype)
    _taken(*still(offsets, ids, counts, rows), *out)
    return out


@jit
def known(offsets, ids, rows, target, base):  # type: ignore[no-untyped-def]
    """Which of the ragged `rows` have a feature f with a `target[base + f]` that is not -1, bool [rows]."""
    found = np.zeros(len(rows), np.bool_)
    for i in range(len(rows)):
        for j in range(offsets[rows[i]], offsets[rows[i] + 1]):
            if target[base[i] + ids[j]] >= 0:
                found[i] = True
                break
    return found
