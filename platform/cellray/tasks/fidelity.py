"""How near the student comes to its teacher, on held-out cells that have all modalities."""

from collections.abc import Callable

import numpy as np

from cellray.tasks import baselines, metrics
from cellray.tasks.inputs import Cohort
from cellray.tasks.rows import Result, Row, refused, rows

TASK = "fidelity to the teacher"
METRICS = ("cosine", "knn overlap", "foscttm", "spread")
BASELINES = ("ridge on PCA", "random weights", "collapsed embedding")
NEIGHBOURS = 15


def fidelity(cohort: Cohort, progress: Callable[[str], None]) -> list[Row]:
    """Rows of the student, its control, its copy with random weights, a ridge and a collapsed embedding.

    Cosine and share of NEIGHBOURS common neighbours with the teacher's vectors; fraction of cells
    closer than the true match; and the spread, variance over mean squared length, which is 0 for
    a collapsed embedding. A collapsed one shows what a cosine alone is worth.
    """
    progress(f"{TASK} on {cohort.dataset}")
    known, teacher = cohort.embedding("teacher")
    train, test = cohort.components
    guess = np.mean([baselines.ridge(train[d], known[d], test) for d in cohort.draws], axis=0)
    flat = np.tile(known.mean(axis=0), (len(teacher), 1))
    results = [
        _compared("student", cohort.embedding("student")[1], teacher, cohort.weights),
        _compared("RNA-only model", cohort.embedding("rna_only")[1], teacher, cohort.weights),
        _compared("teacher", teacher, teacher, cohort.weights),
        _compared("ridge on PCA", guess, teacher, cohort.weights),
        _compared("random weights", cohort.embedding("random")[1], teacher, cohort.weights),
        _compared("collapsed embedding", flat, teacher, cohort.weights),
    ]
    return rows(TASK, cohort.dataset, cohort.split, METRICS, results)


def not_run(dataset: str, reason: str) -> list[Row]:
    """Rows that say why this task was not run on `dataset`."""
    results = [refused("student", "ours", reason), *(refused(m, "baseline", reason) for m in BASELINES)]
    return rows(TASK, dataset, "", METRICS, results)


def _compared(model: str, vectors: np.ndarray, teacher: np.ndarray, weights: np.ndarray) -> Result:
    flat = model == "collapsed embedding"
    overlap = np.full(len(teacher), NEIGHBOURS / (len(teacher) - 1)) if flat else _overlap(vectors, teacher)
    values = {
        "cosine": metrics.mean(metrics.cosine(vectors, teacher), weights),
        "knn overlap": metrics.mean(overlap, weights),
        "foscttm": metrics.mean(metrics.foscttm(vectors, teacher), weights),
        "spread": np.array([metrics.spread(vectors)]),
    }
    if model == "student":
        return Result(model, "ours", values)
    if model in BASELINES:
        return Result(model, "baseline", values)
    if model == "teacher":
        return Result(
            model, "reference", {"spread": values["spread"]}, reasons={"": "it is what is compared with"}
        )
    del values["cosine"], values["foscttm"]
    return Result(model, "reference", values, reasons={"": "its axes are not the teacher's"})


def _overlap(vectors: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return metrics.neighbour_overlap(vectors, teacher, NEIGHBOURS)
