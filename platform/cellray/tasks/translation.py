"""RNA to another modality, on held-out cells that were measured in both."""

from collections.abc import Callable, Iterable

import numpy as np

from cellray.data.modalities import Modality
from cellray.tasks import baselines, metrics, networks
from cellray.tasks.inputs import Cohort
from cellray.tasks.rows import Kind, Result, Row, averaged, refused, rows

DETECTION = ("AUROC", "AUROC, depth-adjusted", "AUROC at one depth", "AUROC per cell")
VALUES = ("Pearson", "Pearson within label")
FITTED = ("ridge on PCA", "kNN on PCA", "MLP")
TRANSLATED = {"student": "student", "random weights": "random"}
"""Name in the report -> name in `Scored.translate`."""
POSITIVES = 10
"""Held-out cells with and without a peak that its AUROC needs."""


def task_name(modality: Modality) -> str:
    written = modality.name.upper() if modality.name == "atac" else modality.name
    return f"RNA to {written}"


def baseline_names(modality: Modality) -> tuple[str, ...]:
    """The models that a score of this task is never shown without."""
    alone = ("RNA depth alone",) if modality.likelihood == "bernoulli" else ()
    return ("mean of training cells", *alone, *FITTED, "random weights")


def metric_names(modality: Modality) -> tuple[str, ...]:
    return DETECTION if modality.likelihood == "bernoulli" else VALUES


def not_run(dataset: str, modality: Modality, reason: str) -> list[Row]:
    """Rows that say why this task was not run on `dataset`."""
    results = [refused("student", "ours", reason)]
    results += [refused(model, "baseline", reason) for model in baseline_names(modality)]
    return rows(task_name(modality), dataset, "", metric_names(modality), results)


def translation(cohort: Cohort, modality: Modality, most: int, progress: Callable[[str], None]) -> list[Row]:
    """Rows of the student's decoder and the baselines, on the `most` commonest features.

    Peaks: is a peak counted in a cell, by area under the ROC curve over cells; also among cells
    of like ATAC depth only, of the same predictions and of those for cells that are all equally
    deep in RNA and ATAC, where a model can tell; and over the peaks of a cell. Others: centred log
    ratios by Pearson correlation over cells, also within labels. The student and its copy with random
    weights are one fit each; the baselines are the mean over the draws.
    """
    features = _features(cohort, modality, most)
    if not len(features):
        return not_run(cohort.dataset, modality, "no feature is counted in enough held-out cells")
    found = results(cohort, modality, most, ("student", *baseline_names(modality)), progress)
    split = f"{cohort.split}; {len(features):,} features"
    return rows(task_name(modality), cohort.dataset, split, metric_names(modality), found)


def results(
    cohort: Cohort, modality: Modality, most: int, models: Iterable[str], progress: Callable[[str], None]
) -> list[Result]:
    """What `translation` finds of each of `models`: "student", or one of `baseline_names`.

    No baseline but the random weights reads anything of what was trained.
    """
    judge = _detection if modality.likelihood == "bernoulli" else _values
    told = f"{task_name(modality)} of {cohort.dataset}"

    def tell(text: str) -> None:
        progress(f"{told}: {text}")

    return judge(cohort, modality, _features(cohort, modality, most), models, tell)


def _features(cohort: Cohort, modality: Modality, most: int) -> np.ndarray:
    """The commonest features of the training cells that vary among the held-out ones, in id order."""
    counts = cohort.scored.counts[modality.name].tocsr()
    common = np.asarray((counts[cohort.train] > 0).sum(axis=0)).ravel()
    chosen = np.sort(np.argsort(-common, kind="stable")[:most])
    seen = np.asarray((counts[cohort.test] > 0).sum(axis=0)).ravel()
    if modality.likelihood == "bernoulli":
        return chosen[(seen[chosen] >= POSITIVES) & (seen[chosen] <= len(cohort.test) - POSITIVES)]
    return chosen[common[chosen] > 0]


def _detection(
    cohort: Cohort,
    modality: Modality,
    features: np.ndarray,
    models: Iterable[str],
    progress: Callable[[str], None],
) -> list[Result]:
    counts = cohort.scored.counts[modality.name].tocsr()
    known = (counts[cohort.train][:, features] > 0).toarray().astype(np.float32)
    positive = (counts[cohort.test][:, features] > 0).toarray()
    depth = metrics.depth_bins(cohort.scored.totals[modality.name][cohort.test])
    judge = _Areas(positive, depth, cohort.weights)
    found = []
    for name in models:
        progress(name)
        fits: Iterable[np.ndarray]
        if name in TRANSLATED:
            own = TRANSLATED[name]
            both = [_predicted(cohort, modality, features, own, level=level) for level in (False, True)]
            fits = [np.stack(both)]
        elif name == "RNA depth alone":
            depths = np.log1p(cohort.depth[1])
            fits = [np.stack([depths, np.zeros_like(depths)])[:, :, None]]
        else:
            fits = (_fitted(cohort, known, name, "detection", seed) for seed in range(len(cohort.draws)))
        found.append(judge.result(name, _kind(name), fits))
    return found


