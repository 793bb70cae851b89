"""One process of `tests.bench.pairs`: `python -m tests.bench.paired.job FILE`.

FILE is JSON: what to do (`kind`), the recipe of the run, and where the figures go.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.bench.harness.jobs import Cost, answer, losses_of, say


def trained(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train a run, or what is missing of it, and score its embeddings and its student's decoders."""
    from cellray.tasks import annotation, translation
    from pipelines.score import gather, saved_kinds

    run = opened(job)
    spent = Cost(Path(job["recipe"]["run"]) / "cpu.json", job["label"]).chain(run)
    begun = time.process_time()
    scored = gather(run)

    def ours(cells: Any, modality: Any) -> list[Any]:
        if modality is None:
            return annotation.models(cells, silent)
        return translation.results(cells, modality, run.recipe.score.features, ("student",), silent)

    tasks = figures(scored, run.recipe.score, ours)
    measured = time.process_time() - begun
    say(f"{job['label']}: {sum(spent.values()):.0f} CPU-s of training, measured in {measured:.0f}")
    return {
        "tasks": tasks,
        "cpu": spent,
        "measured": measured,
        "losses": losses_of(run),
        "students": saved_kinds(run),
        "cells": {"trained": int((~run.test).sum()), "held out": int(run.test.sum())},
    }


def compared(job: Mapping[str, Any]) -> dict[str, Any]:
    """Fit and score the baselines, on the cells that the run held out."""
    from cellray.tasks import annotation, translation
    from pipelines.score import gather

    run = opened(job)
    begun = time.process_time()

    def tell(text: str) -> None:
        say(f"{job['label']}: {text}")

    def simple(cells: Any, modality: Any) -> list[Any]:
        if modality is None:
            return annotation.simple(cells, tell)
        names = translation.baseline_names(modality)
        return translation.results(cells, modality, run.recipe.score.features, names, tell)

    tasks = figures(gather(run), run.recipe.score, simple)
    return {"tasks": tasks, "measured": time.process_time() - begun}


def opened(job: Mapping[str, Any]) -> Any:
    """The run of the job."""
    from cellray.train.recipe import from_json
    from cellray.train.run import Run

    run = Run(from_json(job["recipe"]))
    run.claim()
    return run


def figures(
    scored: Any, settings: Any, models: Callable[[Any, Any], list[Any]], *, drawn: float = 1.0
) -> dict[str, Any]:
    """Task -> the split in words, and results model by model, as JSON; resamples follow each value.

    `models` gives the results of some cells, for annotation (None) or for translation to a modality. Probes
    and baselines are fitted to the share `drawn` of the training cells: to all, as the published baselines.
    """
    found: dict[str, Any] = {}
    for task, modality, cells in cohorts(scored, settings, drawn):
        assert task not in found, "one data set of pairs at a time"
        results = {
            result.model: {
                "kind": result.kind,
                "seeds": result.seeds,
                "values": {metric: values.tolist() for metric, values in result.values.items()},
                "reason": result.reasons.get("", ""),
            }
            for result in models(cells, modality)
        }
        found[task] = {"split": cells.split, "results": results}
    return found


def cohorts(scored: Any, settings: Any, drawn: float) -> Iterator[tuple[str, Any, Any]]:
    """Task, modality that is translated to (None: annotation), and the cells. ValueError if too few."""
    from cellray.tasks import missing
    from cellray.tasks.inputs import cohort
    from cellray.tasks.score import units
    from cellray.tasks.translation import task_name

    by_name = {modality.name: modality for modality in scored.modalities}
    for unit in units(scored):
        if unit.task == missing.TASK:
            continue
        modality = by_name[unit.modality] if unit.modality else None
        wanted = scored.paired(unit.dataset, unit.modality) if modality else scored.labelled(unit.dataset)
        often = {"seeds": settings.seeds, "bootstrap": settings.bootstrap}
        cells = cohort(scored, unit.dataset, wanted, **often, drawn=drawn)
        if isinstance(cells, str):
            raise ValueError(f"{unit}: {cells}")
        yield task_name(modality) if modality else unit.task, modality, cells


def silent(text: str) -> None:
    """Probes are quick."""


KINDS = {"train": trained, "compare": compared}
"""What a job may be."""


def work(job: dict[str, Any]) -> Mapping[str, Any]:
    return KINDS[job["kind"]](job)


if __name__ == "__main__":
    answer(work)
