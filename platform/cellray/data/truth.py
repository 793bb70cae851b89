"""Cells with known truth: the model that `simulate` writes an atlas from, in memory.

A cell has a type and, hidden within the type, a continuous state. Both drive RNA (negative
binomial), ATAC (Bernoulli) and protein (negative binomial); the state shows weakly in RNA and
strongly in the others, so a model that has seen pairs knows it better than one that has not.
Nuisance programmes move RNA alone. Types come in pairs of siblings that are hard to tell apart.

Every BLOCK cells have a random stream of their own, so memory does not grow with the atlas and
the first n cells of a simulation are the cells of the same simulation with `cells=n`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

BLOCK = 2048
"""Cells drawn from one random stream."""
MODALITIES = ("rna", "atac", "protein")
RNA, ATAC, PROTEIN = 1, 2, 4
"""Bits of `present`, in the order of MODALITIES."""
ASSAYS = ("10x 3' v3", "10x 5' v2")
DATASETS: dict[str, tuple[int, ...]] = {
    "multiome": (RNA | ATAC,) * 10 + (RNA, ATAC),
    "cite": (RNA | PROTEIN,) * 9 + (RNA,),
    "tea": (RNA | ATAC | PROTEIN,) * 6 + (RNA, ATAC, PROTEIN, RNA | ATAC, RNA | PROTEIN, ATAC | PROTEIN),
    "rna": (RNA,) * 4,
    "atac": (ATAC,) * 2,
}
"""What is measured in the cells of each data set; of 40 cells in a row, one takes each place."""
PLACES = [(name, present) for name, bits in DATASETS.items() for present in bits]
BATCHES = 2
"""Batches of each data set. In `cite` the second one is of the second assay; all of `rna` is."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What is simulated."""

    cells: int = 6000
    """Cells of all data sets together."""
    genes: int = 1000
    """Genes."""
    peaks: int = 2000
    """ATAC peaks."""
    proteins: int = 24
    """Surface proteins."""
    types: int = 8
    """Cell types; 2i and 2i + 1 are siblings."""
    donors: int = 5
    """Donors of each data set; no donor is in two."""
    depth: float = 800.0
    """Median RNA counts of a cell."""
    accessible: float = 0.1
    """Share of the peaks that is open in a median cell."""
    state: float = 1.0
    """Strength of the within-type state in every modality; 0 takes it away."""
    nuisance: int = 56
    """Programmes that move RNA alone, each stronger there than the state. Telling the state from
    them takes labels or another modality: 50 principal components lose most of it."""
    technical: float = 1.0
    """Strength of assay, batch and donor effects; 0 takes them away."""
    group: int = 16
    """Blocks of 2,048 cells after which further cells go to new data sets, with donors of their own."""
    seed: int = 0
    """Of every random thing."""

    def __post_init__(self) -> None:
        least = {"cells": len(PLACES), "genes": 10, "peaks": 10, "proteins": 1, "types": 1, "donors": 1}
        for name, low in (least | {"group": 1, "seed": 0, "nuisance": 0}).items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if self.types > 50:
            raise ValueError(f"types is {self.types}; there are names for at most 50")
        if self.depth <= 0 or not 0 < self.accessible < 0.9:
            raise ValueError(
                f"depth is {self.depth} and accessible {self.accessible}; depth must be above 0, "
                "accessible between 0 and 0.9"
            )
        if self.state < 0 or self.technical < 0:
            raise ValueError(f"state is {self.state}, technical {self.technical}; neither may be below 0")


