"""Compiling loops. Importing this imports numba, which takes most of a second."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numba import njit


def jit(function: Callable[..., Any]) -> Any:
    """`function` compiled when it is first called, and kept on disk for further processes if that can be.

    Other threads go on while it runs. What is divided by zero is infinite, as in numpy: an exception
    would keep loops from being vectorised.
    """
    compiled = partial(njit, function, nogil=True, boundscheck=False, error_model="numpy")
    try:
        return compiled(cache=True)
    except RuntimeError:  # there is no folder that can be written to
        return compiled(cache=False)


def still(*arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays, read-only, whoever lent them: to numba, which compiles for each, that is part of a type."""
    found = [array.view() for array in arrays]
    for array in found:
        array.flags.writeable = False
    return found
