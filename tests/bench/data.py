"""The data layer: feed and ingest against others, per CPU-second, with shuffle quality and memory.

python -m tests.bench.data [--quick] [--only NAME …] [--cells N]

Everything is measured in rounds, A B C A B C …; a ratio is the median over the rounds of the ratio
within one round. Rates are cells per CPU-second of all threads and children of the process concerned,
each on one and the same core. Prints a table, writes runs/bench/data.json.
"""

import argparse
import sys
import time
from pathlib import Path

SECTIONS = ("feed", "tokenizers", "vocabulary", "train", "memory", "ingest")
OTHERS = ("annbatch", "huggingface", "webdataset", "ray", "scdataset")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.data", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="reduced sizes, under a minute")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=(*SECTIONS, *OTHERS),
        default=[],
        help=f"sections ({', '.join(SECTIONS)}) or, of the section feed, competitors ({', '.join(OTHERS)})",
    )
    parser.add_argument("--cells", type=int, help="cells of the largest store [196,608; quick 4,096]")
    parser.add_argument("--rounds", type=int, help="rounds of each measurement [5; quick 2]")
    parser.add_argument("--seconds", type=float, help="least seconds of a round [2; quick 0.3]")
    parser.add_argument("--out", default="runs/bench", help="results, data and environments [%(default)s]")
    found = parser.parse_args()
    found.cells = found.cells or (4_096 if found.quick else 196_608)
    found.rounds = found.rounds or (2 if found.quick else 5)
    found.seconds = found.seconds or (0.3 if found.quick else 2.0)
    if found.cells < 1_024:
        parser.error("--cells must be at least 1,024, one batch")
    return found


def main() -> int:
    options = arguments()
    from tests.bench.datalayer import reading, writing
    from tests.bench.datalayer.material import Material
    from tests.bench.harness.report import Report, machine

    folder = Path(options.out).absolute()
    report = Report(folder / "data.json")
    material = Material(folder, options.cells, options.quick)
    effort = reading.Effort(options.rounds, options.seconds)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    others = [name for name in options.only if name in OTHERS] or list(OTHERS)
    sections = [name for name in options.only if name in SECTIONS]
    if options.only and any(name in OTHERS for name in options.only):
        sections.append("feed")
    sections = sections or list(SECTIONS)
    wanted = [] if sections == ["vocabulary"] else [material.atlas(options.cells)]
    material.stores(wanted + (reading.vocabularies(material) if "vocabulary" in sections else []))
    for section in sections:
        start = time.perf_counter()
        match section:
            case "feed":
                reading.feed(report, material, effort, others)
            case "tokenizers":
                reading.tokenizers(report, material, effort)
            case "vocabulary":
                reading.vocabulary(report, material, effort)
            case "train":
                reading.train(report, material, effort)
            case "memory":
                reading.memory(report, material, effort)
            case "ingest":
                writing.ingest(report, material, effort)
        print(f"… {section}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(f"written: {report.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
