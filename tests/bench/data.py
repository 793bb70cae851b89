"""The data layer: feed and ingest against others, per CPU-second, with shuffle quality and memory.

python -m tests.bench.data [--quick] [--only NAME …] [--cells N]

Everything is measured in rounds, A B C A B C …; a ratio is the median over the rounds of the ratio
within one round. Rates are cells per CPU-second of all threads and children of the process concerned,
each on one and the same core. Prints a table, writes runs/bench/data.json.

With --quick a figure means what it means without, but on fewer cells and noisier, and competitors
that have no environment yet are left out: a run without --quick makes their environments.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.harness.sections import Section, Size, about, measure, sized

if TYPE_CHECKING:
    from tests.bench.datalayer.material import Material
    from tests.bench.datalayer.reading import Effort
    from tests.bench.harness.report import Report

SECTIONS = ("ingest", "feed", "tokenizers", "vocabulary", "train", "memory")
OTHERS = ("annbatch", "huggingface", "webdataset", "ray", "scdataset")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.data", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=(*SECTIONS, *OTHERS),
        default=[],
        help=f"sections ({', '.join(SECTIONS)}) or, of the section feed, competitors ({', '.join(OTHERS)})",
    )
    parser.add_argument("--out", default="runs/bench", help="results, data and environments [%(default)s]")
    return sized(parser, Size(196_608, 5, 2.0), Size(4_096, 2, 0.3), cells="cells of the largest store")


def main() -> int:
    options = arguments()
    from tests.bench.datalayer import reading
    from tests.bench.datalayer.material import Material
    from tests.bench.harness.report import Report, Row

    folder = Path(options.out).absolute()
    report = Report(folder / "data.json", quick=about(options))
    material = Material(folder, options.cells, options.quick, cpus=2 if options.quick else 4)
    effort = reading.Effort(options.rounds, options.seconds)
    others = [name for name in options.only if name in OTHERS]
    sections = [name for name in SECTIONS if name in options.only or (name == "feed" and others)]
    if not sections:
        left_out = reading.LEFT_OUT if options.quick else {}
        sections = [name for name in SECTIONS if name not in left_out]
        for name, what in left_out.items():
            why = f"left out: it takes too long; run without --quick, or with --quick --only {name}"
            report.add(Row(what=what, value=None, unit="times", goal=0.9, note=why))
    parts = made(report, material, effort, others or OTHERS)
    try:
        if "ingest" in sections:
            assert material.ray  # it starts while files are written
        wanted = [] if sections == ["vocabulary"] else [material.atlas(options.cells)]
        material.stores(wanted + (reading.vocabularies(material) if "vocabulary" in sections else []))
        # All sections' drivers at once would be many processes; one after another they take minutes to start.
        alone = [name for name in sections if name == "ingest" or not options.quick]
        for group in [*([name] for name in alone), [name for name in sections if name not in alone]]:
            if "ingest" not in group:
                material.dismiss()
            measure({name: parts[name] for name in group})
    finally:
        material.close()
    print(f"written: {report.path}")
    return 0


def made(
    report: "Report", material: "Material", effort: "Effort", others: Sequence[str]
) -> dict[str, Section]:
    """What to call for the rows of each section."""
    from tests.bench.datalayer import reading, writing

    return {
        "ingest": lambda: writing.ingest(report, material, effort),
        "feed": lambda: reading.feed(report, material, effort, others),
        "tokenizers": lambda: reading.tokenizers(report, material, effort),
        "vocabulary": lambda: reading.vocabulary(report, material, effort),
        "train": lambda: reading.train(report, material, effort),
        "memory": lambda: reading.memory(report, material, effort),
    }


if __name__ == "__main__":
    sys.exit(main())
