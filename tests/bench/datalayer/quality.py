"""How well batches are shuffled: whether cells that lay together in the source still come together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Quality:
    """Means over batches, and what batches drawn uniformly would have."""

    distinct: float
    """Source chunks that a batch has cells of."""
    uniform_distinct: float
    entropy: float
    """Of the labels in a batch, in nats."""
    uniform_entropy: float

    @property
    def share(self) -> float:
        """The worse of both, 1 for batches as good as uniform ones."""
        return min(self.distinct / self.uniform_distinct, self.entropy / self.uniform_entropy)


def quality(
    batches: Sequence[np.ndarray] | Sequence[Sequence[int]],
    *,
    cells: int,
    label: Callable[[np.ndarray], np.ndarray],
) -> Quality:
    """Of batches of source rows below `cells`.

    There are as many source chunks as a batch has cells, or as few as leave four cells in each: with
    fewer and larger ones, batches that are far from uniform would look well.
    """
    sizes = [len(batch) for batch in batches]
    chunks = max(1, min(int(np.median(sizes)), cells // 4))
    random = np.random.default_rng(0)
    drawn = [random.choice(cells, size, replace=False) for size in sizes for _ in range(8)]
    found = _of([np.asarray(batch) for batch in batches], cells, chunks, label)
    uniform = _of(drawn, cells, chunks, label)
    return Quality(found[0], uniform[0], found[1], uniform[1])


def _of(
    batches: Sequence[np.ndarray], cells: int, chunks: int, label: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """Mean number of distinct chunks, mean entropy of labels."""
    distinct = [len(np.unique(batch * chunks // cells)) for batch in batches]
    entropies = []
    for batch in batches:
        share = np.unique(label(batch), return_counts=True)[1] / len(batch)
        entropies.append(float(-(share * np.log(share)).sum()))
    return float(np.mean(distinct)), float(np.mean(entropies))
