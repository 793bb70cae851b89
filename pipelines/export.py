"""python -m pipelines.export RECIPE [key=value …]: the trained student as a bundle, in RUN/bundle."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cellray.train.recipe import Recipe, fingerprint
from pipelines.command import Options, main

FITTED = 20_000
"""Most training cells the label head and the reference statistics are fitted on."""


def run(recipe: Recipe, options: Options) -> None:
    from cellray.train.run import Run

    where = Run(recipe)
    if options.dry_run:
        print(f"would write the student ({recipe.score.student}) of {where.url} to {where.path('bundle')}")
        return
    url, digest = export(where)
    print(f"bundle: {url}\nsha256: {digest}")


def export(run: Any, scores: Sequence[Mapping[str, Any]] | None = None) -> tuple[str, str]:
    """Write RUN/bundle; its URL and hash. `scores` are rows for its card; None takes those of RUN.

    Which kind of student: as `score.student` says, see `chosen`. ValueError as `refuse` says.
    """
    from cellray import bundle

    refuse(run.recipe)
    embedder = student_of(run, scores)
    golden = run.store.read(some(np.flatnonzero(run.test & has_rna(run)), bundle.GOLDEN)).counts["rna"]
    url = run.path("bundle")
    return url, bundle.write(url, embedder, golden=golden)


def refuse(recipe: Recipe) -> None:
    """ValueError for the run of a method that is there to be compared with, not to be used."""
    if recipe.method != "cellray":
        raise ValueError(
            f"method={recipe.method} has no bundle: it is a baseline. Run pipelines.ingest, "
            "pipelines.pretrain and pipelines.score with its recipe."
        )


def student_of(run: Any, scores: Sequence[Mapping[str, Any]] | None = None) -> Any:
    """The run's student as an embedder: its label head and reference fitted on training cells."""
    from cellray.embedder import Embedder
    from cellray.train.stages import distil_stage
    from pipelines.score import saved

    store = run.store
    choice = chosen(run)
    if scores is None:
        scores = saved(run) if choice["scored"] else []
    # How fast each was is left out: the same run is to give the same bundle.
    kinds = [{k: v for k, v in kind.items() if k != "cells_per_cpu_second"} for kind in choice["kinds"]]
    rows = some(np.flatnonzero(~run.test & has_rna(run)), FITTED)
    labels = store.cells["label"].to_numpy(zero_copy_only=False)[rows].astype(str)
    return Embedder.fit(
        run.trained_student(distil_stage(choice["kind"])),
        run.tokenizer,
        store.read(rows).counts["rna"],
        labels,
        about={
            "name": "cellray student",
            "datasets": datasets(run),
            "donors": sorted(set(store.cells["donor"].filter(~run.test).to_pylist()) - {""}),
            "scores": list(scores),
            "kinds": kinds,
            "chosen": choice["why"],
            "run": {"recipe": fingerprint(run.recipe), "store": store.hash},
        },
    )


def chosen(run: Any) -> dict[str, Any]:
    """The `kind` of student to export, `why`, all `kinds` as far as they were compared, and whether the
    scores of the run are that kind's (`scored`).

    With several kinds and `score.student=auto`, they are compared now unless they have been.
    """
    from cellray.tasks import students
    from pipelines.score import gather, saved_kinds

    asked, trained = run.recipe.score.student, run.recipe.student.kinds
    facts = saved_kinds(run)
    if facts is None and asked == "auto" and len(trained) > 1:
        gather(run)
        facts = saved_kinds(run)
    kinds = facts["kinds"] if facts else [{"kind": kind} for kind in trained]
    kind, why = students.choose(kinds, asked)
    return {
        "kind": kind,
        "why": why,
        "kinds": kinds if facts else [],
        "scored": facts is None or facts["kind"] == kind,
    }


def datasets(run: Any) -> list[dict[str, Any]]:
    """What each data set holds, for the card."""
    cells = run.store.cells.select(["dataset", "donor", "assay", "species", "tissue"]).to_pandas()
    found = []
    for name, part in cells.groupby("dataset"):
        facts: dict[str, Any] = {"name": name, "cells": len(part), "held out by": run.units[str(name)]}
        for column in ("donor", "assay", "species", "tissue"):
            facts[column + "s" * (column != "species")] = ", ".join(sorted(set(part[column]) - {""}))
        found.append(facts)
    return found


def has_rna(run: Any) -> np.ndarray:
    """Cells measured in RNA, bool [cells]."""
    bit = list(run.store.tokenizer.vocabularies).index("rna")
    return np.asarray((run.store.cells["present"].to_numpy() >> bit) & 1 == 1)


def some(rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of `rows`, evenly spaced; the store is shuffled, so they are a fair sample."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


if __name__ == "__main__":
    sys.exit(main("Write the trained student of a run as a bundle.", run))
