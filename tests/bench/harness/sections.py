"""A bench of several sections, each of which starts its drivers and then measures them in rounds."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.harness.rounds import Driver, started

Section = Callable[[], Iterator[Sequence[Driver]]]
"""Yields its drivers once, and when they have started measures them and adds rows to the report."""


@dataclass(frozen=True)
class Size:
    """How much is measured where no option says otherwise."""

    cells: int
    rounds: int
    seconds: float


def sized(parser: argparse.ArgumentParser, whole: Size, quick: Size, *, cells: str) -> argparse.Namespace:
    """The arguments, with --quick, --rounds, --seconds and --cells, which `cells` describes, filled in."""

    def defaults(name: str) -> str:
        return f"[{getattr(whole, name):,}; quick {getattr(quick, name):,}]"

    parser.add_argument("--quick", action="store_true", help="reduced sizes, under a minute")
    parser.add_argument("--cells", type=int, help=f"{cells} {defaults('cells')}")
    parser.add_argument("--rounds", type=int, help=f"rounds of each measurement {defaults('rounds')}")
    parser.add_argument("--seconds", type=float, help=f"least seconds of a round {defaults('seconds')}")
    found = parser.parse_args()
    size = quick if found.quick else whole
    found.cells = found.cells or size.cells
    found.rounds = found.rounds or size.rounds
    found.seconds = found.seconds or size.seconds
    if found.cells < 1_024:
        parser.error("--cells must be at least 1,024, one batch")
    return found


def about(found: argparse.Namespace) -> str:
    """On how little a quick run measures; "" of a whole one."""
    return f"{found.cells:,} cells, {found.rounds} rounds of {found.seconds:g} s" if found.quick else ""


def measure(sections: Mapping[str, Section]) -> None:
    """The rows of these sections, whose drivers start together."""
    start = time.perf_counter()
    running = {name: section() for name, section in sections.items()}
    drivers = [driver for section in running.values() for driver in next(section)]
    with started(drivers):
        print(f"… {len(drivers)} drivers started: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for name, section in running.items():
            start = time.perf_counter()
            assert next(section, None) is None, f"the section {name} yields its drivers once"
            print(f"… {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
