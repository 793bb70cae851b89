"""Our feed over a store: shuffled batches of 1,024 cells, all tokens, every modality."""

import sys
from collections.abc import Iterator

import numpy as np

from cellray import heap
from cellray.data.store import Store
from cellray.train.feed import Feed, Plan
from tests.bench.datalayer.synthetic import source_rows
from tests.bench.harness.serve import Delivery, serve

CELLS = 1_024
WINDOW = 16
"""Record batches that are mixed: as many cells as the competitors have at hand."""


class Bare:
    """Passes over a store, each with a seed of its own."""

    def __init__(self, url: str) -> None:
        self.store = Store(url)
        lengths = [self.store.lengths(name) for name in self.store.tokenizer.vocabularies]
        self.lengths = np.sum(lengths, axis=0)
        self.seed = 0
        self.sources: np.ndarray | None = None

    def deliveries(self) -> Iterator[Delivery]:
        plan = Plan(
            starts=self.store.starts,
            lengths=self.lengths,
            eligible=np.ones(len(self.store), bool),
            seed=self.seed,
            epochs=1,
            tokens=1 << 50,
            cells=CELLS,
            window=WINDOW,
        )
        self.seed += 1
        with Feed(self.store, plan, first=0, rank=0, world=1) as feed:
            for share in feed:
                yield share.cells, share.tokens, share.batch.rows.copy()

    def origins(self, rows: np.ndarray) -> np.ndarray:
        """Source rows of the cells at `rows` of the store."""
        if self.sources is None:
            self.sources = source_rows(self.store.cells["cell_id"].to_pylist())
        return self.sources[rows]


def main() -> None:
    heap.keep()  # as workers of a training do
    bare = Bare(sys.argv[1])
    serve(bare.deliveries, origins=bare.origins, window=WINDOW, about=f"window of {WINDOW} record batches")


if __name__ == "__main__":
    main()
