"""What scoring reads, and the cells of one data set that one task is scored on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellray.data.modalities import Modality, scaled

FIT_CELLS = 8000
"""Most training cells that probes and baselines are fitted on; more are subsampled."""
TEST_CELLS = 3000
"""Most held-out cells of a data set that are scored; more are subsampled."""
DRAWN = 0.9
"""Share of the training cells that each seed draws."""
GENES = 2000
"""Most genes that the baselines read: the most variable ones of the training cells."""
COMPONENTS = 50
"""Principal components of the baselines."""
COLUMNS = ("cell_id", "dataset", "donor", "batch", "label", "test")

Translate = Callable[[str, np.ndarray, np.ndarray, bool], np.ndarray]
"""(modality, rows, features, level) -> predictions [rows, features]. `rows` index `Scored.cells`.

Logits of detection for a Bernoulli modality, log expected counts for any other; of each cell as deep
as the model thinks it is, or with `level` as if all cells were equally deep.
"""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Cells of a run with their counts and embeddings. ValueError where the parts do not fit together."""

    cells: pd.DataFrame
    """`cell_id, dataset, donor, batch, label` as text, "" where unknown, and bool `test`: held out."""
    units: Mapping[str, str]
    """Data set -> what was held out whole: "donor", "batch", "cell", or "none" for no split."""
    modalities: tuple[Modality, ...]
    counts: Mapping[str, sp.csr_matrix] = field(repr=False)
    """Modality -> raw counts [cells, features]; rows of cells without it are empty."""
    totals: Mapping[str, np.ndarray] = field(repr=False)
    """Modality -> depth over all features, [cells]."""
    present: Mapping[str, np.ndarray] = field(repr=False)
    """Modality -> whether a cell was measured in it, bool [cells]."""
    embeddings: Mapping[str, np.ndarray] = field(repr=False)
    """float32 [cells, width], all of one width. Rows of cells without RNA are not read.

    "student"; "teacher", from every modality that a cell has; "rna_only", a student that
    never met the teacher; "random", a student with random weights.
    """
    translate: Mapping[str, Translate] = field(repr=False)
    """"student", and "random" for the copy with random weights."""
    targets: pd.DataFrame | None = None
    """`cell_id` and numeric columns to probe embeddings for; cells may be missing, values may be NaN."""
    label_from: Mapping[str, str] = field(default_factory=dict)
    """Data set -> modality that its labels were made from; an embedding that saw it is not scored on them."""

    def __post_init__(self) -> None:
        missing = [name for name in COLUMNS if name not in self.cells]
        if missing:
            raise ValueError(f"cells to score lack the columns {missing}; they have {list(self.cells)}")
        names = {m.name for m in self.modalities}
        for what, held in (("counts", self.counts), ("totals", self.totals), ("present", self.present)):
            if set(held) != names:
                raise ValueError(f"{what} to score hold {sorted(held)}, the modalities are {sorted(names)}")
        lengths = {f"counts of {m}": c.shape[0] for m, c in self.counts.items()}
        lengths |= {f"depth of {m}": len(t) for m, t in self.totals.items()}
        lengths |= {f"embedding {name!r}": len(e) for name, e in self.embeddings.items()}
        for what, length in lengths.items():
            if length != len(self.cells):
                raise ValueError(f"{what} has {length:,} rows for {len(self.cells):,} cells to score")
        if set(self.embeddings) != {"student", "teacher", "rna_only", "random"}:
            raise ValueError(
                f"embeddings to score are {sorted(self.embeddings)}; each of student, teacher, "
                "rna_only and random is needed"
            )
        widths = {name: e.shape[1] for name, e in self.embeddings.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(f"embeddings are compared at one width, these have {widths}")
        if set(self.translate) != {"student", "random"}:
            raise ValueError(f"translate holds {sorted(self.translate)}; student and random are needed")
        if self.targets is not None:
            _check_targets(self.targets, self.cells["cell_id"])
        for dataset, modality in self.label_from.items():
            if modality not in names:
                raise ValueError(
                    f"labels of {dataset!r} are said to come from {modality!r}, "
                    f"which is none of the modalities {sorted(names)}"
                )

    @property
    def datasets(self) -> list[str]:
        """Data sets that have held-out cells, in alphabetical order."""
        return sorted(set(self.cells["dataset"][self.cells["test"]]))

    def leak(self, dataset: str) -> str:
        """Modality besides RNA that the labels of `dataset` were made from, "" if there is none."""
        modality = self.label_from.get(dataset, "")
        return "" if modality == "rna" else modality

    def labelled(self, dataset: str) -> np.ndarray:
        """Cells of `dataset` with RNA and a label, bool [cells]."""
        return self._of(dataset) & (self.cells["label"] != "").to_numpy()

    def paired(self, dataset: str, *modalities: str) -> np.ndarray:
        """Cells of `dataset` that were measured in RNA and all of `modalities`, bool [cells]."""
        found = self._of(dataset)
        for modality in modalities:
            found = found & self.present[modality]
        return found

    def measured(self, dataset: str) -> list[str]:
        """Modalities besides RNA that some cell of `dataset` was measured in together with RNA."""
        return [m.name for m in self.modalities if m.name != "rna" and self.paired(dataset, m.name).any()]

    def _of(self, dataset: str) -> np.ndarray:
        return np.asarray((self.cells["dataset"] == dataset).to_numpy() & self.present["rna"])


def _check_targets(targets: pd.DataFrame, cell_ids: pd.Series) -> None:
    if "cell_id" not in targets:
        raise ValueError(f"targets lack the column cell_id; they have {list(targets)}")
    if twice := targets["cell_id"][targets["cell_id"].duplicated()].head(3).tolist():
        raise ValueError(f"targets name some cells twice, as {twice}; a cell has one row")
    if not targets["cell_id"].isin(cell_ids).any():
        raise ValueError(
            f"targets share no cell with the store: theirs are as {targets['cell_id'].head(3).tolist()}, "
            f"the store's as {cell_ids.head(3).tolist()}. A cell id is DATASET:NAME."
        )


@dataclass(frozen=True)
class Cohort:
    """The cells of one data set that one task is scored on: training rows to fit on, held-out rows."""

    scored: Scored = field(repr=False)
    dataset: str
    train: np.ndarray = field(repr=False)
    """Rows of `scored.cells` to fit on."""
    test: np.ndarray = field(repr=False)
    """Rows of `scored.cells` to score."""
    draws: tuple[np.ndarray, ...] = field(repr=False)
    """For each seed the positions within `train` that it fits on."""
    weights: np.ndarray = field(repr=False)
    """float32 [1 + resamples, test cells]: how often each cell counts; the first row is all ones."""
    split: str
    """What was held out and what the intervals resample, in words."""

    def embedding(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The embedding `name` of the training and of the held-out cells."""
        whole = self.scored.embeddings[name]
        return whole[self.train], whole[self.test]

    @cached_property
    def labels(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Label codes of the training and the held-out cells, and the names. Code -1 for no label."""
        text = self.scored.cells["label"].to_numpy()
        rows = np.concatenate([self.train, self.test])
        names = sorted(set(text[rows]) - {""})
        code = {name: i for i, name in enumerate(names)} | {"": -1}
        train = np.array([code[name] for name in text[self.train]], np.int64)
        return train, np.array([code[name] for name in text[self.test]], np.int64), names

    @cached_property
    def genes(self) -> tuple[np.ndarray, np.ndarray]:
        """Raw counts of the most variable genes, float32 [cells, genes], training then held-out cells.

        Genes are chosen by the variance of log1p(CP10k) over the training cells.
        """
        counts = self.scored.counts["rna"].tocsr()
        chosen = variable_genes(log_profiles(counts[self.train], self.scored.totals["rna"][self.train]))
        return (
            counts[self.train][:, chosen].toarray().astype(np.float32),
            counts[self.test][:, chosen].toarray().astype(np.float32),
        )

    @cached_property
    def depth(self) -> tuple[np.ndarray, np.ndarray]:
        """RNA depth of the training and of the held-out cells."""
        total = self.scored.totals["rna"]
        return total[self.train], total[self.test]

    @cached_property
    def profiles(self) -> tuple[np.ndarray, np.ndarray]:
        """log1p(CP10k) of the most variable genes, float32 [cells, genes]."""
        pairs = zip(self.genes, self.depth, strict=True)
        train, test = (scaled(counts, depth[:, None], "log1p_cp10k") for counts, depth in pairs)
        return train, test

    @cached_property
    def components(self) -> tuple[np.ndarray, np.ndarray]:
        """Principal components of the profiles, float32 [cells, components], not whitened."""
        from sklearn.decomposition import PCA

        train, test = self.profiles
        width = min(COMPONENTS, min(train.shape) - 1)
        pca = PCA(n_components=width, svd_solver="randomized", random_state=0).fit(train)
        return pca.transform(train).astype(np.float32), pca.transform(test).astype(np.float32)


def log_profiles(counts: sp.csr_matrix, total: np.ndarray) -> sp.csr_matrix:
    """log1p(CP10k) of raw counts [cells, genes]; `total` is the depth of each cell."""
    log = counts.astype(np.float32).tocsr(copy=True)
    log.data = scaled(log.data, np.repeat(total, np.diff(log.indptr)), "log1p_cp10k")
    return log


def variable_genes(log: sp.csr_matrix) -> np.ndarray:
    """The GENES columns with the largest variance, in order."""
    mean = np.asarray(log.mean(axis=0)).ravel()
    variance = np.asarray(log.multiply(log).mean(axis=0)).ravel() - mean**2
    return np.sort(np.argsort(-variance, kind="stable")[:GENES])


def cohort(
    scored: Scored, dataset: str, wanted: np.ndarray, *, seeds: int, bootstrap: int, drawn: float = DRAWN
) -> Cohort | str:
    """The cells of `dataset` among `wanted` (bool [cells]), or why there are too few to score.

    Each seed draws a share of the training cells, `drawn`.
    """
    test = scored.cells["test"].to_numpy(bool)
    fit, held = np.flatnonzero(wanted & ~test), np.flatnonzero(wanted & test)
    if len(fit) < 50 or len(held) < 20:
        return f"{len(fit)} training and {len(held)} held-out cells; 50 and 20 are needed"
    train, kept = _few(fit, FIT_CELLS), _few(held, TEST_CELLS)
    size = max(1, round(drawn * len(train)))
    draws = tuple(
        np.sort(np.random.default_rng(seed).choice(len(train), size, replace=False)) for seed in range(seeds)
    )
    unit = scored.units[dataset]
    column = scored.cells[unit if unit in ("donor", "batch") else "cell_id"]
    groups, codes = np.unique(column.to_numpy(str)[kept], return_inverse=True)
    split = f"{len(held):,} held-out cells" if unit == "cell" else _units(unit, len(groups), len(held))
    if len(kept) < len(held):
        split += f", {len(kept):,} of them scored"
    split += (
        "; intervals over cells"
        if unit == "cell" or len(groups) == 1
        else f"; intervals over {_plural(unit)}"
    )
    weights = resamples(codes, bootstrap)
    return Cohort(scored, dataset, train, kept, draws, weights, split)


def _units(unit: str, number: int, cells: int) -> str:
    return f"{number} held-out {unit if number == 1 else _plural(unit)}, {cells:,} cells"


def _plural(unit: str) -> str:
    return {"donor": "donors", "batch": "batches"}[unit]


def _few(rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of `rows`, the same ones every time, in order."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, most, replace=False))


def resamples(codes: np.ndarray, number: int) -> np.ndarray:
    """How often each cell counts in each resample, float32 [1 + number, cells]; row 0 is all ones.

    `codes` names the unit (donor, batch, cell) of each cell. Units are drawn with replacement,
    then cells within each drawn unit: with the few donors that studies hold out, resampling
    whole donors alone gives intervals that are too short, and none at all for one donor.
    With cells as units this is the ordinary bootstrap.
    """
    rng = np.random.default_rng(0)
    units = int(codes.max()) + 1
    members = [np.flatnonzero(codes == u) for u in range(units)]
    weights = np.zeros((1 + number, len(codes)), np.float32)
    weights[0] = 1
    for row in weights[1:]:
        drawn = rng.multinomial(units, np.full(units, 1 / units))
        if units == len(codes):
            row[:] = drawn[codes]
            continue
        for cells, times in zip(members, drawn, strict=True):
            if times:
                size = len(cells) * times
                row[cells] = rng.multinomial(size, np.full(len(cells), 1 / len(cells)))
    return weights
