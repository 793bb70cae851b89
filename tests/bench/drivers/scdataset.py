"""scDataset over .h5ad files as they are: blocks of rows in random order, many batches fetched at once."""

import sys
from collections.abc import Iterator

import h5py
import numpy as np
from anndata.io import sparse_dataset
from scdataset import BlockShuffling, scDataset  # type: ignore[import-not-found]

from tests.bench.harness.serve import Delivery, serve

CELLS = 1_024
BLOCK = 16
FETCH = 16


class Fetched:
    """Rows of one fetch: counts and where they come from. Indexable, as scDataset cuts batches out of it."""

    def __init__(self, counts, rows) -> None:
        self.counts, self.rows = counts, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, picked) -> "Fetched":
        return Fetched(self.counts[picked], self.rows[picked])


def deliveries(counts) -> Iterator[Delivery]:
    dataset = scDataset(
        Fetched(counts, np.arange(counts.shape[0])),
        BlockShuffling(block_size=BLOCK),
        batch_size=CELLS,
        fetch_factor=FETCH,
        fetch_callback=lambda data, rows: Fetched(data.counts[rows], np.asarray(rows)),
    )
    for batch in dataset:
        yield len(batch), batch.counts.nnz, batch.rows


def main() -> None:
    with h5py.File(sys.argv[1], "r") as file:
        counts = sparse_dataset(file["X"])
        about = f"blocks of {BLOCK}, {FETCH} batches a fetch; CSR rows"
        serve(lambda: deliveries(counts), origins=lambda rows: rows, window=FETCH, about=about)


if __name__ == "__main__":
    main()
