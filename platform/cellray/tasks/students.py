"""The kinds of student against each other: what each keeps of the teacher, and what each costs.

Which of them is exported is decided here, on the held-out cells: of two kinds or so, which flatters the
scores of the one that is taken by little.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cellray.data.tokens import Counts, Tokenizer
from cellray.model.student import Student
from cellray.tasks import annotation, baselines, metrics
from cellray.tasks.inputs import Cohort, Scored, cohort
from cellray.tasks.score import numeric_targets
from cellray.train.recipe import Score

COSINE, ACCURACY = "cosine to the teacher", "label accuracy"
LOSS = 0.02
"""By how much a probe may score lower than with the best kind, as a share of that: the gate."""
LEAST = 0.1
"""A score that no kind brings this far is no ground to refuse one."""
REQUEST = 256
"""Cells embedded at a time when the cost is measured."""

Kind = dict[str, Any]
"""kind, parameters, cells_per_cpu_second, cosine, and probes: name -> score. JSON values."""
Fit = Callable[[Cohort, np.ndarray, np.ndarray], float]
"""(cells, their embedding for training, held out) -> a score."""


def compare(
    scored: Scored, embeddings: Mapping[str, np.ndarray], costs: Mapping[str, Kind], settings: Score
) -> list[Kind]:
    """What is to be known of every kind, in the order given.

    `embeddings` [cells, width] are of the cells of `scored`; `costs` as `cost` gives them. Scores are
    of held-out cells, means over draws of the training cells, then over data sets. `probes` are linear:
    the label, and each target within labels, where cells have them. What could not be had is left out,
    the cosine None.
    """
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in embeddings}
    for dataset in scored.datasets:
        for name, wanted, fit in _questions(scored, dataset):
            cells = cohort(scored, dataset, wanted, seeds=settings.seeds, bootstrap=0)
            if isinstance(cells, str):
                continue
            for kind, vectors in embeddings.items():
                value = fit(cells, vectors[cells.train], vectors[cells.test])
                if np.isfinite(value):
                    found[kind].setdefault(name, []).append(value)
    means = {kind: {name: float(np.mean(v)) for name, v in own.items()} for kind, own in found.items()}
    return [
        {"kind": kind, **costs[kind], "cosine": own.pop(COSINE, None), "probes": own}
        for kind, own in means.items()
    ]


def _questions(scored: Scored, dataset: str) -> Iterator[tuple[str, np.ndarray, Fit]]:
    """Name of a score, the cells it is asked of, bool [cells], and how it is had."""
    whole = scored.paired(dataset, *scored.measured(dataset))
    labelled = scored.labelled(dataset)
    yield COSINE, whole, _cosine
    if len(set(scored.cells["label"][labelled])) > 1:
        yield ACCURACY, labelled, _accuracy
    for name, values in numeric_targets(scored):
        known = whole & np.isfinite(values)
        yield f"{name}{' within label' if (known & labelled).any() else ''}", known, _correlation(values)


def _cosine(cells: Cohort, train: np.ndarray, test: np.ndarray) -> float:
    return float(metrics.cosine(test, cells.embedding("teacher")[1]).mean())


def _accuracy(cells: Cohort, train: np.ndarray, test: np.ndarray) -> float:
    fits = [annotation.probed(cells, train, test, "linear probe", draw) for draw in cells.draws]
    return float(np.mean([fit["accuracy"][0] for fit in fits]))


def _correlation(values: np.ndarray) -> Fit:
    def fit(cells: Cohort, train: np.ndarray, test: np.ndarray) -> float:
        known, truth, labels = values[cells.train], values[cells.test], cells.labels[1]
        if known.std() < 1e-9 or truth.std() < 1e-9:
            return float("nan")
        groups = labels if (labels >= 0).any() else None
        guesses = [baselines.ridge(train[d], known[d, None], test).reshape(-1, 1) for d in cells.draws]
        found = [metrics.pearson(guess, truth[:, None], cells.weights, groups)[0] for guess in guesses]
        return float(np.mean(found))

    return fit


def cost(student: Student, tokenizer: Tokenizer, counts: Counts) -> Kind:
    """Parameters that an embedding passes, and cells embedded per CPU-second, None of no cells.

    REQUEST cells at a time, on one thread, as an endpoint embeds them; `counts` are RNA tokens.
    """
    from cellray.embedder import vectors

    rows = np.arange(len(counts))
    parts = [counts.take(rows[first : first + REQUEST]) for first in range(0, len(counts), REQUEST)]
    for part in parts[:1]:
        vectors(student, tokenizer, part)
    began = time.process_time()
    for part in parts:
        vectors(student, tokenizer, part)
    seconds = max(time.process_time() - began, 1e-9)
    return {
        "parameters": sum(p.numel() for module in student.path() for p in module.parameters()),
        "cells_per_cpu_second": round(len(counts) / seconds, 1) if len(counts) else None,
    }


def choose(kinds: Sequence[Kind], asked: str = "auto") -> tuple[str, str]:
    """The kind that is scored and exported, and why, in a sentence.

    `asked` is a kind, or "auto" for the cheapest that keeps the gate: every probe scores at most LOSS
    lower than with the best kind; without any probe, the cosine.
    """
    if asked != "auto":
        return asked, "score.student asks for it."
    if len(kinds) == 1:
        return kinds[0]["kind"], "It is the only kind that was trained."
    cheapest = sorted(kinds, key=lambda kind: -(kind["cells_per_cpu_second"] or 0))
    lost: list[str] = []
    for kind in cheapest:
        failed = failures(kind, kinds)
        if not failed:
            why = "It is the cheapest, and no probe scores" if not lost else "No probe scores"
            return kind["kind"], f"{why} more than {LOSS:.0%} lower than with another kind.{''.join(lost)}"
        lost.append(f" The {kind['kind']} is cheaper, but: {'; '.join(failed)}.")
    best = max(kinds, key=lambda kind: np.mean(list(_gated(kind).values())))
    return best["kind"], "Its scores are the best on average; no kind comes near the best on every probe."


def failures(kind: Kind, kinds: Sequence[Kind]) -> list[str]:
    """Where a kind does not keep the gate, in words; none if it does."""
    found = []
    for name, value in _gated(kind).items():
        best = max(_gated(other).get(name, -1.0) for other in kinds)
        if best >= LEAST and value < (1 - LOSS) * best:
            found.append(f"{name} {value:.3f} where the best has {best:.3f}")
    return found


def _gated(kind: Kind) -> dict[str, float]:
    """The scores that the gate looks at."""
    return dict(kind["probes"]) or {COSINE: kind["cosine"] if kind["cosine"] is not None else 0.0}
