"""Compiling loops. Importing this imports numba, which takes most of a second."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit


def jit(function: Callable[..., Any]) -> Any:
    """`function` compiled when it is first called, and kept on disk for further processes if that can be.

    Other threads go on while it runs.
    """
    try:
        return njit(nogil=True, boundscheck=False, cache=True)(function)
    except RuntimeError:  # there is no folder that can be written to
        return njit(nogil=True, boundscheck=False)(function)


def still(*arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays, read-only, whoever lent them: to numba, which compiles for each, that is part of a type."""
    found = [array.view() for array in arrays]
    for array in found:
        array.flags.writeable = False
    return found
