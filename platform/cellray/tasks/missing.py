"""What the student wins back of what RNA alone lacks: probes of labels and numeric targets, at one width.

recovery = (student - RNA-only) / (teacher - RNA-only), whatever its sign. The RNA-only model is the
student's network trained without a teacher; the teacher reads every modality of the cell.
"""

from collections.abc import Callable

import numpy as np

from cellray.tasks import baselines, metrics
from cellray.tasks.annotation import collapsed, leaked, probed
from cellray.tasks.inputs import Cohort
from cellray.tasks.rows import Kind, Result, Row, averaged, interval, refused, rows

TASK = "missing modality"
STUDENT, CONTROL, TEACHER = "student", "RNA-only model", "teacher"
BASELINES = (CONTROL, "RNA-only + random vector", "random weights", "collapsed embedding")
LABEL = ("accuracy of label", "macro F1 of label")
NOTHING = 0.002
"""A teacher's gain of less than this is none."""
NO_GAIN = "the teacher gains nothing here"
LEAST = 1e-6
"""Nothing is divided by a smaller difference than this."""

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]
"""(embedding of the training cells, of the held-out cells, drawn training cells) -> metrics."""


def target_metrics(name: str) -> tuple[str, ...]:
    return f"R2 of {name}", f"Pearson of {name}", f"Pearson of {name} within label"


def label_recovery(cohort: Cohort) -> list[Row]:
    """Rows of logistic regression from every embedding, on labelled cells with all modalities."""

    def fit(train: np.ndarray, test: np.ndarray, draw: np.ndarray) -> dict[str, np.ndarray]:
        found = probed(cohort, train, test, "linear probe", draw)
        return {LABEL[0]: found["accuracy"], LABEL[1]: found["macro F1"]}

    if len(cohort.labels[2]) < 2:
        return not_run(cohort.dataset, LABEL, "all cells have one label")
    made_from = cohort.scored.leak(cohort.dataset)
    return _compare(cohort, LABEL, fit, leaked(made_from) if made_from else "")


def target_recovery(cohort: Cohort, name: str, values: np.ndarray) -> list[Row]:
    """Rows of ridge regression of `values` (of all scored cells) from every embedding.

    Correlation within label is of deviations from the mean of the cell's label.
    """
    known, truth = values[cohort.train], values[cohort.test]
    labels = cohort.labels[1]
    whole, alone, within = target_metrics(name)

    def fit(train: np.ndarray, test: np.ndarray, draw: np.ndarray) -> dict[str, np.ndarray]:
        guess = baselines.ridge(train[draw], known[draw, None], test).reshape(-1, 1)
        found = {
            whole: metrics.r2(guess[:, 0], truth, cohort.weights),
            alone: metrics.pearson(guess, truth[:, None], cohort.weights),
        }
        if (labels >= 0).any():
            found[within] = metrics.pearson(guess, truth[:, None], cohort.weights, labels)
        return found

    if known.std() < 1e-9 or truth.std() < 1e-9:
        return not_run(cohort.dataset, target_metrics(name), f"{name} is the same for all cells")
    return _compare(cohort, target_metrics(name), fit, "")


def not_run(dataset: str, names: tuple[str, ...], reason: str) -> list[Row]:
    """Rows that say why this task was not run on `dataset`."""
    results = [refused(model, _kind(model), reason) for model in (STUDENT, TEACHER, *BASELINES)]
    return rows(TASK, dataset, "", names, results)


def _compare(cohort: Cohort, names: tuple[str, ...], fit: Fit, leak: str) -> list[Row]:
    """Rows of all models under `fit`, and of the recovery. `leak` says why the teacher is left out."""
    results = []
    for model, (train, test) in _embeddings(cohort).items():
        if model == TEACHER and leak:
            results.append(refused(model, _kind(model), leak))
            continue
        results.append(averaged(model, _kind(model), [fit(train, test, draw) for draw in cohort.draws]))
    found = {result.model: result for result in results}
    recovered = [_recovery(cohort, name, found, leak) for name in names]
    return rows(TASK, cohort.dataset, cohort.split, names, results) + recovered


def _embeddings(cohort: Cohort) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Model -> embedding of the training and of the held-out cells, the student's first.

    The random vector stands beside the whole RNA-only one: twice the width, to its advantage.
    """
    train, test = cohort.embedding("rna_only")
    rng = np.random.default_rng(0)
    noise = [rng.normal(size=part.shape).astype(np.float32) for part in (train, test)]
    return {
        STUDENT: cohort.embedding("student"),
        TEACHER: cohort.embedding("teacher"),
        CONTROL: (train, test),
        "RNA-only + random vector": (np.hstack([train, noise[0]]), np.hstack([test, noise[1]])),
        "random weights": cohort.embedding("random"),
        "collapsed embedding": collapsed(cohort),
    }


def _kind(model: str) -> Kind:
    return "ours" if model == STUDENT else "reference" if model == TEACHER else "baseline"


def _recovery(cohort: Cohort, metric: str, found: dict[str, Result], leak: str) -> Row:
    """The row of the recovery on `metric`, whatever its sign; its reason says where that means little."""
    row: Row = {"task": TASK, "dataset": cohort.dataset, "metric": f"recovery of {metric}", "model": STUDENT}
    row |= {"value": None, "low": None, "high": None, "seeds": len(cohort.draws), "split": cohort.split}
    row |= {"verdict": "", "reason": leak}
    if leak or metric not in found[STUDENT].values:
        return row | {"seeds": 0, "reason": leak or "not defined on these cells"}
    student, control, teacher = (found[m].values[metric] for m in (STUDENT, CONTROL, TEACHER))
    gain = teacher - control
    if abs(gain[0]) < LEAST:
        return row | {"reason": "undefined: the teacher does as well as the RNA-only model"}
    row["value"] = float((student - control)[0] / gain[0])
    if gain[0] <= NOTHING:
        return row | {"reason": f"{NO_GAIN} (teacher - RNA-only = {gain[0]:+.3f}), so the ratio means little"}
    if (gain[1:] <= 0).mean() > 0.025:
        return row | {"reason": "no interval: the teacher's gain is not clear of zero"}
    row["low"], row["high"] = interval((student - control) / np.where(gain > 0, gain, np.nan))
    return row
