"""The rows about ingest: cost against bare decompression, and the same bytes from any number of tasks."""

import shutil
import statistics

from tests.bench.datalayer.material import Material
from tests.bench.datalayer.reading import DRIVERS, RATE, Effort
from tests.bench.harness.report import Report, Row, spread
from tests.bench.harness.rounds import Driver, in_turns


def ingest(report: Report, material: Material, effort: Effort) -> None:
    """One ingest each with 1, 2 and, unless quick, 4 tasks; a round of bare decompression before each.

    CPU time is that of all processes, Ray's own and its workers', found by a mark in their environment;
    from when Ray is up and its workers have imported what they need.
    """
    atlas = material.atlas(material.cells)
    files = [str(path) for path in material.files(material.cells)]
    warm, scratch = material.atlas(256), material.folder / "cache" / "scratch"
    tasks = (1, 2) if material.quick else (1, 2, 4)
    found = []
    with Driver("gunzip", DRIVERS + "gunzip", files) as bound:
        for cpus in tasks:
            in_turns([bound], rounds=1, seconds=effort.seconds)
            # The first starts the workers, whose imports are a cost of Ray and not of the cells.
            pairs = [(warm, scratch / "warm"), (atlas, scratch / str(cpus))]
            found.append(material.ingest(pairs, cpus=cpus)[1])
            shutil.rmtree(scratch)
    rates = [run["cells"] / run["cpu"] for run in found]
    report.add(
        Row(
            what="gzip .h5ad decode",
            value=statistics.median(bound.rates),
            unit=RATE,
            note=spread(bound.rates),
        )
    )
    for cpus, run, rate in zip(tasks, found, rates, strict=True):
        peak = ", ".join(f"{name} {value:,.0f}" for name, value in sorted(run["peak"].items()))
        note = f"{run['wall']:.1f} s, {run['cpu']:.1f} CPU-s for {run['cells']:,} cells; peak MB: {peak}"
        report.add(Row(what=f"ingest, {cpus} tasks at a time", value=rate, unit=RATE, note=note))
    shares = [rate / decode for rate, decode in zip(rates, bound.rates, strict=True)]
    report.add(
        Row(
            what="ingest / gzip decode",
            value=statistics.median(shares),
            unit="times",
            goal=0.6,
            baseline="bare decompression of the same .h5ad",
            note=f"{spread(shares)}; CPU-seconds of all processes",
        )
    )
    same = len({run["sha256"] for run in found}) == 1
    report.add(
        Row(
            what=f"identical manifests from {', '.join(map(str, tasks))} tasks",
            value=float(same),
            unit="1 = yes",
            goal=1.0,
            note=f"sha256 of store.json: {', '.join(sorted({run['sha256'][:12] for run in found}))}",
        )
    )
    report.add(
        Row(
            what="ingest, 2 tasks / 1, wall time",
            value=found[0]["wall"] / found[1]["wall"],
            unit="times",
            note="2.0 on two idle cores would be perfect",
        )
    )
