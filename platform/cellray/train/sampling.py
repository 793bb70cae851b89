"""Which cells come how often, and how well they are mixed."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from cellray.data.cells import Cells
from cellray.data.shards import ABOUT
from cellray.train.feed import Plan


def balanced(
    cells: Cells | pa.Table,
    by: Sequence[str] = ("dataset", "label", "assay"),
    *,
    power: float = 0.5,
    most: float = 10.0,
) -> np.ndarray:
    """Weights for `Plan`, float32 [cells], 1 on average: cells of rare groups come more often.

    A group is all cells that agree in the columns `by`, "" (unknown) being a value like others. Its
    cells together weigh as its size to the `power`: 1 leaves all as it is, 0 makes all groups
    equal. No cell comes more than `most` times as often as the average one.
    """
    if not 0 <= power <= 1:
        raise ValueError(f"power {power} of a group's size: from 0 (groups alike) to 1 (cells alike)")
    if odd := sorted(set(by) - set(ABOUT)):
        raise ValueError(f"cells cannot be balanced by {odd[0]!r}: there are {', '.join(ABOUT)}")
    group = np.zeros(len(cells), np.int64)
    for name in by:
        codes, size = _codes(cells, name)
        # Numbered anew at each column, lest many columns make too large numbers.
        group = np.unique(group * size + codes, return_inverse=True)[1]
    weight = np.bincount(group).astype(np.float64)[group] ** (power - 1)
    return np.minimum(weight / weight.mean(), most).astype(np.float32)


def _codes(cells: Cells | pa.Table, name: str) -> tuple[np.ndarray, int]:
    found = cells.codes(name) if isinstance(cells, Cells) else None
    if found is None:
        found = pa.chunked_array([cells[name].combine_chunks()]).dictionary_encode().combine_chunks()
    return np.asarray(found.indices.to_numpy()), len(found.dictionary)


def quality(
    plan: Plan, codes: Mapping[str, np.ndarray], *, epoch: int = 0, batches: int = 256
) -> dict[str, dict[str, float]]:
    """How well the batches of an epoch are mixed, beside batches drawn uniformly from the same cells.

    `codes` are what each cell belongs to, int [cells], by name: its label, the chunk of the source
    it came from. For each: `distinct` codes a batch, and the `entropy` of their shares in bits, both as
    means over at most `batches` batches spread over the epoch; `uniform_…`, the same of random
    batches of those sizes; and the ratios, 1 for as good as uniform.
    """
    whole = list(plan.epoch(epoch))
    rows = np.concatenate(whole)
    drawn = np.random.default_rng(plan.seed).permutation(rows)
    ends = np.cumsum([0, *(len(batch) for batch in whole)])
    chosen = np.unique(np.linspace(0, len(whole) - 1, min(batches, len(whole))).round().astype(int))
    found = {}
    for name, code in codes.items():
        size = int(code.max()) + 1
        mine = np.mean([_spread(code[whole[i]], size) for i in chosen], axis=0)
        best = np.mean([_spread(code[drawn[ends[i] : ends[i + 1]]], size) for i in chosen], axis=0)
        found[name] = {
            "distinct": float(mine[0]),
            "uniform_distinct": float(best[0]),
            "distinct_ratio": float(mine[0] / best[0]),
            "entropy": float(mine[1]),
            "uniform_entropy": float(best[1]),
            "entropy_ratio": float(mine[1] / best[1]) if best[1] > 0 else 1.0,
        }
    return found


def _spread(codes: np.ndarray, size: int) -> tuple[int, float]:
    """Distinct codes, and the entropy of their shares in bits."""
    counts = np.bincount(codes, minlength=size)
    share = counts[counts > 0] / len(codes)
    return len(share), float(-(share * np.log2(share)).sum())
