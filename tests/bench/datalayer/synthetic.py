"""Synthetic cells as sparse and as skewed as real ones, the same on every machine, quick to make.

A cell is a number of draws (UMIs) from its label's distribution over genes, so that a few genes have
many counts and most have one or none. Cells come in blocks, each from its own random numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

BLOCK = 256
"""Cells drawn at a time; a whole number of blocks lies in every file."""
FILE = 204_800
"""Most cells of one file."""
DRAWS = 1 << 20
"""Entries of the table that turns a random number into a gene."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """RNA of `cells` cells, ordered by label, as in an atlas that is put together of sorted parts."""

    cells: int
    genes: int = 20_000
    nonzero: float = 1_661.0
    """Mean number of genes counted in a cell."""
    labels: int = 24
    seed: int = 1

    def label(self, rows: np.ndarray) -> np.ndarray:
        """Label of each row; a label is one run of rows, a whole number of blocks."""
        blocks = -(-self.cells // BLOCK)
        return rows // BLOCK * self.labels // blocks

    @cached_property
    def _tables(self) -> list[np.ndarray]:
        """For each label, DRAWS genes, each as often as it is frequent."""
        random = np.random.Generator(np.random.SFC64([self.seed, 0]))
        common = random.lognormal(0.0, 1.6, self.genes)
        found = []
        for _ in range(self.labels):
            weight = common * random.lognormal(0.0, 0.5, self.genes)
            edges = np.cumsum(weight / weight.sum())
            found.append(np.searchsorted(edges, (np.arange(DRAWS) + 0.5) / DRAWS).astype(np.uint16))
        return found

    @cached_property
    def _depth(self) -> float:
        """Median number of UMIs that makes the mean number of genes `nonzero`."""
        share = np.bincount(self._tables[0], minlength=self.genes) / DRAWS
        relative = np.exp(0.5 * np.linspace(-2.2, 2.2, 23))
        weight = np.exp(-0.5 * np.linspace(-2.2, 2.2, 23) ** 2)
        low, high = 1.0, 1e6
        for _ in range(40):
            middle = (low * high) ** 0.5
            genes = [(1 - np.exp(-middle * r * share)).sum() for r in relative]
            low, high = (middle, high) if np.average(genes, weights=weight) < self.nonzero else (low, middle)
        return low

    def block(self, number: int) -> sp.csr_matrix:
        """Counts of cells number * BLOCK …, [BLOCK or the rest, genes], float32, indices sorted."""
        first = number * BLOCK
        size = min(BLOCK, self.cells - first)
        random = np.random.Generator(np.random.SFC64([self.seed, 1, number]))
        depth = np.maximum(random.lognormal(np.log(self._depth), 0.5, size), 1).astype(np.int64)
        table = self._tables[int(self.label(np.array([first]))[0])]
        genes = table[random.integers(0, DRAWS, int(depth.sum()), dtype=np.uint32)]
        drawn = np.bincount(
            genes + np.repeat(np.arange(size) * self.genes, depth), minlength=size * self.genes
        )
        # Every gene is in some cell, so that a vocabulary made of any number of cells has them all.
        every = np.arange(self.genes)
        own = every[(every % self.cells >= first) & (every % self.cells < first + size)]
        drawn[(own % self.cells - first) * self.genes + own] += 1
        at = np.flatnonzero(drawn)
        ends = np.searchsorted(at, np.arange(size + 1) * self.genes)
        columns = (at % self.genes).astype(np.int32)
        return sp.csr_matrix((drawn[at].astype(np.float32), columns, ends), (size, self.genes))

    @property
    def files(self) -> list[tuple[int, int]]:
        """First and last row of each file."""
        return [(first, min(first + FILE, self.cells)) for first in range(0, self.cells, FILE)]

    def blocks(self, first: int, last: int) -> Iterator[sp.csr_matrix]:
        """The blocks from row `first` on, up to row `last`."""
        return (self.block(number) for number in range(first // BLOCK, -(-last // BLOCK)))


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """ATAC of `cells` cells: the same tokens whatever the number of peaks, spread over all of them."""

    cells: int
    peaks: int
    """A multiple of `few`, or some are in no cell."""
    drawn: int = 3_000
    """Fragments drawn for a cell; some fall into one peak."""
    few: int = 120_000
    """Peaks that tokens are drawn from, before they are spread."""
    seed: int = 2

    def block(self, number: int) -> sp.csr_matrix:
        """As `Cells.block`."""
        size = min(BLOCK, self.cells - number * BLOCK)
        random = np.random.Generator(np.random.SFC64([self.seed, number]))
        drawn = np.sort(random.integers(0, self.few, (size, self.drawn), dtype=np.int32), axis=1)
        fresh = np.diff(drawn, axis=1, prepend=-1) > 0
        ends = np.concatenate([[0], np.cumsum(fresh.sum(1))])
        counts = np.diff(np.append(np.flatnonzero(fresh), fresh.size)).astype(np.float32)
        step = self.peaks // self.few
        columns = drawn[fresh] * step + random.integers(0, step, int(ends[-1]), dtype=np.int32)
        return sp.csr_matrix((counts, columns, ends), (size, self.peaks))

    def blocks(self, first: int, last: int) -> Iterator[sp.csr_matrix]:
        return (self.block(number) for number in range(first // BLOCK, -(-last // BLOCK)))


def gene_names(genes: int) -> list[str]:
    return [f"ENSG{i:011d}" for i in range(genes)]


def peak_names(peaks: int) -> list[str]:
    """As many peaks on 22 chromosomes, 500 bases each, none overlapping."""
    each = -(-peaks // 22)
    return [f"chr{i // each + 1}:{i % each * 2000 + 100}-{i % each * 2000 + 600}" for i in range(peaks)]


def write_h5ad(
    path: Path,
    blocks: Iterator[sp.csr_matrix],
    names: list[str],
    rows: np.ndarray,
    labels: np.ndarray,
) -> int:
    """Write an .h5ad with raw counts in X, CSR, gzip; the number of non-zeros. One block is in memory."""
    import anndata as ad  # which drivers that only want `source_rows` need not wait for

    obs = pd.DataFrame({"label": np.char.add("type ", labels.astype(str))}, index=cell_names(rows))
    part = path.with_suffix(".part")
    ad.AnnData(obs=obs, var=pd.DataFrame(index=pd.Index(names))).write_h5ad(part)
    ends = [np.zeros(1, np.int64)]
    with h5py.File(part, "r+") as file:
        if "X" in file:
            del file["X"]
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        group.attrs["shape"] = np.array([len(rows), len(names)])
        settings = {"chunks": (1 << 17,), "maxshape": (None,), "compression": "gzip", "compression_opts": 4}
        data = group.create_dataset("data", (0,), np.float32, **settings)
        indices = group.create_dataset("indices", (0,), np.int32, **settings)
        for block in blocks:
            first = int(ends[-1][-1])
            for dataset, values in ((data, block.data), (indices, block.indices)):
                dataset.resize((first + len(values),))
                dataset[first:] = values
            ends.append(first + block.indptr[1:].astype(np.int64))
        group.create_dataset("indptr", data=np.concatenate(ends))
    part.rename(path)
    return int(ends[-1][-1])


def cell_names(rows: np.ndarray) -> pd.Index:
    """Names of the cells of source rows; `source_rows` is the way back."""
    return pd.Index([f"c{row}" for row in rows])


def source_rows(ids: list[str]) -> np.ndarray:
    """Source rows of cells by their names, data set or not, int64 [cells]."""
    return np.array([name.rpartition("c")[2] for name in ids], np.int64)
