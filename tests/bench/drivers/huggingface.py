"""Hugging Face datasets: random rows of a memory-mapped Arrow file, a batch of indices at a time.

python -m tests.bench.drivers.huggingface FILE numpy|arrow
"""

import sys
from collections.abc import Iterator

import numpy as np
from datasets import Dataset  # type: ignore[import-not-found]

from tests.bench.harness.serve import Delivery, serve

CELLS = 1_024


class Rows:
    """Passes over the file, each in another global order."""

    def __init__(self, path: str, form: str) -> None:
        self.dataset = Dataset.from_file(path).with_format(form)
        self.packed = {"numpy": _from_numpy, "arrow": _from_arrow}[form]
        self.random = np.random.default_rng(0)

    def deliveries(self) -> Iterator[Delivery]:
        order = self.random.permutation(len(self.dataset))
        for first in range(0, len(order), CELLS):
            batch = self.dataset[order[first : first + CELLS]]
            ids, counts = (self.packed(batch, name) for name in ("ids", "counts"))
            assert len(ids) == len(counts)
            yield len(batch["row"]), len(ids), batch["row"]


def _from_numpy(batch, name: str) -> np.ndarray:
    """Tokens of a batch, packed, out of an array a cell: what the documentation offers for arrays."""
    return np.concatenate(batch[name])


def _from_arrow(batch, name: str) -> np.ndarray:
    """Tokens of a batch, packed, as they lie in the Arrow table: the quickest way there is."""
    return batch[name].combine_chunks().flatten().to_numpy()


def main() -> None:
    path, form = sys.argv[1:]
    rows = Rows(path, form)
    serve(rows.deliveries, origins=np.asarray, about=f"{form} format, a batch of indices")


if __name__ == "__main__":
    main()
