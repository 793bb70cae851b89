"""What a trained run has learnt, and what simple models learn from the same cells. Held-out donors only.

A figure is a float with a name: `STAGE/what` for the model's, `what/MODEL` where models stand side by side.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from cellray.data.modalities import BUILT_IN
from cellray.data.truth import type_names
from cellray.embedder import vectors
from cellray.model.teacher import Teacher
from cellray.tasks import baselines, inputs, metrics, networks
from cellray.tasks.inputs import Cohort, Scored
from cellray.train import checkpoint
from cellray.train.batches import masked_tokens
from cellray.train.run import Run
from cellray.train.targets import CHUNK, teacher_vectors
from tests.bench.learned.material import Material
from tests.bench.learned.simulator import (
    Rates,
    counted,
    rates,
    state_information,
    value_when_counted,
)

MASKING = 20_011
"""Key of the masks of held-out cells: the same for every model and seed, and none that training drew."""
POSITIVES = 10
"""Held-out cells with and without a peak that its correlation needs."""
COHORTS = {"pairs": ("rna", "atac"), "cite": ("rna", "protein")}
"""Name -> modalities measured. Of `pairs` some have protein too; those of `cite` have no ATAC."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Asked:
    """Hidden and absent features of held-out cells in one modality, and what a model says of them."""

    rows: np.ndarray
    """Store row of the cell of each feature asked for, [asked]."""
    features: np.ndarray
    truth: np.ndarray
    """Scaled values, 0 for a feature that was not counted."""
    value: np.ndarray | None
    """What the model says they are, where they are counted; None for a modality without values."""
    logit: np.ndarray
    """What the model says of their being counted."""


class Bench:
    """The cells that figures are of, with what does not depend on a model."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.cells, self.test = material.cells, material.test

    @cached_property
    def rates(self) -> Rates:
        """The simulator's, in store order."""
        s = self.material.simulation
        order = np.random.default_rng([s.seed, 3]).permutation(s.cells)
        found = rates(s)
        return Rates(
            {m: v[order] for m, v in found.mean.items()}, {m: v[order] for m, v in found.usual.items()}
        )

    def held(self, modality: str) -> np.ndarray:
        """Store rows of held-out cells with `modality`."""
        return np.flatnonzero(self.test & self.material.measured(modality))

    def rows(self, cohort: str) -> tuple[np.ndarray, np.ndarray]:
        """Store rows of the training and of the held-out cells of a cohort."""
        inside = self.material.measured(*COHORTS[cohort])
        inside &= (self.cells.dataset == "cite") if cohort == "cite" else (self.cells.dataset != "cite")
        return np.flatnonzero(inside & ~self.test), np.flatnonzero(inside & self.test)

    def kinds(self, rows: np.ndarray) -> np.ndarray:
        """Data set and type of some cells as one code: what "within cell type" is within."""
        text = np.char.add(np.char.add(self.cells.dataset[rows].astype(str), "/"), self.cells.cell_type[rows])
        return np.unique(text, return_inverse=True)[1]

    def cohort(self, name: str) -> Cohort:
        """A cohort for the baselines of `cellray.tasks`, fitted on all of its training cells."""
        train, test = self.rows(name)
        none = np.zeros((len(self.cells), 1), np.float32)
        scored = Scored(
            cells=self.material.frame,
            units={},
            modalities=BUILT_IN,
            counts={m: c.astype(np.float32) for m, c in self.cells.counts.items()},
            totals=self.material.totals,
            present={m: self.material.measured(m) for m in self.cells.counts},
            embeddings=dict.fromkeys(("student", "teacher", "rna_only", "random"), none),
            translate=dict.fromkeys(("student", "random"), _nothing),
        )
        weights = np.ones((1, len(test)), np.float32)
        return Cohort(scored, name, train, test, (np.arange(len(train)),), weights, "held-out donors")

    @cached_property
    def peaks(self) -> np.ndarray:
        """Peaks that vary among the held-out pairs and were met in training."""
        train, test = self.rows("pairs")
        counts = self.cells.counts["atac"]
        seen = np.asarray((counts[test] > 0).sum(axis=0)).ravel()
        known = np.asarray((counts[train] > 0).sum(axis=0)).ravel() > 0
        return np.flatnonzero(known & (seen >= POSITIVES) & (seen <= len(test) - POSITIVES))

    def within_type(self, guess: np.ndarray) -> float:
        """Correlation of `guess` [held-out pairs, peaks] with what is open, within data set and type."""
        _, test = self.rows("pairs")
        truth = (self.cells.counts["atac"][test][:, self.peaks] > 0).toarray()
        weights = np.ones((1, len(test)), np.float32)
        return float(metrics.pearson(guess, truth, weights, self.kinds(test))[0])


