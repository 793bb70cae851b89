"""The bound of an ingest: read and decompress X of .h5ad files from first to last, nothing else."""

import sys
from collections.abc import Iterator

import h5py
import numpy as np

from tests.bench.harness.serve import Delivery, serve

CELLS = 4_096


def deliveries(paths: list[str]) -> Iterator[Delivery]:
    for path in paths:
        with h5py.File(path, "r") as file:
            ends = file["X/indptr"][:]
            for first in range(0, len(ends) - 1, CELLS):
                last = min(first + CELLS, len(ends) - 1)
                own = slice(int(ends[first]), int(ends[last]))
                data, indices = file["X/data"][own], file["X/indices"][own]
                assert isinstance(data, np.ndarray)
                yield last - first, len(indices), None


def main() -> None:
    serve(lambda: deliveries(sys.argv[1:]), about=f"{CELLS:,} cells at a time")


if __name__ == "__main__":
    main()
