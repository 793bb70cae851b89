"""How this process asks the system for memory."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of settings in glibc's malloc.h."""
LARGEST = 32 << 20
"""Bytes of the largest piece that glibc lets come from the heap."""
KEPT = (1 << 31) - 1
"""Bytes of free memory at the heap's end from which on it is given back: an int's largest, so never."""


def keep() -> bool:
    """Keep memory that was freed for the next use of it; whether this system's C library can.

    A step of training frees hundreds of MB that the next one asks for again. By default they go back
    to the system, and come again page by page, each cleared at its first touch: a seventh of a training's
    CPU time, a tenth of an ingest's. A process keeps its peak instead. For workers of our own alone:
    the memory of a process that others own is theirs to set. Source: mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST) and mallopt(TRIM_THRESHOLD, KEPT))
