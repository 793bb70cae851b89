"""Encodings of the same counts: ours, compiled over CSR, and loops over cells, as published and lean."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp

from cellray.data import encodings
from cellray.data.store import Store
from cellray.data.tokens import Counts, Tokenizer
from tests.bench.harness.serve import Delivery, serve

CELLS = 2_048
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
    "bins": bins,
    "bins_loop": bins_loop,
    "bins_lean": bins_lean,
}


def main() -> None:
    way, store = WAYS[sys.argv[1]], Store(sys.argv[2])
    counts = store.read(np.arange(min(CELLS, len(store)))).counts["rna"]
    matrix = counts.matrix(len(store.tokenizer.vocabularies["rna"]))
    matrix.sort_indices()
    tokenizer = store.tokenizer

    def deliveries() -> Iterator[Delivery]:
        way(tokenizer, matrix, counts)
        yield len(counts), matrix.nnz, None

    serve(deliveries, about=f"{CELLS:,} cells in memory")


if __name__ == "__main__":
    main()
