"""Write a simulated atlas with known truth: python -m pipelines.simulate DIR [key=value …]"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from cellray.data.truth import Simulation
from cellray.train.recipe import override
from pipelines import command

EPILOG = """\
DIR/atlas.csv is the table that a recipe's atlas= names, DIR/truth.csv what score.targets= may name.
A DIR that holds this very simulation is left as it is, one with other content is refused."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line on the error stream where the settings or DIR are refused."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.simulate",
        description="Write a multi-omic atlas with known truth, as several files in mixed formats.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", nargs="?", help="folder to write; it must be new or empty")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings, as cells=20000 seed=1")
    parser.add_argument("-h", "--help", action="store_true", help="show this, with all settings")
    args = parser.parse_args(argv)
    try:
        simulation = override(Simulation(), command.changes(args.settings))
        if args.help:
            settings: Any = simulation
            print(
                parser.format_help() + "\n" + command.describe(settings, shutil.get_terminal_size().columns)
            )
            return 0
        if args.folder is None or "=" in args.folder:
            parser.error("DIR is missing: name the folder to write")
        from cellray.data.simulate import simulate

        atlas = simulate(args.folder, simulation)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{simulation.cells:,} cells, {simulation.genes:,} genes, {simulation.peaks:,} peaks, "
        f"{simulation.proteins:,} proteins, seed {simulation.seed}: {atlas}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
