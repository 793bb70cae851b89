"""Ingest and one epoch at growing sizes: memory of each process, cells per CPU-second, bytes a cell.

python -m tests.bench.scale [--quick] [--cells N …] [--atlas TABLE …]

Synthetic cells of 20,000 genes, as in tests.bench.data, in files of at most 65,536 cells; or the
atlases that are named. The files and a store of the largest size take 6 kB a cell of disk, its
ingest 10 kB more while it runs. Prints a table, writes runs/bench/scale.json.
"""

import argparse
import shutil
import sys
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="reduced sizes, under a minute")
    parser.add_argument("--cells", type=int, nargs="+", help="sizes [10,000 100,000; quick 2,048 8,192]")
    parser.add_argument("--atlas", nargs="+", default=[], help="tables of atlases instead")
    parser.add_argument("--out", default="runs/bench", help="results and data [%(default)s]")
    found = parser.parse_args()
    found.cells = found.cells or ([2_048, 8_192] if found.quick else [10_000, 100_000])
    return found


def main() -> int:
    options = arguments()
    from tests.bench.datalayer.material import Material
    from tests.bench.datalayer.reading import DRIVERS, RATE
    from tests.bench.harness.report import Report, Row
    from tests.bench.harness.rounds import Driver

    folder = Path(options.out).absolute()
    sizes = " and ".join(f"{cells:,}" for cells in options.cells)
    report = Report(folder / "scale.json", quick=f"{sizes} cells" if options.quick else "")
    material = Material(folder, max(options.cells), options.quick)
    atlases = [Path(path).absolute() for path in options.atlas] or list(map(material.atlas, options.cells))
    scratch = folder / "cache" / "scale"
    for atlas in atlases:
        store = scratch / "store"
        try:
            made = material.ingest(atlas, store)
            material.close()  # the next has a Ray of its own, whose processes have grown by nothing else
            cells = made["cells"]
            size = sum(path.stat().st_size for path in store.rglob("*.arrow")) / cells
            for process, peak in sorted(made["peak"].items()):
                what = f"ingest of {cells:,} cells, peak of a {process} process"
                report.add(Row(what=what, value=peak, unit="MB"))
            note = f"{made['wall']:,.0f} s with 2 tasks, {made['cpu']:,.0f} CPU-s of all processes"
            rate = cells / made["cpu"]
            report.add(Row(what=f"ingest of {cells:,} cells", value=rate, unit=RATE, note=note))
            report.add(Row(what=f"store of {cells:,} cells", value=size, unit="bytes a cell"))
            with Driver("feed", DRIVERS + "feed", [str(store)]) as driver:
                found = driver.ask(f"round 0 {cells}")
                used = driver.ask("memory")
            rate = found["cells"] / found["cpu"]
            report.add(Row(what=f"one epoch of {cells:,} cells", value=rate, unit=RATE))
            report.add(
                Row(
                    what=f"one epoch of {cells:,} cells, peak",
                    value=used["peak"],
                    unit="MB",
                    goal=700.0,
                    at_most=True,
                    note=f"{used['anonymous']:,.0f} MB of it anonymous in the end",
                )
            )
        finally:
            material.close()
            shutil.rmtree(scratch, ignore_errors=True)
    print(f"written: {report.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
