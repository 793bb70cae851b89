"""The rows about ingest: cost against its bounds, and the same bytes from any number of tasks."""

import math
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.bench.datalayer.material import Material
from tests.bench.datalayer.reading import DRIVERS, RATE, Effort
from tests.bench.harness.report import Report, Row, ratio, spread
from tests.bench.harness.rounds import Driver, in_turns

CUT = 8
"""Into how many units and shards an atlas is cut at the least, so that several tasks have work."""


def ingest(report: Report, material: Material, effort: Effort) -> Iterator[Sequence[Driver]]:
    """One ingest each with 1, 2 and, unless quick, 4 tasks; a round of each of the bounds before.

    CPU time is that of all processes, Ray's own and its workers', found by a mark in their environment;
    from when Ray is up and its workers have imported what they need.
    """
    atlas, files = material.atlas(material.cells), [str(path) for path in material.files(material.cells)]
    store = material.store(atlas)
    bare = Driver("gzip .h5ad decode", DRIVERS + "gunzip", files)
    bound = Driver("decode + pack", DRIVERS + "packing", [str(store), *files])
    warm, scratch = material.atlas(min(4_096, material.cells)), material.folder / "cache" / "scratch"
    yield [bare, bound]
    # Falling, so that the workers that are needed have been at work just before.
    tasks = (2, 1) if material.quick else (4, 2, 1)
    settings = cut(store, material.cells)
    # Workers import and compile when they first do a thing, which is a cost of Ray and not of the cells:
    # so each is to have had a unit and a shard.
    few = cut(material.store(warm), min(4_096, material.cells))
    material.ingest(warm, scratch / "warm", tasks=material.cpus, settings=few)
    found = []
    for some in tasks:
        in_turns([bare, bound], rounds=1, seconds=effort.seconds)
        found.append(material.ingest(atlas, scratch / str(some), tasks=some, settings=settings))
    shutil.rmtree(scratch)
    rates = [run["cells"] / run["cpu"] for run in found]
    for driver in (bare, bound):
        value, note = statistics.median(driver.rates), f"{spread(driver.rates)}; {driver.about}"
        report.add(Row(what=driver.name, value=value, unit=RATE, note=note))
    for some, run, rate in sorted(zip(tasks, found, rates, strict=True), key=lambda item: item[0]):
        peak = ", ".join(f"{name} {value:,.0f}" for name, value in sorted(run["peak"].items()))
        note = f"{run['wall']:.1f} s, {run['cpu']:.1f} CPU-s for {run['cells']:,} cells; peak MB: {peak}"
        report.add(Row(what=f"ingest, {some} tasks at a time", value=rate, unit=RATE, note=note))
    for driver, goal, what in (
        (bare, 0.6, "bare decompression of the same .h5ad, by h5py"),
        (bound, None, "decompression as we do it, and packing of the same tokens, ranked before"),
    ):
        value, note = ratio(rates, driver.rates)
        note = f"{note}; CPU-seconds of all processes"
        what, baseline = f"ingest / {driver.name.replace('.h5ad ', '')}", what
        report.add(Row(what=what, value=value, unit="times", goal=goal, baseline=baseline, note=note))
    _scaling(report, tasks[::-1], found[::-1], settings)


def cut(store: Path, cells: int) -> dict[str, int]:
    """Settings by which an atlas of so many cells, as large as `store`, is cut into CUT parts or more."""
    size = sum(path.stat().st_size for path in store.rglob("*.arrow"))
    # Ingest estimates how large shards become: a tenth less leaves none missing.
    return {
        "unit_cells": min(4_096, math.ceil(cells / CUT)),
        "shard_bytes": min(128 << 20, size * 9 // (10 * CUT)),
    }


def _scaling(
    report: Report, tasks: Sequence[int], found: Sequence[dict[str, Any]], settings: dict[str, int]
) -> None:
    """What more tasks at a time change: no byte, but the time."""
    report.add(
        Row(
            what=f"identical manifests from {', '.join(map(str, tasks))} tasks",
            value=float(len({run["sha256"] for run in found}) == 1),
            unit="1 = yes",
            goal=1.0,
            note=f"sha256 of store.json: {', '.join(sorted({run['sha256'][:12] for run in found}))}",
        )
    )
    units = math.ceil(found[0]["cells"] / settings["unit_cells"])
    for some, run in zip(tasks[1:], found[1:], strict=True):
        note = f"{units} units of {settings['unit_cells']:,} cells, {run['shards']} shards"
        report.add(
            Row(
                what=f"ingest, {some} tasks / 1, wall time",
                value=found[0]["wall"] / run["wall"],
                unit="times",
                note=f"{note}; {some}.0 on {some} idle cores would be perfect",
            )
        )
