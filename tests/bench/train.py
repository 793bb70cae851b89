"""Training: what the platform adds to a bare loop, what is computed in vain, what a cell costs beside others.

python -m tests.bench.train [--quick] [--only NAME …]

Everything is measured in rounds, A B C A B C …; a ratio is the median over the rounds of the ratio
within one round. Rates are of CPU-seconds of the process concerned, on one core, unless they say wall.
Stores are synthetic: 20,000 genes, 1,661 of them counted in a cell. Prints a table, writes
runs/bench/train.json.

With --quick a figure means what it means without, but on fewer cells, shallower networks and noisier.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.harness.sections import Section, Size, about, measure, sized

if TYPE_CHECKING:
    from tests.bench.harness.report import Report

SECTIONS = (
    "packing",
    "logits",
    "overhead",
    "context",
    "workers",
    "batches",
    "student",
    "peaks",
    "tables",
    "genes",
    "bf16",
    "gpu",
)
QUICK = ("packing", "logits", "overhead", "workers", "student", "genes", "gpu")
"""What --quick measures of these."""
PEAKS = {"student": 25_000, "peaks": 120_000, "tables": 1_150_000}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.train", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=SECTIONS,
        default=[],
        help=f"sections ({', '.join(SECTIONS)})",
    )
    parser.add_argument("--layers", type=int, help="of the networks over all genes [2; quick 1; published 6]")
    parser.add_argument("--out", default="runs/bench", help="results and stores [%(default)s]")
    found = sized(parser, Size(8_192, 5, 4.0), Size(1_024, 2, 0.7), cells="cells of a store")
    found.layers = found.layers or (1 if found.quick else 2)
    return found


def main() -> int:
    options = arguments()
    from tests.bench.harness.report import Report
    from tests.bench.training.loops import Place

    folder = Path(options.out).absolute()
    report = Report(folder / "train.json", quick=about(options))
    sections = [name for name in SECTIONS if name in (options.only or (QUICK if options.quick else SECTIONS))]
    place = Place(folder, options.cells)
    parts = made(report, place, options)
    # All at once would be many processes; one after another they take minutes to start.
    alone = [] if options.quick else [[name] for name in sections]
    for group in alone or [sections]:
        measure({name: parts[name] for name in group})
    print(f"written: {report.path}")
    return 0


def made(report: "Report", place: object, options: argparse.Namespace) -> dict[str, Section]:
    """What to call for the rows of each section."""
    from tests.bench.datalayer.reading import Effort
    from tests.bench.training import costs, gpu, loops
    from tests.bench.training.networks import Shape

    assert isinstance(place, loops.Place)
    effort, shape = Effort(options.rounds, options.seconds), Shape(layers=options.layers)
    cores = sorted(os.sched_getaffinity(0), reverse=True)
    return {
        "packing": lambda: costs.packing(report),
        "logits": lambda: costs.logits(report),
        "overhead": lambda: loops.overhead(report, place, effort, loops.SMALL),
        "context": lambda: loops.overhead(report, place, effort, loops.LONG),
        "workers": lambda: loops.workers(report, place, effort, loops.LONG, cores),
        "batches": lambda: loops.workers(report, place, effort, loops.LARGE, cores),
        "student": lambda: costs.student(report, place, effort, PEAKS["student"]),
        "peaks": lambda: costs.student(report, place, effort, PEAKS["peaks"]),
        "tables": lambda: costs.tables(report, place, effort, PEAKS["peaks"], PEAKS["tables"]),
        "genes": lambda: costs.published(report, effort, shape, "fp32"),
        "bf16": lambda: costs.published(report, effort, shape, "bf16"),
        "gpu": lambda: gpu.rows(report, options.rounds, 2 if options.quick else 10),
    }


if __name__ == "__main__":
    sys.exit(main())
