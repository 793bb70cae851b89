"""Atlas to token store: `python -m pipelines.ingest RECIPE [key=value …]`, into RUN/store or `store=`."""

import json
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cellray.data import storage
from cellray.train.progress import Line, Progress
from cellray.train.recipe import Recipe
from pipelines.command import Options, main

if TYPE_CHECKING:
    from cellray.data.estimate import Estimate
    from cellray.data.plan import Plan

UNITS = ("bytes", "kB", "MB", "GB", "TB")


def run(recipe: Recipe, options: Options) -> int:
    """Ingest the recipe's atlas and say what became of it; 1 if data sets were left out and may not be.

    A dry run only looks at the files.
    """
    url = recipe.store or storage.join(recipe.run, "store")
    if options.dry_run:
        print(foreseen(recipe, url))
        return 0
    from cellray import cluster
    from cellray.data.ingest import ingest

    with cluster.connect(), Progress(options.progress) as progress:
        report = ingest(recipe, url, Steps(progress))
    write(report, url)
    print(summary(report))
    print(f"\nstore: {url}\nreport: {storage.join(url, 'ingest.html')}")
    return int(bool(report["failed"]) and not recipe.ingest.allow_failed_files)


def write(report: dict[str, Any], url: str) -> None:
    """The report beside the store, as JSON and as a page."""
    from cellray.data.page import page

    storage.write_bytes(storage.join(url, "ingest.json"), json.dumps(report, indent=1).encode())
    storage.write_bytes(storage.join(url, "ingest.html"), page(report).encode())


def complete(report: dict[str, Any], recipe: Recipe) -> None:
    """ValueError if data sets were left out and may not be."""
    if report["failed"] and not recipe.ingest.allow_failed_files:
        told = "; ".join(f"{entry['dataset']}: {entry['reason']}" for entry in report["failed"])
        raise ValueError(
            f"data sets could not be read: {told}. The others are in the store; mend these and run this "
            "again, or go on without them by ingest.allow_failed_files=true."
        )


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
    """What an ingest would read and take, from names and a few rows of the files."""
    from cellray.data.editions import newest
    from cellray.data.estimate import estimate
    from cellray.data.plan import inputs_of, survey

    held = newest(url)
    plan = survey(recipe, inputs_of(recipe), held.report if held else None)
    rows = [["data set", "modality", "species", "file", "cells", "dropped", "features", "unknown", "numbers"]]
    for group in plan.groups:
        for part in group.parts:
            out = int(plan.dropped[group.name][part.cells].sum())
            sizes = [len(part.cells), out, len(part.features.names), part.features.unknown, part.stored]
            told = [group.name, part.file.modality, group.species or "?", part.file.given]
            rows.append([*told, *(f"{n:,}" for n in sizes)])
    lines = [*table(rows), ""] if plan.groups else []
    lines += [f"cannot be read: {entry['dataset']}: {entry['reason']}" for entry in plan.failed]
    if held:
        lines.append(f"{url} is there already, with {held.report['cells_kept']:,} cells")
    if plan.groups:
        lines += _sizes(plan, estimate(plan), recipe)
    lines.append(f"{url} would hold the store; nothing was written")
    return "\n".join(lines)


def _sizes(plan: "Plan", found: "Estimate", recipe: Recipe) -> list[str]:
    """What an ingest would take, in words."""
    sizes = {row["url"]: row.get("bytes", 0) for row in plan.inputs["files"]}
    cores = os.cpu_count() or 1
    return [
        f"to read: {found.cells:,} cells in {len(sizes):,} files of {size(sum(sizes.values()))}, "
        f"{found.tokens:,} counts",
        f"store: about {size(found.store_bytes)}, and {size(found.scratch_bytes)} more until it is whole",
        f"time: about {clock(found.cpu_seconds)} of one core, {clock(found.cpu_seconds / cores)} on the "
        f"{cores} here, by what {found.tried:,} rows took",
        f"memory: about {size(found.task_bytes)} a task, one a core; ingest.unit_cells="
        f"{recipe.ingest.unit_cells} sets it",
    ]


def size(number: float) -> str:
    """Bytes in a unit that reads well."""
    if number < 1000:
        return f"{number:.0f} bytes"
    power = min(4, int(math.log10(number) // 3))
    scaled = number / 1000**power
    return f"{scaled:,.0f} {UNITS[power]}" if scaled >= 100 else f"{scaled:.1f} {UNITS[power]}"


def clock(seconds: float) -> str:
    """Seconds in a unit that reads well."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


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
