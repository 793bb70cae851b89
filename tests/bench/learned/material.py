"""The simulated cells that models learn from, their token store, and the same cells wrongly paired."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellray.data.modalities import BUILT_IN
from cellray.data.store import ABOUT, Store, cell_table
from cellray.data.tokens import POOLED, Tokenizer, Vocabulary
from cellray.data.truth import (
    MODALITIES,
    Simulated,
    Simulation,
    cells_of,
    gene_ids,
    peak_ids,
    protein_ids,
)
from tests import stores

SHARD = 1024
"""Cells of a shard."""
UNLABELLED = "atac"
"""The data set whose files name no label, as `cellray.data.simulate` writes them."""


@dataclass(frozen=True)
class Material:
    """Cells in store order, and what is held out of them."""

    simulation: Simulation
    store: Store
    """With the pairs as they were measured."""
    test: np.ndarray
    """Held-out cells, bool [cells]."""

    @cached_property
    def cells(self) -> Simulated:
        return in_order(self.simulation)

    @cached_property
    def labels(self) -> np.ndarray:
        """Cell types as the store has them, text [cells], "" where unknown."""
        return np.where(self.cells.dataset == UNLABELLED, "", self.cells.cell_type)

    @cached_property
    def totals(self) -> dict[str, np.ndarray]:
        """Modality -> depth, [cells]."""
        return {m: np.asarray(c.sum(axis=1)).ravel() for m, c in self.cells.counts.items()}

    def measured(self, *modalities: str) -> np.ndarray:
        """Cells in which all of `modalities` are measured, bool [cells]."""
        bits = sum(1 << MODALITIES.index(m) for m in modalities)
        return (self.cells.present & bits) == bits

    @cached_property
    def frame(self) -> pd.DataFrame:
        """What `cellray.tasks` asks of the cells."""
        c = self.cells
        columns = {"cell_id": cell_ids(c), "dataset": c.dataset, "donor": c.donor, "batch": c.batch}
        return pd.DataFrame(columns | {"label": self.labels, "test": self.test})


def in_order(simulation: Simulation) -> Simulated:
    """All cells of a simulation in the order of the store: at random, as ingest leaves them."""
    cells = cells_of(simulation, 0, simulation.cells)
    return cells.take(np.random.default_rng([simulation.seed, 3]).permutation(len(cells)))


def cell_ids(cells: Simulated) -> list[str]:
    return [f"{d}:{n}" for d, n in zip(cells.dataset, cells.names, strict=True)]


def tokenizer_of(cells: Simulated, simulation: Simulation) -> Tokenizer:
    """Vocabularies of all features, with the statistics of every assay."""
    ids = {"rna": gene_ids(simulation), "atac": peak_ids(simulation), "protein": protein_ids(simulation)}
    found = {}
    for bit, modality in enumerate(BUILT_IN):
        has = (cells.present >> bit) & 1 == 1
        groups = {POOLED: has} | {str(a): has & (cells.assay == a) for a in np.unique(cells.assay[has])}
        parts = {name: cells.counts[modality.name][inside] for name, inside in groups.items()}
        found[modality.name] = Vocabulary(
            modality,
            tuple(ids[modality.name]),
            ("",) * len(ids[modality.name]),
            {name: np.asarray(part.sum(axis=0)).ravel().astype(np.int64) for name, part in parts.items()},
            {name: np.asarray((part > 0).sum(axis=0)).ravel() for name, part in parts.items()},
            {name: part.shape[0] for name, part in parts.items()},
        )
    return Tokenizer(found)


def write(folder: Path, simulation: Simulation) -> dict[str, Any]:
    """Share of the cells with RNA and a modality that got another cell's, for each modality.

    FOLDER/true and FOLDER/shuffled hold the same cells in the same order, with one tokenizer.

    In the second one, ATAC and protein of cells with RNA are those of `partners`. No Ray.
    """
    cells = in_order(simulation)
    tokenizer = tokenizer_of(cells, simulation)
    wrong = shuffled(cells, seed=simulation.seed)
    for name, some in (("true", cells), ("shuffled", wrong)):
        target = folder / name
        if not (target / "store.json").exists():
            stores.write_table(str(target), table_of(some, tokenizer), tokenizer, SHARD)
    return {"moved": {m: float(np.mean(moves(cells, m, simulation.seed))) for m in MODALITIES[1:]}}


def table_of(cells: Simulated, tokenizer: Tokenizer) -> "stores.pa.Table":
    """The rows of the store."""
    assays = cells.assay.astype(str).tolist()
    counts = {}
    for name in tokenizer.vocabularies:
        matrix: sp.csr_matrix = cells.counts[name].tocsr()
        depth = np.asarray(matrix.sum(axis=1)).ravel()
        counts[name] = tokenizer.rank(name, matrix, depth, assays)
    about: dict[str, list[str]] = {name: [""] * len(cells) for name in ABOUT}
    about |= {name: getattr(cells, name).astype(str).tolist() for name in ("dataset", "donor", "batch")}
    about |= {"assay": assays, "species": ["human"] * len(cells)}
    about["label"] = np.where(cells.dataset == UNLABELLED, "", cells.cell_type).tolist()
    return cell_table(tokenizer, cell_ids(cells), about, cells.present.astype(np.uint32), counts)


def shuffled(cells: Simulated, *, seed: int) -> Simulated:
    """The same cells, each with ATAC and protein of others of its kind; RNA stays."""
    wrong = {m: cells.counts[m][partners(cells, m, seed)] for m in MODALITIES[1:]}
    return replace(cells, counts=cells.counts | wrong)


def partners(cells: Simulated, modality: str, seed: int) -> np.ndarray:
    """Whose `modality` each cell gets, int64 [cells]: of the same data set, donor and type.

    A permutation of the cells that have RNA and `modality`. Each gets another cell's, but for those that
    are alone with their data set, donor and type; all other cells keep their own.
    """
    rng = np.random.default_rng([seed, 4, MODALITIES.index(modality)])
    both = np.flatnonzero((cells.present & 1) & (cells.present >> MODALITIES.index(modality)) & 1)
    kind = pd.DataFrame({name: getattr(cells, name)[both] for name in ("dataset", "donor", "cell_type")})
    found = np.arange(len(cells))
    for inside in kind.groupby(list(kind)).indices.values():
        ring = rng.permutation(both[inside])
        found[ring] = np.roll(ring, 1)
    return found


def moves(cells: Simulated, modality: str, seed: int) -> np.ndarray:
    """Of the cells with RNA and `modality`: which ones get another cell's, bool."""
    both = (cells.present & 1) & (cells.present >> MODALITIES.index(modality)) & 1 == 1
    return (partners(cells, modality, seed) != np.arange(len(cells)))[both]
