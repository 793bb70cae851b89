"""python -m pipelines.score RECIPE [key=value …]: every task beside its baselines, in RUN/scores.json."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cellray import cluster
from cellray.data import storage
from cellray.train.progress import Progress
from cellray.train.recipe import Recipe
from pipelines.command import Options, main
from pipelines.export import has_rna, some

MOST = 20_000
"""Most held-out cells, and most training cells, that are scored and fitted on."""
CPUS = 2
"""Of the cluster's, for one task: a laptop's Ray counts four for its two cores."""
TIMED = 2_000
"""Most cells the student's speed is measured on."""


def run(recipe: Recipe, options: Options) -> None:
    from cellray.tasks import report
    from cellray.train.run import Run

    where = Run(recipe)
    if options.dry_run:
        print(f"would score the run in {where.url} on its held-out cells, over {recipe.score.seeds} seeds")
        return
    with cluster.connect(), Progress(options.progress) as progress:
        rows = score(where, gather(where), progress)
    print(report.table(rows))


def score(run: Any, scored: Any, progress: Progress) -> list[dict[str, Any]]:
    """Rows of scores, also written to RUN/scores.json. Every task on every data set is a Ray task."""
    import ray

    from cellray.tasks import score as tasks

    work = tasks.units(scored)
    line = progress.stage("score", len(work), unit="tasks")
    shared, task = ray.put(scored), ray.remote(num_cpus=CPUS)(tasks.score_unit)
    pending = {task.remote(shared, unit, run.recipe.score, silent): i for i, unit in enumerate(work)}
    rows: list[list[dict[str, Any]]] = [[] for _ in work]
    while pending:
        (ready,), _ = ray.wait(list(pending))
        rows[pending.pop(ready)] = ray.get(ready)
        line.update(len(work) - len(pending))
    line.finish()
    flat = [row for part in rows for row in part]
    storage.write_bytes(run.path("scores.json"), json.dumps(flat, indent=1).encode())
    return flat


def silent(text: str) -> None:
    """Scoring tells its steps to whoever listens; in a task nobody does."""


def saved(run: Any) -> list[dict[str, Any]]:
    """The scores of a run, none if it has not been scored."""
    try:
        return list(json.loads(storage.read_bytes(run.path("scores.json"))))
    except FileNotFoundError:
        return []


def gather(run: Any) -> Any:
    """Cells, counts and the embeddings of every model that is compared: what the tasks read."""
    import pandas as pd
    import torch

    from cellray.embedder import vectors
    from cellray.tasks.inputs import Scored
    from cellray.train.targets import TeacherVectors, read_table

    store, recipe = run.store, run.recipe
    tokenizer = run.tokenizer
    test = run.test
    rows = np.sort(np.concatenate([some(np.flatnonzero(test), MOST), some(np.flatnonzero(~test), MOST)]))
    batch = store.read(rows)
    teacher = TeacherVectors(read_table(run.teacher_path()), store.cells["cell_id"].combine_chunks())
    students = {
        "student": run.trained_student(),
        "rna_only": run.trained_student("control"),
        "random": run.student().eval(),
    }
    rna = batch.counts["rna"]
    embeddings = {name: vectors(student, tokenizer, rna) for name, student in students.items()}

    def translate(name: str) -> Callable[[str, np.ndarray, np.ndarray], np.ndarray]:
        def decode(modality: str, cells: np.ndarray, features: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                cell = torch.from_numpy(embeddings[name][cells])
                ids = torch.from_numpy(np.asarray(features, np.int64))
                return np.asarray(students[name].decoder(modality)(cell, ids).numpy())

        return decode

    cells = store.cells.select(["cell_id", "dataset", "donor", "batch", "label"]).take(rows).to_pandas()
    about = {entry["name"]: entry for entry in store.manifest["ingest"]["datasets"]}
    sizes = {name: len(v) for name, v in tokenizer.vocabularies.items()}
    return Scored(
        cells=cells.assign(test=test[rows]),
        units=run.units,
        modalities=tokenizer.modalities,
        counts={name: c.matrix(sizes[name]) for name, c in batch.counts.items()},
        totals={name: c.total for name, c in batch.counts.items()},
        present={name: (batch.present >> i) & 1 == 1 for i, name in enumerate(batch.counts)},
        embeddings={**embeddings, "teacher": teacher.joint[torch.from_numpy(rows)].numpy()},
        translate={name: translate(name) for name in ("student", "random")},
        targets=pd.read_csv(recipe.score.targets) if recipe.score.targets else None,
        label_from={name: e["label_from"] for name, e in about.items() if e.get("label_from")},
    )


def student_facts(run: Any) -> dict[str, Any]:
    """Sizes and speed of the student, for the report; speed on held-out cells, on one core."""
    from cellray.embedder import vectors

    student, teacher = run.trained_student(), run.trained_teacher()
    rows = some(np.flatnonzero(run.test & has_rna(run)), TIMED)
    counts = run.store.read(rows).counts["rna"]
    vectors(student, run.tokenizer, counts)
    began = time.process_time()
    vectors(student, run.tokenizer, counts)
    seconds = time.process_time() - began
    path, rna = student.path(), teacher.rna_path()
    return {
        "parameters": sum(p.numel() for module in path for p in module.parameters()),
        "teacher_parameters": sum(p.numel() for module in rna for p in module.parameters()),
        "cells_per_cpu_second": round(len(rows) / max(seconds, 1e-9), 1),
    }


if __name__ == "__main__":
    sys.exit(main("Score a run's student beside simple baselines, on cells that training never saw.", run))