def _nothing(modality: str, rows: np.ndarray, features: np.ndarray, level: bool) -> np.ndarray:
    raise AssertionError("the baselines ask no model")


# Stage 1


def asked(run: Run, bench: Bench, modality: str) -> Asked:
    """What the model after stage 1 says of hidden places of the held-out cells, hidden as in training."""
    teacher = run.teacher()
    checkpoint.load(run.path("stages", f"unimodal-{modality}"), teacher)
    teacher.eval()
    vocabulary, setting = run.tokenizer.vocabularies[modality], run.recipe.unimodal
    encoder, heads = teacher.encoder(modality), teacher.heads[modality]
    rows = bench.held(modality)
    found: list[tuple[np.ndarray, ...]] = []
    for first in range(0, len(rows), CHUNK):
        some = rows[first : first + CHUNK]
        tokens, at, truth = masked_tokens(
            bench.material.store.read(some).counts[modality],
            some,
            vocabulary.modality,
            len(vocabulary),
            mask=setting.mask,
            zeros=setting.zeros,
            keys=(MASKING,),
        )
        with torch.inference_mode():
            value, logit = heads(encoder(tokens, heads.withheld).at(at))
        cell = np.searchsorted(tokens.offsets.numpy(), at.numpy(), side="right") - 1
        said = np.full(len(at), np.nan, np.float32) if value is None else (value * encoder.unit).numpy()
        found.append((some[cell], tokens.ids[at].numpy(), truth.numpy(), said, logit.numpy()))
    cells, features, truths, values, logits = (np.concatenate(part) for part in zip(*found, strict=True))
    return Asked(cells, features, truths, None if np.isnan(values).all() else values, logits)


def stage_one(run: Run, bench: Bench) -> Figures:
    """Errors of hidden values and areas of detection, beside the per-gene statistics of training cells."""
    found: Figures = {}
    for m in BUILT_IN:
        said = asked(run, bench, m.name)
        simple = _by_feature(bench, m.name, said)
        hit = said.truth > 0
        if not hit.all():  # proteins are counted in nearly every cell
            for name, score in {"model": said.logit, **simple.detection}.items():
                found[f"detection of {m.name}/{name}"] = float(roc_auc_score(hit, score))
        if said.value is not None:
            for name, guess in {"model": said.value, **simple.value}.items():
                error = guess[hit] - said.truth[hit]
                found[f"value of {m.name}/{name}"] = float(np.mean(error**2))
                found[f"absolute value of {m.name}/{name}"] = float(np.mean(np.abs(error)))
    return found


@dataclass(frozen=True)
class _Simple:
    """What simple models say at the places that were asked for."""

    value: Mapping[str, np.ndarray]
    detection: Mapping[str, np.ndarray]


def _by_feature(bench: Bench, modality: str, said: Asked) -> _Simple:
    """Per-feature statistics of training cells; with depth; and, for RNA, the simulator's own rates."""
    m = next(m for m in BUILT_IN if m.name == modality)
    train = np.flatnonzero(~bench.test & bench.material.measured(modality))
    counts, total = bench.cells.counts[modality].tocsr(), bench.material.totals[modality]
    values = inputs.scaled(
        counts[train].data, np.repeat(total[train], np.diff(counts[train].indptr)), m.scale
    )
    ids = counts[train].indices
    depth = np.repeat(np.log1p(total[train]), np.diff(counts[train].indptr))
    number = np.bincount(ids, minlength=counts.shape[1])
    mean = _means(values, ids, number)
    usual = _means(depth, ids, number)
    off = depth - usual[ids]
    slope = float(((values - mean[ids]) * off).sum() / max(float((off**2).sum()), 1e-9))
    own = np.log1p(total[said.rows]) - usual[said.features]
    value = {
        "per-feature mean": mean[said.features],
        "per-feature mean and depth": mean[said.features] + slope * own,
    }
    detection = {"per-feature frequency": (number / len(train))[said.features]}
    true = bench.rates.mean[modality][said.rows, said.features].astype(np.float64)
    if modality == "rna":
        value["the simulator's rates"] = value_when_counted(true, total[said.rows])
        detection["the simulator's rates"] = counted(true)
    elif modality == "atac":
        detection["the simulator's rates"] = true
    return _Simple(value, detection)


