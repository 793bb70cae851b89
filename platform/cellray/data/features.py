"""From a file's columns to the vocabulary: what is counted, the frozen statistics, the feature map."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp

from cellray.data.modalities import Modality
from cellray.data.tokens import POOLED, Vocabulary


def merge_columns(counts: sp.csr_matrix, target: np.ndarray, size: int) -> sp.csr_matrix:
    """`counts` with column c moved to `target[c]`, [rows, size].

    Columns with the same target are summed; those with target -1 are left out. Canonical, without zeros.
    """
    moved = target[counts.indices]
    keep = moved >= 0
    before = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])
    data = counts.data[keep].astype(np.int64)
    merged = sp.csr_matrix((data, moved[keep], before[counts.indptr]), shape=(counts.shape[0], size))
    if not merged.has_sorted_indices:
        merged = merged.tocsc().tocsr()  # there and back sorts in linear time, four times faster
    merged.sum_duplicates()
    merged.eliminate_zeros()
    return merged


@dataclass
class Tally:
    """Exact statistics of the features of one file and modality; adding is in any order the same."""

    size: int
    """Features."""
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    """Assay -> sum of counts, int64 [features]."""
    nonzero: dict[str, np.ndarray] = field(default_factory=dict)
    """Assay -> cells with a count, int64 [features]."""
    cells: dict[str, int] = field(default_factory=dict)
    """Assay -> cells."""

    def add(self, assay: str, sums: np.ndarray, nonzero: np.ndarray, cells: int) -> None:
        if assay not in self.sums:
            self.sums[assay], self.nonzero[assay] = np.zeros((2, self.size), np.int64)
            self.cells[assay] = 0
        self.sums[assay] += sums
        self.nonzero[assay] += nonzero
        self.cells[assay] += cells

    def update(self, other: "Tally") -> None:
        """Add what another one holds of the same features."""
        for assay in other.sums:
            self.add(assay, other.sums[assay], other.nonzero[assay], other.cells[assay])


def vocabulary(
    modality: Modality,
    features: Sequence[np.ndarray],
    symbols: Sequence[np.ndarray],
    tallies: Sequence[Tally],
    min_cells: int,
) -> Vocabulary:
    """The vocabulary of one modality over files: features counted in at least `min_cells`, sorted.

    Item i of each sequence is of file i: names, second names, statistics. A feature's second name
    is the first that is not empty, files in order. ValueError if no feature is left.
    """
    ids = np.unique(np.concatenate(features).astype(str)) if features else np.empty(0, str)
    places = [np.searchsorted(ids, own.astype(str)) for own in features]
    second = np.full(len(ids), "", object)
    for place, own in zip(places, symbols, strict=True):
        fresh = (second[place] == "") & (own != "")
        second[place[fresh]] = own[fresh]
    whole = Tally(len(ids))
    for place, part in zip(places, tallies, strict=True):
        for assay in part.sums:
            for name in {assay, POOLED}:
                whole.add(
                    name,
                    _spread(part.sums[assay], place, len(ids)),
                    _spread(part.nonzero[assay], place, len(ids)),
                    part.cells[assay],
                )
    if POOLED not in whole.sums:
        whole.add(POOLED, np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64), 0)
    keep = np.flatnonzero(whole.nonzero[POOLED] >= max(min_cells, 1))
    if not len(keep):
        raise ValueError(
            f"{modality.name}: no feature is counted in {max(min_cells, 1):,} cells or more "
            f"({whole.cells[POOLED]:,} cells are kept). Lower ingest.min_cells, look at "
            f"ingest.drop_labels and modalities.{modality.name}.min_features, or leave the modality out."
        )
    return Vocabulary(
        modality,
        tuple(map(str, ids[keep])),
        tuple(map(str, second[keep])),
        {assay: sums[keep] for assay, sums in whole.sums.items()},
        {assay: cells[keep] for assay, cells in whole.nonzero.items()},
        whole.cells,
    )


def _spread(values: np.ndarray, place: np.ndarray, size: int) -> np.ndarray:
    spread = np.zeros(size, np.int64)
    spread[place] = values
    return spread


def targets(features: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Vocabulary index of each feature name, -1 for those it lacks, int32 [features]. Ids only."""
    ids = np.array(vocabulary.ids)
    place = np.minimum(np.searchsorted(ids, features.astype(str)), len(ids) - 1)
    return np.where(ids[place] == features.astype(str), place, -1).astype(np.int32)
