"""Encodings of the same counts: ours, compiled over CSR, loops over cells, as published and lean, a bound.

python -m tests.bench.drivers.encodings WAY STORE CELLS
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp

from cellray.data import encodings
from cellray.data.store import Store
from cellray.data.tokens import Counts, Tokenizer
from tests.bench.harness.serve import Delivery, serve

BINS = 51


def rank(tokenizer: Tokenizer, matrix: sp.csr_matrix, counts: Counts) -> Any:
    return tokenizer.rank("rna", matrix, counts.total, [""] * matrix.shape[0])


def rank_loop(tokenizer: Tokenizer, matrix: sp.csr_matrix, counts: Counts) -> Any:
    """Scale the matrix, then take each row of it and sort.

    Source: the tokenizer of Theodoris 2023, doi:10.1038/s41586-023-06139-9, step by step.
    """
    means = tokenizer.vocabularies["rna"].means("")
    scaled = matrix.multiply(1e4 / counts.total[:, None]).multiply(1 / means).tocsr()
    found = []
    for i in range(scaled.shape[0]):
        cell = scaled[i]
        found.append(cell.indices[np.argsort(-cell.data)])
    return found


def rank_lean(tokenizer: Tokenizer, matrix: sp.csr_matrix, counts: Counts) -> Any:
    """The same loop without what it need not do, and ties in gene order: our result."""
    means = tokenizer.vocabularies["rna"].means("")
    found = []
    for first, last in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
        genes = matrix.indices[first:last]
        found.append(genes[np.argsort(-(matrix.data[first:last] / means[genes]), kind="stable")])
    return found


class Packed:
    """A rank's bound: numpy's own sort, cell by cell, of keys that were made before it is measured.

    Keys are made once, of the first counts that come. Each time they are copied, as they are sorted in
    place, which takes a hundredth of the time.
    """

    def __init__(self) -> None:
        self.keys: np.ndarray | None = None

    def __call__(self, tokenizer: Tokenizer, matrix: sp.csr_matrix, counts: Counts) -> np.ndarray:
        """The keys of all tokens in rank order, uint64 [tokens]; genes are their lower halves."""
        if self.keys is None:
            self.keys = keys(tokenizer, matrix)
            self.cuts = list(itertools.pairwise(matrix.indptr.tolist()))
            self.room = np.empty_like(self.keys)
        self.room[:] = self.keys
        for first, last in self.cuts:
            self.room[first:last].sort()
        return self.room


def keys(tokenizer: Tokenizer, matrix: sp.csr_matrix) -> np.ndarray:
    """A number for each count that is smaller for what ranks higher, uint64 [tokens]."""
    weight = tokenizer.weights("rna", [""])[0][0]
    product = matrix.data.astype(np.float32) * weight[matrix.indices]
    # Positive floats sort as their bits do.
    falling = np.uint64(0xFFFFFFFF) - product.view(np.uint32)
    return (falling << np.uint64(32)) | matrix.indices.astype(np.uint64)


def bins(tokenizer: Tokenizer, matrix: sp.csr_matrix, counts: Counts) -> Any:
    return encodings.bins(counts, BINS)


def bins_loop(tokenizer: Tokenizer, matrix: sp.csr_matrix, counts: Counts) -> Any:
    """Cut the values of each dense row at their quantiles, one of the bins it touches at random.

    Source: the binning of Cui 2024, doi:10.1038/s41592-024-02201-0, step by step.
    """
    random, edges = np.random.default_rng(0), np.linspace(0, 1, BINS - 1)
    dense = matrix.toarray()
    found = np.zeros(dense.shape, np.int64)
    for row, into in zip(dense, found, strict=True):
        at = row.nonzero()
        values = row[at]
        cuts = np.quantile(values, edges)
        low, high = np.digitize(values, cuts), np.digitize(values, cuts, right=True)
        into[at] = np.ceil(random.random(len(values)) * (high - low) + low)
    return found


def bins_lean(tokenizer: Tokenizer, matrix: sp.csr_matrix, counts: Counts) -> Any:
    """The same loop over the counts alone, without chance: our result."""
    edges = np.linspace(0, 1, BINS - 1)
    found = []
    for first, last in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
        values = matrix.data[first:last]
        found.append(np.digitize(values, np.quantile(values, edges)))
    return found


WAYS: dict[str, Callable[[Tokenizer, sp.csr_matrix, Counts], Any]] = {
    "rank": rank,
    "rank_loop": rank_loop,
    "rank_lean": rank_lean,
    "rank_bound": Packed(),
    "bins": bins,
    "bins_loop": bins_loop,
    "bins_lean": bins_lean,
}


def main() -> None:
    way, store, cells = WAYS[sys.argv[1]], Store(sys.argv[2]), int(sys.argv[3])
    counts = store.read(np.arange(min(cells, len(store)))).counts["rna"]
    matrix = counts.matrix(len(store.tokenizer.vocabularies["rna"]))
    matrix.sort_indices()
    tokenizer = store.tokenizer

    def deliveries() -> Iterator[Delivery]:
        way(tokenizer, matrix, counts)
        yield len(counts), matrix.nnz, None

    serve(deliveries, about=f"{len(counts):,} cells in memory")


if __name__ == "__main__":
    main()
