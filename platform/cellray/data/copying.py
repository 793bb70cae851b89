"""Copying many pieces of memory with one call, compiled. Importing this imports numba."""

from typing import Any

import numpy as np
from numba import types

from cellray.data.jit import jit, still

# The C library's own: a loop over bytes takes seven times as long, over words still a third more. By its
# name, not its address, so that what is compiled can be kept on disk; addresses are numbers here.
_memcpy: Any = types.ExternalFunction("memcpy", types.uint64(types.uint64, types.uint64, types.uint64))


@jit
def _copy(source, firsts, sizes, places, width):  # type: ignore[no-untyped-def]
    for i in range(len(firsts)):
        begin = source + firsts[i] * width
        _memcpy(np.uint64(places[i]), np.uint64(begin), np.uint64(sizes[i] * width))


@jit
def _widen(source, firsts, sizes, places, room, begins, ends, high):  # type: ignore[no-untyped-def]
    for i in range(len(firsts)):
        own = source[firsts[i] : firsts[i] + sizes[i]]
        for j in range(len(own)):  # (numba vectorises this, and no other way to say it)
            room[j] = own[j]
        for k in range(begins[i], ends[i]):
            place = high[k] >> np.uint64(32)
            assert place < np.uint64(sizes[i])
            room[place] = high[k] & np.uint64(0xFFFFFFFF)
        _memcpy(np.uint64(places[i]), np.uint64(room.ctypes.data), np.uint64(sizes[i] * room.itemsize))


def copy_pieces(source: np.ndarray, firsts: np.ndarray, sizes: np.ndarray, places: np.ndarray) -> None:
    """Copy `source[firsts[i]:][:sizes[i]]` to the address `places[i]`, for every i; other threads go on.

    `source` is one-dimensional and contiguous; the others are int64 [pieces]. That there is room at
    `places` for items of the type of `source`, and that it stays there, is for the caller to see to.
    """
    if len(firsts):
        _check(source, firsts, sizes, places)
        _copy(source.ctypes.data, firsts, sizes, places, source.dtype.itemsize)


def widen_pieces(
    source: np.ndarray,
    firsts: np.ndarray,
    sizes: np.ndarray,
    places: np.ndarray,
    width: np.dtype,
    high: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """`copy_pieces` of bytes as numbers of the type `width`, but for those that are too large for a byte.

    These are in `high`: for each piece where they begin and end, and what `shards.parted` makes of them.
    """
    if not len(firsts):
        return
    _check(source, firsts, sizes, places)
    begins, ends, values = high
    assert begins.min() >= 0
    assert ends.max() <= len(values)
    room = np.empty(sizes.max(), width)  # a piece is put together where it stays in the cache
    _widen(*still(source), firsts, sizes, places, room, begins, ends, *still(values))


def _check(source: np.ndarray, firsts: np.ndarray, sizes: np.ndarray, places: np.ndarray) -> None:
    assert source.ndim == 1
    assert source.flags.c_contiguous
    assert len(firsts) == len(places) == len(sizes)
    assert min(firsts.min(), sizes.min()) >= 0
    assert (firsts + sizes).max() <= len(source)
