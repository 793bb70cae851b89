"""Atlas to token store: `python -m pipelines.ingest RECIPE [key=value …]`, into RUN/store or `store=`."""

import sys
from collections.abc import Sequence
from typing import Any

from cellray.data import storage
from cellray.train.progress import Line, Progress
from cellray.train.recipe import Recipe
from pipelines.command import Options, main


def run(recipe: Recipe, options: Options) -> int:
    """Ingest the recipe's atlas and print what became of it. A dry run only looks at the files."""
    url = recipe.store or storage.join(recipe.run, "store")
    if options.dry_run:
        print(foreseen(recipe, url))
        return 0
    from cellray import cluster
    from cellray.data.ingest import ingest

    with cluster.connect(), Progress(options.progress) as progress:
        report = ingest(recipe, url, Steps(progress))
    print(summary(report))
    print(f"\nstore: {url}")
    return 0


class Steps:
    """Shows what `ingest` says of its steps, a line each."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.name = ""
        self.line: Line | None = None

    def __call__(self, step: str, done: int, total: int) -> None:
        if step != self.name or self.line is None:
            self.name = step
            self.line = self.progress.stage(
                step, total, done=done, unit="shards" if step == "shards" else "rows"
            )
        self.line.update(done)
        if done == total:
            self.line.finish()


def foreseen(recipe: Recipe, url: str) -> str:
    """What an ingest would read, without reading a count."""
    from cellray.data.plan import survey

    plan = survey(recipe)
    rows = [["data set", "modality", "file", "cells", "dropped", "features", "numbers stored"]]
    for group in plan.groups:
        for part in group.parts:
            out = int(plan.dropped[group.name][part.cells].sum())
            sizes = [len(part.cells), out, len(part.features), part.stored]
            rows.append([group.name, part.file.modality, part.file.given, *(f"{n:,}" for n in sizes)])
    cells = sum(len(group.cells) for group in plan.groups)
    there = " is there already and" if storage.exists(storage.join(url, "store.json")) else ""
    lines = [*table(rows), "", f"{cells:,} cells; {url}{there} would hold the store; nothing was written"]
    lines += [f"cannot be read: {entry['dataset']}: {entry['reason']}" for entry in plan.failed]
    return "\n".join(lines)


def summary(report: dict[str, Any]) -> str:
    """The ingest report as a table: in, kept, and what was dropped why."""
    rows = [["data set", "modality", "cells", "kept", "features", "kept", "counts", "kept"]]
    notes = []
    for group in report["datasets"]:
        for name, part in group["modalities"].items():
            sizes = [
                part[f"{what}_{end}"] for what in ("cells", "features", "counts") for end in ("in", "kept")
            ]
            rows.append([group["name"], name, *(f"{n:,}" for n in sizes)])
            for what in ("cells", "features", "counts"):
                for reason, number in part[f"{what}_dropped"].items():
                    if number:
                        where = f"{group['name']} {name}"
                        notes.append(f"dropped: {where}: {number:,} {what}, {reason.replace('_', ' ')}")
    lines = [*table(rows), *notes]
    lines += [f"cannot be read: {entry['dataset']}: {entry['reason']}" for entry in report["failed"]]
    lines.append(f"{report['cells_kept']:,} of {report['cells_in']:,} cells kept")
    return "\n".join(lines)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns; numbers to the right. The first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [
        all(cell.replace(",", "").isdigit() for cell in column[1:]) for column in zip(*rows, strict=True)
    ]
    return [
        "  ".join(
            cell.rjust(width) if end else cell.ljust(width)
            for cell, width, end in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main("Turn an atlas into a token store.", run))