@dataclass(frozen=True)
class Simulated:
    """Cells and their truth; every array is [cells], counts are [cells, features]."""

    names: np.ndarray
    """Cell names, unique over the whole simulation."""
    dataset: np.ndarray
    cell_type: np.ndarray
    state: np.ndarray
    """The hidden within-type state, float32: uniform, mean 0, standard deviation 1."""
    donor: np.ndarray
    batch: np.ndarray
    assay: np.ndarray
    present: np.ndarray
    """Bitmask of what is measured, bit i for MODALITIES[i]; never 0."""
    counts: dict[str, sp.csr_matrix]
    """Modality -> raw counts, int32. A cell without the modality has an empty row."""

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: np.ndarray) -> "Simulated":
        """The cells at `rows`, in that order."""
        arrays: dict[str, Any] = {name: getattr(self, name)[rows] for name in _ARRAYS}
        return Simulated(**arrays, counts={name: c[rows] for name, c in self.counts.items()})

    def obs(self) -> pd.DataFrame:
        """What the files say of the cells."""
        columns = {name: getattr(self, name) for name in ("cell_type", "batch", "donor", "assay")}
        return pd.DataFrame(columns | {"species": "human"}, index=pd.Index(self.names))


_ARRAYS = ("names", "dataset", "cell_type", "state", "donor", "batch", "assay", "present")


def gene_ids(simulation: Simulation) -> list[str]:
    return [f"ENSG{i + 1:011d}" for i in range(simulation.genes)]


