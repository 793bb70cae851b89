"""Stores of synthetic cells that are trained on, written without Ray, made once and kept."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from cellray.data.modalities import ATAC, RNA
from cellray.data.store import ABOUT, Batch, cell_table
from cellray.data.tokens import POOLED, Counts, Tokenizer, Vocabulary
from tests.bench.datalayer.formats import made
from tests.bench.datalayer.synthetic import BLOCK, Cells, Peaks, cell_names, gene_names, peak_names
from tests.stores import write_table

MODALITIES = {m.name: m for m in (RNA, ATAC)}
SHARD = 16_384
"""Cells of a shard."""


def stored(folder: Path, *, cells: int, peaks: int = 0) -> Path:
    """A store of `cells` cells with RNA of 20,000 genes and, where there are `peaks`, as many of ATAC."""
    spec = Cells(cells=cells)
    matrices = {"rna": whole(spec)}
    if peaks:
        matrices["atac"] = whole(Peaks(cells=cells, peaks=peaks, few=peaks, drawn=2_000))

    def write(part: Path) -> None:
        words, counts = ranked(matrices)
        about = {name: [""] * cells for name in ABOUT} | {"dataset": ["a"] * cells}
        about["label"] = [f"type {label}" for label in spec.label(np.arange(cells))]
        present = np.full(cells, (1 << len(matrices)) - 1, np.uint32)
        ids = [f"a:{name}" for name in cell_names(np.arange(cells))]
        write_table(str(part), cell_table(words, ids, about, present, counts), words, SHARD)

    return made(folder / f"train-{cells}-{peaks}", write)


def whole(spec: Cells | Peaks) -> sp.csr_matrix:
    """All cells of it, [cells, features]."""
    return sp.vstack(list(spec.blocks(0, spec.cells)), format="csr")


def ranked(matrices: Mapping[str, sp.csr_matrix]) -> tuple[Tokenizer, dict[str, Counts]]:
    """The tokenizer of some cells and their tokens, from raw counts [cells, features] by modality."""
    vocabularies = {}
    for name, matrix in matrices.items():
        size = matrix.shape[1]
        names = tuple(gene_names(size) if name == "rna" else peak_names(size))
        sums = {POOLED: np.asarray(matrix.sum(axis=0)).ravel().astype(np.int64)}
        nonzero = {POOLED: matrix.getnnz(axis=0).astype(np.int64)}
        cells = {POOLED: matrix.shape[0]}
        vocabularies[name] = Vocabulary(MODALITIES[name], names, ("",) * size, sums, nonzero, cells)
    words = Tokenizer(vocabularies)
    counts = {}
    for name, matrix in matrices.items():
        total = np.asarray(matrix.sum(axis=1)).ravel()
        found = words.rank(name, matrix, total, [""] * matrix.shape[0])
        narrow = np.minimum(found.counts, 65_535).astype(np.uint16)
        counts[name] = Counts(found.offsets, found.ids, narrow, found.total)
    return words, counts


def batch(*, cells: int, genes: int, nonzero: int) -> tuple[Tokenizer, Batch]:
    """Some cells with RNA alone that count exactly `nonzero` genes each, and their tokenizer."""
    assert cells <= BLOCK
    drawn = Cells(cells=BLOCK, genes=genes, nonzero=1.3 * nonzero).block(0).tolil()
    random = np.random.default_rng(0)
    rows, columns, counts = [], [], []
    for row in range(cells):
        at, values = np.array(drawn.rows[row]), np.array(drawn.data[row])
        kept = np.sort(random.permutation(len(at))[:nonzero])
        at, values = at[kept], values[kept]
        if len(at) < nonzero:  # a shallow cell: more genes with one count each
            more = random.permutation(np.setdiff1d(np.arange(genes), at))[: nonzero - len(at)]
            at, values = np.append(at, more), np.append(values, np.ones(len(more)))
        rows += [row] * nonzero
        columns += at.tolist()
        counts += values.tolist()
    words, found = ranked({"rna": sp.csr_matrix((np.array(counts), (rows, columns)), (cells, genes))})
    return words, Batch(np.arange(cells), found, np.ones(cells, np.uint32))
