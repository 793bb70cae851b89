"""What models read, from the counts that a store holds: rank tokens, value bins, continuous values.

All from the same stored batch, for any modality, vectorised over its cells. Raw counts need no
encoding: `Counts.counts`.
"""

from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np

from cellray.data.modalities import scaled
from cellray.data.tokens import Counts

PAD = -1
"""What stands where a cell has no more tokens."""
SMALL = 256
"""Counts below this are ranked by a histogram; the few others by sorting."""


def prefix(counts: Counts, length: int) -> Counts:
    """The first `length` tokens of each cell: those that rank highest, as a store has them in rank order."""
    lengths = np.minimum(counts.lengths, length)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    first = np.arange(len(counts.ids)) - np.repeat(counts.offsets[:-1], counts.lengths) < length
    return Counts(offsets, counts.ids[first], counts.counts[first], counts.total)


def rank_ids(counts: Counts, length: int) -> np.ndarray:
    """Feature ids of each cell by rank, int32 [cells, length], padded with PAD.

    Source: Theodoris 2023, doi:10.1038/s41586-023-06139-9, for what a rank is see `Tokenizer.rank`.
    """
    found = np.full((len(counts), length), PAD, np.int32)
    found[np.arange(length) < np.minimum(counts.lengths, length)[:, None]] = prefix(counts, length).ids
    return found


def values(counts: Counts, scale: str) -> np.ndarray:
    """Counts as continuous values, float32 [tokens]: log1p(CP10k) or log1p, as `Modality.scale` says.

    CP10k is of the depth over all features of the modality, those outside the vocabulary too.
    """
    return scaled(counts.counts, np.repeat(counts.total, counts.lengths), scale)


def bins(counts: Counts, bins: int = 51) -> np.ndarray:
    """The bin of each count among the non-zero counts of its cell, uint8 or uint16 [tokens], 1 … bins - 1.

    Bin 0 is for zeros, which are no tokens. The edges are the quantiles 0, 1/(bins-2), … 1 of the
    cell's counts, interpolated linearly; a count is in the bin that begins with the last edge at or
    below it. So a cell's largest count is in bin `bins - 1`, alone with its ties, and its smallest
    in bin 1 unless there are many of it: equal counts share the highest bin that is open to
    them. A cell with one token, or one distinct count, has all in bin `bins - 1`.

    No edge needs to be known: that at rank h is at or below a count v if and only if at least
    ceil(h) + 1 counts are. So the bin follows from how many counts of the cell are at most v, from a
    histogram. A monotone scale, such as log1p of counts per million, moves no count to another bin;
    so raw counts are binned. Ranks h = k (n - 1) / (bins - 2) are taken exactly, where floating point
    puts some just above a whole number.
    Source: Cui 2024, scGPT, doi:10.1038/s41592-024-02201-0; there ties are spread over their bins at
    random, here they stay together.
    """
    if bins < 3:
        raise ValueError(f"{bins} bins: at least 3 are needed, one of them for zeros")
    found = np.empty(len(counts.counts), np.uint8 if bins <= 256 else np.uint16)
    _binned()(counts.offsets, np.ascontiguousarray(counts.counts), bins, found)
    return found


@cache
def _binned() -> Callable[..., None]:
    """Compiled at the first use, which takes a second."""
    from numba import njit

    @njit(nogil=True)
    def binned(offsets, counts, bins, found):  # type: ignore[no-untyped-def]
        # Four histograms, as most counts are 1: one would wait for its own last addition.
        seen = np.zeros((4, SMALL), np.int32)
        table = np.zeros(SMALL, found.dtype)
        for i in range(len(offsets) - 1):
            first, last = offsets[i], offsets[i + 1]
            n = last - first
            if n < 2:
                found[first:last] = bins - 1
                continue
            seen[:] = 0
            large = 0
            for j in range(first, last):
                if counts[j] < SMALL:
                    seen[j & 3, counts[j]] += 1
                else:
                    large += 1
            most = 0
            for v in range(SMALL):
                here = seen[0, v] + seen[1, v] + seen[2, v] + seen[3, v]
                if here:
                    most += here
                    # The edges k = 0 … bins - 2 at or below: k (n - 1) <= (most - 1) (bins - 2).
                    table[v] = (most - 1) * (bins - 2) // (n - 1) + 1
            if large:
                above = np.empty(large, counts.dtype)
                k = 0
                for j in range(first, last):
                    if counts[j] >= SMALL:
                        above[k] = counts[j]
                        k += 1
                above.sort()
            for j in range(first, last):
                if counts[j] < SMALL:
                    found[j] = table[counts[j]]
                else:
                    rank = most + np.searchsorted(above, counts[j], side="right")
                    found[j] = (rank - 1) * (bins - 2) // (n - 1) + 1

    return cast(Callable[..., None], binned)