def _values(
    cohort: Cohort,
    modality: Modality,
    features: np.ndarray,
    models: Iterable[str],
    progress: Callable[[str], None],
) -> list[Result]:
    counts = cohort.scored.counts[modality.name].tocsr()
    train, test = (
        metrics.centred_log_ratio(np.log1p(counts[rows][:, features].toarray().astype(np.float32)))
        for rows in (cohort.train, cohort.test)
    )
    labels = cohort.labels[1]
    if (labels < 0).all():
        labels = np.zeros_like(labels)

    def judged(guess: np.ndarray) -> dict[str, np.ndarray]:
        found = {"Pearson": metrics.pearson(guess, test, cohort.weights)}
        if cohort.labels[2]:
            found["Pearson within label"] = metrics.pearson(guess, test, cohort.weights, labels)
        return found

    found = []
    for name in models:
        progress(name)
        if name in TRANSLATED:
            counted = np.exp(
                np.minimum(_predicted(cohort, modality, features, TRANSLATED[name], level=False), 20)
            )
            fits = [judged(metrics.centred_log_ratio(np.log1p(counted)))]
        else:
            seeds = range(len(cohort.draws))
            fits = [judged(_fitted(cohort, train, name, "value", seed)[0]) for seed in seeds]
        found.append(averaged(name, _kind(name), fits))
    return found


def _kind(model: str) -> Kind:
    return "ours" if model == "student" else "baseline"


def _predicted(
    cohort: Cohort, modality: Modality, features: np.ndarray, model: str, *, level: bool
) -> np.ndarray:
    guess = cohort.scored.translate[model](modality.name, cohort.test, features, level)
    assert guess.shape == (len(cohort.test), len(features)), guess.shape
    return np.asarray(guess, np.float32)


def _fitted(cohort: Cohort, known: np.ndarray, name: str, loss: str, seed: int) -> np.ndarray:
    """Predictions [2, held-out cells, features] of a baseline that learnt `known` of the training cells.

    First of the cells as they are, then as if all were of the mean depth; only the MLP is told of it.
    """
    draw = cohort.draws[seed]
    train, test = cohort.components
    if name == "MLP":
        depth = [np.log1p(total).astype(np.float32)[:, None] for total in cohort.depth]
        level = np.full_like(depth[1], depth[0].mean())
        inputs = np.hstack([train, depth[0]])
        asked = np.vstack([np.hstack([test, depth[1]]), np.hstack([test, level])])
        said = networks.mlp(inputs, known, draw, asked, outputs=known.shape[1], loss=loss, seed=seed)
        return said.reshape(2, len(test), -1)
    if name == "mean of training cells":
        guess = np.tile(known[draw].mean(axis=0), (len(test), 1))
    elif name == "ridge on PCA":
        guess = baselines.ridge(train[draw], known[draw], test)
    else:
        own = known[draw]
        near = baselines.neighbours(train[draw], test)
        guess = np.asarray(sum(own[near[:, k]] for k in range(near.shape[1])) / near.shape[1])
    return np.broadcast_to(guess, (2, *guess.shape))


class _Areas:
    """Areas under the ROC curve against the detections of the held-out cells."""

    def __init__(self, positive: np.ndarray, depth: np.ndarray, weights: np.ndarray) -> None:
        self.positive, self.weights = positive, weights
        together = np.zeros(len(positive), np.int64)
        self.ways = ((0, together), (0, depth), (1, depth))
        """Which of a fit's predictions are ranked, within which bins: the first metrics of DETECTION."""
        self.made = [metrics.trials(positive, bins) for bins in (together, depth)]
        self.made.append(self.made[1])

    def result(self, model: str, kind: Kind, fits: Iterable[np.ndarray]) -> Result:
        """Ranks every fit [2, held-out cells, features], averages over the fits, and resamples once."""
        right = [np.zeros(self.positive.shape, np.float32) for _ in self.made]
        cells = np.zeros(len(self.positive))
        seeds = 0
        for fit in fits:
            scores = np.broadcast_to(np.asarray(fit, np.float32), (2, *self.positive.shape))
            for sum_, (level, bins) in zip(right, self.ways, strict=True):
                sum_ += metrics.wins(scores[level], self.positive, bins)
            cells += metrics.auroc_of_cells(scores[0], self.positive)
            seeds += 1
        areas = (
            metrics.auroc(sum_ / seeds, made, self.positive, self.weights)
            for sum_, made in zip(right, self.made, strict=True)
        )
        values = dict(zip(DETECTION[:-1], areas, strict=True))
        able = np.isfinite(cells)
        values[DETECTION[-1]] = metrics.mean(cells[able] / seeds, self.weights[:, able])
        return Result(model, kind, values, seeds)
