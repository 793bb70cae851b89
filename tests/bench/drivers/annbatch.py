"""annbatch over its own shuffled, sharded zarr: CSR rows, or with our tokenizer on top.

python -m tests.bench.drivers.annbatch make COLLECTION H5AD …
python -m tests.bench.drivers.annbatch read COLLECTION [STORE]
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import zarr
from annbatch import DatasetCollection, Loader  # type: ignore[import-not-found]

from cellray.data.tokens import Tokenizer
from tests.bench.harness.serve import Delivery, serve

CELLS = 1_024
CHUNK, PRELOAD = 256, 64
"""Rows read at a time, and how many such are shuffled among each other: 16,384 cells."""


def make(folder: Path, files: list[str]) -> None:
    """Its own format, by its own function, as it comes but for a memory it can do with here."""
    collection = DatasetCollection(str(folder))
    collection.add_adatas(files, dataset_size="3GB", rng=np.random.default_rng(0))


class Rows:
    """Passes over a collection."""

    def __init__(self, folder: str, tokenizer: Tokenizer | None) -> None:
        self.tokenizer, self.seed = tokenizer, 0
        self.collection = DatasetCollection(folder, mode="r")
        names = [ad.io.read_elem(group["obs"]).index for group in self.collection]
        self.sources = np.array([int(name[1:]) for index in names for name in index])

    def deliveries(self) -> Iterator[Delivery]:
        self.seed += 1
        loader = Loader(
            chunk_size=CHUNK,
            preload_nchunks=PRELOAD,
            batch_size=CELLS,
            shuffle=True,
            return_index=True,
            preload_to_gpu=False,
            rng=np.random.default_rng(self.seed),
        )
        loader.use_collection(self.collection, load_adata=_counts)
        for batch in loader:
            counts = batch["X"]
            if self.tokenizer:
                total = np.asarray(counts.sum(1)).ravel()
                self.tokenizer.rank("rna", counts, total, [""] * counts.shape[0])
            yield counts.shape[0], counts.nnz, batch["index"]

    def origins(self, index: np.ndarray) -> np.ndarray:
        return self.sources[np.asarray(index)]


def _counts(group: zarr.Group) -> ad.AnnData:
    """Counts alone: other columns would only slow it down."""
    return ad.AnnData(X=ad.io.sparse_dataset(group["X"]))


def main() -> None:
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1})
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), sys.argv[3:])
        return
    tokenizer = None
    if len(sys.argv) > 3:
        from cellray.data.store import Store

        tokenizer = Store(sys.argv[3]).tokenizer
    rows = Rows(sys.argv[2], tokenizer)
    about = f"zarrs, chunks of {CHUNK}, {PRELOAD} at a time" + (
        ", our tokenizer" if tokenizer else "; CSR rows"
    )
    serve(rows.deliveries, origins=rows.origins, window=CHUNK * PRELOAD // CELLS, about=about)


if __name__ == "__main__":
    main()