def _means(values: np.ndarray, ids: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Mean of the values of each feature, of all values where a feature has none."""
    sums = np.bincount(ids, values, minlength=len(number))
    return np.where(number > 0, sums / np.maximum(number, 1), values.mean())


# Stages 2 and 3


def embeddings(run: Run, bench: Bench, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Embeddings of some cells by every model of a run, float32 [cells, width].

    The teacher reads every modality of a cell, "teacher of RNA" that one alone. The control is the
    student's network without a teacher, "random" the student before it was trained.
    """
    counts = bench.material.store.read(rows).counts["rna"]
    students = {
        "student": run.trained_student(),
        "control": run.trained_student("control"),
        "random": run.student().eval(),
    }
    found = {name: vectors(student, run.tokenizer, counts) for name, student in students.items()}
    teacher = run.trained_teacher()
    found["teacher of RNA"] = joint(teacher, bench, rows, ("rna",))
    return {"teacher": joint(teacher, bench, rows), **found}


def joint(
    teacher: Teacher, bench: Bench, rows: np.ndarray, shown: tuple[str, ...] | None = None
) -> np.ndarray:
    """The teacher's joint vectors of some cells, from the modalities `shown`; from all if None."""
    store = bench.material.store
    parts = [
        teacher_vectors(teacher, store, rows[first : first + CHUNK], shown=shown)[0]
        for first in range(0, len(rows), CHUNK)
    ]
    return np.concatenate(parts)


def translations(run: Run, bench: Bench) -> Figures:
    """RNA to ATAC within cell type: by the teacher that is shown RNA alone, and by the student."""
    _, test = bench.rows("pairs")
    teacher, student = run.trained_teacher(), run.trained_student()
    cells = {
        "joint": (teacher.decoder("atac"), joint(teacher, bench, test, ("rna",))),
        "student": (
            student.decoder("atac"),
            vectors(student, run.tokenizer, bench.material.store.read(test).counts["rna"]),
        ),
    }
    found = {}
    ids = torch.from_numpy(bench.peaks)
    for name, (decoder, cell) in cells.items():
        with torch.inference_mode():
            said = torch.sigmoid(decoder(torch.from_numpy(cell), ids)).numpy()
        found[f"RNA to ATAC/{name}"] = bench.within_type(said)
    return found


def probes(run: Run, bench: Bench) -> Figures:
    """Linear probes of the hidden state and of the type from every embedding, cohort by cohort."""
    found: Figures = {}
    for name in COHORTS:
        train, test = bench.rows(name)
        both = embeddings(run, bench, np.concatenate([train, test]))
        for model, whole in both.items():
            part = probed(bench, whole[: len(train)], whole[len(train) :], train, test)
            found |= {f"{what} of {name}/{model}": value for what, value in part.items()}
    return found


def probed(
    bench: Bench, known: np.ndarray, asked: np.ndarray, train: np.ndarray, test: np.ndarray
) -> Figures:
    """State by ridge, type by logistic regression; fitted on `known`, scored on `asked`."""
    state = bench.cells.state
    guess = baselines.ridge(known, state[train, None], asked).reshape(-1, 1)
    names, codes = np.unique(bench.cells.cell_type, return_inverse=True)
    chance = baselines.linear_probe(known, codes[train], asked, len(names))
    return _of_state(bench, guess, test) | {
        "label": float((chance.argmax(axis=1) == codes[test]).mean()),
    }


def _of_state(bench: Bench, guess: np.ndarray, test: np.ndarray) -> Figures:
    weights = np.ones((1, len(test)), np.float32)
    truth = bench.cells.state[test]
    return {
        "state": float(metrics.r2(guess[:, 0], truth, weights)[0]),
        "state within type": float(metrics.pearson(guess, truth[:, None], weights, bench.kinds(test))[0]),
    }


def measured(run: Run, bench: Bench, *, stage_1: bool) -> Figures:
    """All figures of a trained run."""
    first = stage_one(run, bench) if stage_1 else {}
    return first | translations(run, bench) | probes(run, bench)


# Baselines and ceilings: no model of ours


def simple(bench: Bench) -> Figures:
    """RNA to ATAC within type by simple models, and what the simulator's own rates give."""
    cohort = bench.cohort("pairs")
    train, test = cohort.train, cohort.test
    known = (bench.cells.counts["atac"][train][:, bench.peaks] > 0).toarray().astype(np.float32)
    kinds = bench.kinds(np.concatenate([train, test]))
    low, low_test = cohort.components
    genes, genes_test = cohort.profiles
    near = baselines.neighbours(low, test=low_test)
    depth = [np.log1p(total).astype(np.float32)[:, None] for total in cohort.depth]
    drawn = np.sort(np.random.default_rng(0).permutation(len(train))[: round(inputs.DRAWN * len(train))])
    wide, wide_test = np.hstack([low, depth[0]]), np.hstack([low_test, depth[1]])
    logits = networks.mlp(wide, known, drawn, wide_test, outputs=len(bench.peaks), loss="detection", seed=0)
    guesses = {
        "type mean": _type_means(known, kinds[: len(train)], kinds[len(train) :]),
        "ridge on PCA": baselines.ridge(low, known, low_test),
        "kNN on PCA": known[near].mean(axis=1),
        "MLP on PCA": 1 / (1 + np.exp(-logits)),
        "ridge on all genes": baselines.ridge(genes, known, genes_test),
        "the simulator's rates": bench.rates.usual["atac"][test][:, bench.peaks],
    }
    return {f"RNA to ATAC/{name}": bench.within_type(guess) for name, guess in guesses.items()}


def _type_means(known: np.ndarray, kinds: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The mean of the training cells of the same data set and type, [test cells, peaks]."""
    means = np.tile(known.mean(axis=0), (max(kinds.max(), test.max()) + 1, 1))
    for kind in np.unique(kinds):
        means[kind] = known[kinds == kind].mean(axis=0)
    return np.asarray(means[test])


def simple_types(bench: Bench) -> Figures:
    """Cell types of held-out donors by models that were never pretrained."""
    names, codes = np.unique(bench.cells.cell_type, return_inverse=True)
    found: Figures = {}
    for name in COHORTS:
        cohort = bench.cohort(name)
        known, truth, key = codes[cohort.train], codes[cohort.test], f"label of {name}/"
        for seen, fit, (cells, asked) in (
            ("PCA", baselines.linear_probe, cohort.components),
            ("genes", baselines.gene_regression, cohort.profiles),
        ):
            chance = fit(cells, known, asked, len(names))
            found[f"{key}logistic regression on {seen}"] = float((chance.argmax(axis=1) == truth).mean())
        found[f"{key}majority"] = float((truth == np.bincount(known).argmax()).mean())
    return found


def ceilings(bench: Bench) -> Figures:
    """How well the state can be told by those who are taught it, or know the simulator."""
    found: Figures = {}
    every = type_names(bench.material.simulation)
    for name in COHORTS:
        cohort = bench.cohort(name)
        train, test = cohort.train, cohort.test
        state = bench.cells.state
        genes, genes_test = cohort.profiles
        true = [np.log(bench.rates.usual["rna"][rows].astype(np.float64)) for rows in (train, test)]
        drawn = np.sort(np.random.default_rng(0).permutation(len(train))[: round(inputs.DRAWN * len(train))])
        guesses = {
            "ridge on PCA": baselines.ridge(*_around(cohort.components, state[train])),
            "ridge on all genes": baselines.ridge(*_around((genes, genes_test), state[train])),
            "MLP on all genes": networks.mlp(
                genes, state[train, None], drawn, genes_test, outputs=1, loss="value", seed=0
            ),
            "ridge on true rates": baselines.ridge(true[0], state[train, None], true[1]),
        }
        for model, guess in guesses.items():
            found |= {
                f"{k} of {name}/{model}": v for k, v in _of_state(bench, guess.reshape(-1, 1), test).items()
            }
        types = np.array([every.index(t) for t in bench.cells.cell_type[test]])
        part = Rates(
            {m: v[test] for m, v in bench.rates.mean.items()},
            {m: v[test] for m, v in bench.rates.usual.items()},
        )
        told = state_information(bench.material.simulation, part, types)
        for model, modalities in {"RNA": ("rna",), "every modality": tuple(told)}.items():
            sum_ = np.asarray(sum(told[m] for m in modalities))
            found[f"state of {name}/all there is to know of {model}"] = float(np.mean(sum_ / (1 + sum_)))
    return found


def _around(pair: tuple[np.ndarray, np.ndarray], known: np.ndarray) -> tuple[np.ndarray, ...]:
    return pair[0], known[:, None], pair[1]
