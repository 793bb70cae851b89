"""Cell types from RNA: probes of frozen embeddings beside models that read the counts themselves."""

from collections.abc import Callable

import numpy as np

from cellray.tasks import baselines, metrics, networks
from cellray.tasks.inputs import Cohort
from cellray.tasks.rows import Kind, Result, Row, averaged, refused, rows

TASK = "annotation"
METRICS = ("accuracy", "macro F1", "calibration error")
PROBES = {"linear probe": baselines.linear_probe, "kNN": baselines.neighbour_votes}
COUNTS = (
    "majority",
    "logistic regression on genes",
    "logistic regression on PCA",
    "kNN on PCA",
    "MLP",
    "denoising autoencoder, linear probe",
    "denoising autoencoder, kNN",
)
BASELINES = (*COUNTS, *(f"random weights, {probe}" for probe in PROBES), "collapsed embedding")
EMBEDDINGS = {"student": "student", "RNA-only model": "rna_only", "teacher": "teacher"}
"""Name in the report -> name in `Scored.embeddings`."""


def annotation(cohort: Cohort, progress: Callable[[str], None]) -> list[Row]:
    """Rows of every embedding and baseline on the held-out cells of one labelled data set."""
    names = cohort.labels[2]
    if len(names) < 2:
        return not_run(cohort.dataset, f"all cells have the label {names[0]!r}")
    results = [*models(cohort, progress), *simple(cohort, progress)]
    return rows(TASK, cohort.dataset, cohort.split, METRICS, results)


def models(cohort: Cohort, progress: Callable[[str], None]) -> list[Result]:
    """Probes of our embeddings alone. Of another training they are to be had without `simple` anew."""
    made_from = cohort.scored.leak(cohort.dataset)
    results = []
    for model, name in EMBEDDINGS.items():
        for probe in PROBES:
            if name == "teacher" and made_from:
                reason = leaked(made_from)
                results.append(refused(f"{model}, {probe}", kind(name), reason))
                continue
            progress(f"{TASK} of {cohort.dataset}: {model}, {probe}")
            fits = [probed(cohort, *cohort.embedding(name), probe, draw) for draw in cohort.draws]
            results.append(averaged(f"{model}, {probe}", kind(name), fits))
    return results


def not_run(dataset: str, reason: str) -> list[Row]:
    """Rows that say why this task was not run on `dataset`."""
    results = [
        refused(f"{model}, {probe}", kind(name), reason)
        for model, name in EMBEDDINGS.items()
        for probe in PROBES
    ]
    results += [refused(model, "baseline", reason) for model in BASELINES]
    return rows(TASK, dataset, "", METRICS, results)


def kind(embedding: str) -> Kind:
    return "ours" if embedding == "student" else "reference"


def leaked(modality: str) -> str:
    return f"the labels were made from {modality}, which the teacher saw"


def probed(
    cohort: Cohort, train: np.ndarray, test: np.ndarray, probe: str, draw: np.ndarray
) -> dict[str, np.ndarray]:
    """Metrics of `probe` fitted on the drawn training cells of an embedding."""
    codes, _, names = cohort.labels
    return judged(cohort, PROBES[probe](train[draw], codes[draw], test, len(names)))


def judged(cohort: Cohort, chance: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of the chances [held-out cells, labels]."""
    truth = cohort.labels[1]
    guess = chance.argmax(axis=1)
    return {
        "accuracy": metrics.accuracy(truth, guess, cohort.weights),
        "macro F1": metrics.macro_f1(truth, guess, cohort.weights),
        "calibration error": metrics.calibration_error(truth, chance, cohort.weights),
    }


def simple(cohort: Cohort, progress: Callable[[str], None]) -> list[Result]:
    """The baselines. They read nothing of what was trained; random weights have its shape."""
    fits: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in BASELINES}
    codes, truth, names = cohort.labels
    train, test = cohort.profiles
    random = cohort.embedding("random")
    flat = collapsed(cohort)
    for seed, draw in enumerate(cohort.draws):
        progress(f"{TASK} of {cohort.dataset}: baselines, seed {seed + 1} of {len(cohort.draws)}")
        fits["majority"].append(judged(cohort, baselines.majority(codes[draw], len(truth), len(names))))
        chance = baselines.gene_regression(train[draw], codes[draw], test, len(names))
        fits["logistic regression on genes"].append(judged(cohort, chance))
        fits["logistic regression on PCA"].append(probed(cohort, *cohort.components, "linear probe", draw))
        fits["kNN on PCA"].append(probed(cohort, *cohort.components, "kNN", draw))
        logits = networks.mlp(train, codes, draw, test, outputs=len(names), loss="label", seed=seed)
        fits["MLP"].append(judged(cohort, softmax(logits)))
        learnt = networks.autoencoder((train[draw], cohort.genes[0][draw]), (train, test), seed=seed)
        for probe in PROBES:
            fits[f"denoising autoencoder, {probe}"].append(probed(cohort, learnt[0], learnt[1], probe, draw))
            fits[f"random weights, {probe}"].append(probed(cohort, *random, probe, draw))
        fits["collapsed embedding"].append(probed(cohort, *flat, "linear probe", draw))
    return [averaged(name, "baseline", found) for name, found in fits.items()]


def collapsed(cohort: Cohort) -> tuple[np.ndarray, np.ndarray]:
    """An embedding that is the same for all cells, of the training and of the held-out cells."""
    return np.zeros((len(cohort.train), 1), np.float32), np.zeros((len(cohort.test), 1), np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))
