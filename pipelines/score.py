"""python -m pipelines.score RECIPE [key=value …]: every task beside its baselines, in RUN/scores.json."""

import json
import sys
from dataclasses import replace
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
"""Most cells a student's speed is measured on."""


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
    """Cells, counts and the embeddings of every model that is compared: what the tasks read.

    Of several kinds of student the one that `students.choose` takes; RUN/students.json has them all.
    """
    import pandas as pd
    import torch

    from cellray.embedder import vectors
    from cellray.tasks.inputs import Scored, Translate
    from cellray.train.targets import TeacherVectors, read_table

    store, recipe = run.store, run.recipe
    tokenizer = run.tokenizer
    test = run.test
    rows = np.sort(np.concatenate([some(np.flatnonzero(test), MOST), some(np.flatnonzero(~test), MOST)]))
    batch = store.read(rows)
    teacher = TeacherVectors(read_table(run.teacher_path()), store.cells["cell_id"].combine_chunks())
    rna = batch.counts["rna"]
    students = {kind: run.trained_student(stage) for stage, kind in run.students().items()}
    kinds = list(students)
    students["rna_only"] = run.trained_student("control")
    embeddings = {name: vectors(student, tokenizer, rna) for name, student in students.items()}
    embeddings["teacher"] = teacher.joint[torch.from_numpy(rows)].numpy()

    def translate(name: str) -> Translate:
        def decode(modality: str, cells: np.ndarray, features: np.ndarray, level: bool) -> np.ndarray:
            decoder = students[name].decoder(modality)
            with torch.inference_mode():
                cell = torch.from_numpy(embeddings[name][cells])
                ids = torch.from_numpy(np.asarray(features, np.int64))
                depth = decoder.reference.expand(len(cell)) if level else None
                return np.asarray(decoder(cell, ids, depth).numpy())

        return decode

    cells = store.cells.select(["cell_id", "dataset", "donor", "batch", "label"]).take(rows).to_pandas()
    about = {entry["name"]: entry for entry in store.manifest["ingest"]["datasets"]}
    sizes = {name: len(v) for name, v in tokenizer.vocabularies.items()}
    first = kinds[0]
    scored = Scored(
        cells=cells.assign(test=test[rows]),
        units=run.units,
        modalities=tokenizer.modalities,
        counts={name: c.matrix(sizes[name]) for name, c in batch.counts.items()},
        totals={name: c.total for name, c in batch.counts.items()},
        present={name: (batch.present >> i) & 1 == 1 for i, name in enumerate(batch.counts)},
        embeddings={
            "student": embeddings[first],
            "random": embeddings[first],
            **{name: embeddings[name] for name in ("rna_only", "teacher")},
        },
        translate={name: translate(first) for name in ("student", "random")},
        targets=pd.read_csv(recipe.score.targets) if recipe.score.targets else None,
        label_from={name: e["label_from"] for name, e in about.items() if e.get("label_from")},
    )
    kind = compared(run, scored, {kind: embeddings[kind] for kind in kinds})["kind"]
    students["random"] = run.student(kind).eval()
    embeddings["random"] = vectors(students["random"], tokenizer, rna)
    return replace(
        scored,
        embeddings={**scored.embeddings, "student": embeddings[kind], "random": embeddings["random"]},
        translate={"student": translate(kind), "random": translate("random")},
    )


def compared(run: Any, scored: Any, embeddings: dict[str, np.ndarray]) -> dict[str, Any]:
    """What RUN/students.json holds from now on: the `kind` that is scored, `why`, and all `kinds`.

    Their speed is that on held-out cells, on one core.
    """
    from cellray.tasks import students

    rows = some(np.flatnonzero(run.test & has_rna(run)), TIMED)
    counts = run.store.read(rows).counts["rna"]
    costs = {
        kind: students.cost(run.trained_student(stage), run.tokenizer, counts)
        for stage, kind in run.students().items()
    }
    kinds = students.compare(scored, embeddings, costs, run.recipe.score)
    kind, why = students.choose(kinds, run.recipe.score.student)
    facts = {"kind": kind, "why": why, "kinds": kinds}
    storage.write_bytes(run.path("students.json"), json.dumps(facts, indent=1).encode())
    return facts


def saved_kinds(run: Any) -> dict[str, Any] | None:
    """What RUN/students.json holds; None if the run has not been scored."""
    try:
        return dict(json.loads(storage.read_bytes(run.path("students.json"))))
    except FileNotFoundError:
        return None


def student_facts(run: Any) -> dict[str, Any]:
    """The kinds of student that `gather` compared, for the report, and the sizes of the one it took."""
    facts = saved_kinds(run)
    assert facts is not None, "nothing was gathered yet"
    own = next(kind for kind in facts["kinds"] if kind["kind"] == facts["kind"])
    teacher = run.trained_teacher()
    return {
        "parameters": own["parameters"],
        "teacher_parameters": sum(p.numel() for module in teacher.rna_path() for p in module.parameters()),
        "cells_per_cpu_second": own["cells_per_cpu_second"],
        **facts,
    }


if __name__ == "__main__":
    sys.exit(main("Score a run's student beside simple baselines, on cells that training never saw.", run))