def peak_ids(simulation: Simulation) -> list[str]:
    """Peaks of 500 bases, spread over 22 chromosomes in order."""
    share = -(-simulation.peaks // 22)
    starts = [(i // share + 1, 100 + i % share * 1000) for i in range(simulation.peaks)]
    return [f"chr{chromosome}:{start}-{start + 500}" for chromosome, start in starts]


def protein_ids(simulation: Simulation) -> list[str]:
    return [f"CD{i + 1:03d}" for i in range(simulation.proteins)]


def gene_programmes(simulation: Simulation) -> dict[str, list[str]]:
    """Name -> the genes that each nuisance programme moves, as a .gmt file would have them."""
    moved, genes = _responses(simulation)["rna"].nuisance != 0, gene_ids(simulation)
    return {f"PROGRAMME{i + 1}": [genes[g] for g in np.flatnonzero(row)] for i, row in enumerate(moved)}


def type_names(simulation: Simulation) -> list[str]:
    """Cell types; those of the same letter are siblings."""
    return [f"type {chr(65 + i // 2)}{i % 2 + 1}" for i in range(simulation.types)]


def cells_of(simulation: Simulation, first: int, last: int) -> Simulated:
    """Cells `first` … `last - 1`, in memory. Costs a tenth of a second for each 2,048 of them."""
    if not 0 <= first < last <= simulation.cells:
        raise ValueError(f"cells {first} to {last} are not within the {simulation.cells} simulated")
    responses = _responses(simulation)
    blocks = range(first // BLOCK, -(-last // BLOCK))
    whole = _concatenate([_block(simulation, responses, number) for number in blocks])
    return whole.take(np.arange(first, last) - blocks[0] * BLOCK)


@dataclass(frozen=True)
class _Response:
    """How one modality answers to what a cell is, in log rates (RNA, protein) or logits (ATAC)."""

    base: np.ndarray
    """[features]"""
    types: np.ndarray
    """[types, features]"""
    state: np.ndarray
    """Change for a state of 1, [types, features]: shared by all types, and a part of each type's own."""
    nuisance: np.ndarray
    """[programmes, features]; no programmes outside RNA."""
    assay: np.ndarray
    """[assays, features]"""


def _responses(simulation: Simulation) -> dict[str, _Response]:
    def effect(rows: int, features: int, share: float, size: float) -> np.ndarray:
        """Normal effects on a random `share` of the features, [rows, features]."""
        chosen = rng.random((rows, features)) < share
        return (chosen * rng.normal(0.0, size, (rows, features))).astype(np.float32)

    found = {}
    families = np.arange(simulation.types) // 2
    for number, name in enumerate(MODALITIES):
        rng = np.random.default_rng([simulation.seed, 0, number])
        features, spread, family, own, share, state, programmes, assay = {
            "rna": (simulation.genes, 1.2, 0.9, 0.5, 0.4, 0.14, simulation.nuisance, 0.4),
            "atac": (simulation.peaks, 0.8, 0.9, 0.4, 0.3, 0.6, 0, 0.0),
            "protein": (simulation.proteins, 0.8, 0.6, 0.3, 0.6, 0.2, 0, 0.0),
        }[name]
        shared = effect(1, features, share, state)
        found[name] = _Response(
            base=rng.normal(0.0, spread, features).astype(np.float32),
            types=effect(int(families[-1]) + 1, features, 0.3, family)[families]
            + effect(simulation.types, features, 0.15, own),
            state=(shared + 0.5 * effect(simulation.types, features, share, state)) * simulation.state,
            nuisance=effect(programmes, features, 0.1, 0.35),
            assay=effect(len(ASSAYS), features, 1.0, assay) * simulation.technical,
        )
    return found


@dataclass(frozen=True)
class _Lab:
    """What the data sets of one group add of their own. First axis: the data set."""

    proportions: np.ndarray
    """Share of each type in each donor, [data sets, donors, types]."""
    donors: dict[str, np.ndarray]
    """Modality -> donor effects, [data sets, donors, features]."""
    batches: dict[str, np.ndarray]
    """Modality -> batch effects, [data sets, batches, features]."""


def _lab(simulation: Simulation, group: int) -> _Lab:
    rng = np.random.default_rng([simulation.seed, 1, group])
    sizes = {"rna": simulation.genes, "atac": simulation.peaks, "protein": simulation.proteins}

    def effects(rows: int, size: float) -> dict[str, np.ndarray]:
        shape = (len(DATASETS), rows)
        size *= simulation.technical
        return {m: rng.normal(0.0, size, (*shape, n)).astype(np.float32) for m, n in sizes.items()}

    proportions = rng.dirichlet(np.full(simulation.types, 8.0), (len(DATASETS), simulation.donors))
    return _Lab(proportions, effects(simulation.donors, 0.1), effects(BATCHES, 0.2))


def _block(simulation: Simulation, responses: dict[str, _Response], number: int) -> Simulated:
    """The BLOCK cells of one random stream."""
    group = number // simulation.group
    lab = _lab(simulation, group)
    rng = np.random.default_rng([simulation.seed, 2, number])
    index = number * BLOCK + np.arange(BLOCK)
    order = list(DATASETS)
    places = index % len(PLACES)
    dataset = np.array([order.index(name) for name, _ in PLACES])[places]
    present = np.array([bits for _, bits in PLACES], np.uint32)[places]
    donor = rng.integers(simulation.donors, size=BLOCK)
    batch = rng.integers(BATCHES, size=BLOCK)
    assay = np.where(dataset == order.index("cite"), batch, dataset == order.index("rna")).astype(int)
    below = lab.proportions[dataset, donor].cumsum(1) < rng.random((BLOCK, 1))
    cell_type = below[:, :-1].sum(1)
    state = rng.uniform(-math.sqrt(3.0), math.sqrt(3.0), BLOCK).astype(np.float32)
    counts = {}
    for at, name in enumerate(MODALITIES):
        rows = np.flatnonzero(present & (1 << at))
        r = responses[name]
        effect = r.base + r.types[cell_type[rows]] + r.state[cell_type[rows]] * state[rows, None]
        effect += rng.standard_normal((BLOCK, len(r.nuisance)), np.float32)[rows] @ r.nuisance
        effect += r.assay[assay[rows]]
        effect += lab.donors[name][dataset[rows], donor[rows]] + lab.batches[name][dataset[rows], batch[rows]]
        depth = rng.standard_normal((BLOCK, 1), np.float32)[rows]
        counts[name] = _placed(_DRAW[name](simulation, rng, effect, depth), rows)
    names = np.array(list(DATASETS))[dataset]
    if group:
        names = np.char.add(names, f"-{group + 1}")
    return Simulated(
        names=_barcodes(index),
        dataset=names,
        cell_type=np.array(type_names(simulation))[cell_type],
        state=state,
        donor=np.array([f"{n}-donor{d + 1}" for n, d in zip(names, donor, strict=True)]),
        batch=np.array([f"{n}-batch{b + 1}" for n, b in zip(names, batch, strict=True)]),
        assay=np.array(ASSAYS)[assay],
        present=present,
        counts=counts,
    )


def _rna(
    simulation: Simulation, rng: np.random.Generator, effect: np.ndarray, depth: np.ndarray
) -> np.ndarray:
    rate = np.exp(effect)
    rate *= simulation.depth * np.exp(0.35 * depth) / rate.sum(1, keepdims=True)
    return _negative_binomial(rng, rate, 8.0)


def _atac(
    simulation: Simulation, rng: np.random.Generator, effect: np.ndarray, depth: np.ndarray
) -> np.ndarray:
    centre = math.log(simulation.accessible / (1 - simulation.accessible)) - 0.7
    logit = effect + (centre + 0.35 * depth)
    return rng.random(effect.shape, np.float32) < 1 / (1 + np.exp(-logit))


def _protein(
    simulation: Simulation, rng: np.random.Generator, effect: np.ndarray, depth: np.ndarray
) -> np.ndarray:
    return _negative_binomial(rng, np.exp(effect + 3.0 + 0.25 * depth), 20.0)


_DRAW = {"rna": _rna, "atac": _atac, "protein": _protein}


def _negative_binomial(rng: np.random.Generator, mean: np.ndarray, size: float) -> np.ndarray:
    """Counts with variance mean + mean² / size, of the shape of `mean`.

    By inversion of one uniform number a count: most counts are 0 and end at the first
    comparison, which takes a fifth of the time of `Generator.negative_binomial`.
    """
    uniform = rng.random(mean.shape, np.float32)
    counts = np.zeros(mean.shape, np.int32)
    left = np.flatnonzero(uniform > (1 + mean / size) ** -size)
    target, mu = uniform.ravel()[left].astype(np.float64), mean.ravel()[left].astype(np.float64)
    step = mu / (mu + size)
    chance = (1 + mu / size) ** -size
    below = chance.copy()
    k = 0
    while len(left):
        chance *= step * ((size + k) / (k + 1))
        below += chance
        k += 1
        counts.ravel()[left] = k
        more = target > below
        left, target, step = left[more], target[more], step[more]
        chance, below = chance[more], below[more]
    return counts


def _placed(counts: np.ndarray, rows: np.ndarray) -> sp.csr_matrix:
    """`counts` of the cells `rows` of a block; the other cells have empty rows."""
    part = sp.csr_matrix(counts.astype(np.int32))
    lengths = np.zeros(BLOCK, np.int64)
    lengths[rows] = np.diff(part.indptr)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return sp.csr_matrix((part.data, part.indices, indptr), shape=(BLOCK, counts.shape[1]))


def _barcodes(index: np.ndarray) -> np.ndarray:
    """Sixteen bases and "-1", different for different cells below 4^16."""
    code = (index.astype(np.uint64) + np.uint64(1)) * np.uint64(2654435761) % np.uint64(1 << 32)
    digits = (code[:, None] >> (2 * np.arange(16, dtype=np.uint64))) & np.uint64(3)
    letters = np.array(list("ACGT"))[digits.astype(int)]
    return np.array(["".join(row) + "-1" for row in letters])


def _concatenate(parts: Sequence[Simulated]) -> Simulated:
    arrays: dict[str, Any] = {n: np.concatenate([getattr(p, n) for p in parts]) for n in _ARRAYS}
    counts = {m: sp.vstack([p.counts[m] for p in parts], format="csr") for m in MODALITIES}
    return Simulated(**arrays, counts=counts)
