"""webdataset: tar files in random order through a shuffle buffer, packed a batch at a time."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset as wds  # type: ignore[import-not-found]

from tests.bench.harness.serve import Delivery, serve

CELLS = 1_024
BUFFER = 8_192


class Tars:
    """Passes over the files, each with a seed of its own."""

    def __init__(self, folder: str) -> None:
        self.paths = sorted(str(path) for path in Path(folder).glob("*.tar"))
        self.seed = 0

    def deliveries(self) -> Iterator[Delivery]:
        self.seed += 1
        stream = wds.WebDataset(self.paths, shardshuffle=len(self.paths), seed=self.seed, empty_check=False)
        keys: list[str] = []
        cells: list[np.ndarray] = []
        for cell in stream.shuffle(BUFFER, initial=BUFFER):
            keys.append(cell["__key__"])
            cells.append(np.frombuffer(cell["bin"], np.uint16).reshape(2, -1))
            if len(cells) == CELLS:
                yield len(keys), packed(cells).shape[1], keys
                keys, cells = [], []
        if cells:
            yield len(keys), packed(cells).shape[1], keys


def packed(cells: list[np.ndarray]) -> np.ndarray:
    """Genes and counts of all cells of a batch, [2, tokens]."""
    return np.concatenate(cells, axis=1)


def main() -> None:
    tars = Tars(sys.argv[1])
    about = f"shuffle buffer of {BUFFER:,}"
    serve(tars.deliveries, origins=lambda keys: [int(key) for key in keys], about=about)


if __name__ == "__main__":
    main()
