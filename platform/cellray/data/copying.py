"""Copying many pieces of memory with one call, compiled with numba."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np


@cache
def _compiled() -> Callable[..., None]:
    """Made at the first use: numba and its compiler take a second and 100 MB, which others need not pay."""
    from numba import njit

    # The C library's own: a loop over bytes takes seven times as long, over words still a third more.
    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    memcpy.restype = ctypes.c_void_p

    @njit(nogil=True)
    def copy(source, firsts, places, sizes, width):  # type: ignore[no-untyped-def]
        for i in range(len(firsts)):
            memcpy(places[i], source + firsts[i] * width, sizes[i] * width)

    return cast(Callable[..., None], copy)


def copy_pieces(source: np.ndarray, firsts: np.ndarray, sizes: np.ndarray, places: np.ndarray) -> None:
    """Copy `source[firsts[i]:][:sizes[i]]` to the address `places[i]`, for every i; other threads go on.

    `source` is one-dimensional and contiguous; the others are int64 [pieces]. That there is room at
    `places` for items of the type of `source`, and that it stays there, is for the caller to see to.
    """
    assert source.ndim == 1
    assert source.flags.c_contiguous
    assert len(firsts) == len(places) == len(sizes)
    if not len(firsts):
        return
    assert min(firsts.min(), sizes.min()) >= 0
    assert (firsts + sizes).max() <= len(source)
    _compiled()(source.ctypes.data, firsts, places, sizes, source.dtype.itemsize)
