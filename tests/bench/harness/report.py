"""Rows of a bench: printed as they come, and written as JSON in the end."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cellray


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure."""

    what: str
    value: float | None
    """None where nothing was measured; the note says why."""
    unit: str
    goal: float | None = None
    """None for a figure that is information only."""
    at_most: bool = False
    """Whether the goal is an upper limit."""
    baseline: str = ""
    """What the value is compared with."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None where there is no goal or no value."""
        if self.goal is None or self.value is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


class Report:
    """The rows of one bench. `path` is written whenever a row comes, so that a bench cut short left some."""

    def __init__(self, path: Path, say: Callable[[str], None] = print, *, quick: str = "") -> None:
        """Say what is measured on, and, if that is so, on how little, `quick`."""
        self.path, self.say, self.quick = path, say, quick
        say(", ".join(f"{key} {value}" for key, value in machine().items()))
        if quick:
            say(f"quick: {quick}; the same measurements as without --quick, noisier and on less")
        self.rows: list[Row] = []
        self.beside: dict[str, object] = {}
        """What more is written: settings, losses, all figures."""
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.say(line(row))
        rows = [
            {key: value for key, value in asdict(r).items() if key != "at_most"} | {"met": r.met}
            for r in self.rows
        ]
        text = json.dumps(self.about() | {"rows": rows}, indent=1, ensure_ascii=False)
        part = self.path.with_suffix(".part")
        part.write_text(text + "\n")
        os.replace(part, self.path)

    def about(self) -> dict[str, object]:
        """What stands above the rows."""
        return {"machine": machine()} | ({"quick": self.quick} if self.quick else {}) | self.beside


def line(row: Row) -> str:
    """A row as a line of the table."""
    value = "" if row.value is None else f"{row.value:,.0f}" if abs(row.value) >= 100 else f"{row.value:.3g}"
    sign = "≤" if row.at_most else "≥"
    goal = "" if row.goal is None else f"{sign} {row.goal:g}"
    met = {None: "", True: "met", False: "MISSED"}[row.met]
    against = " · ".join(part for part in (row.baseline and f"against {row.baseline}", row.note) if part)
    return f"{row.what:<46} {value:>10} {row.unit:<12} {goal:<8} {met:<7} {against}".rstrip()


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    named = [row for row in _read("/proc/cpuinfo").splitlines() if row.startswith("model name")]
    return {
        "cpu": named[0].partition(":")[2].strip() if named else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cellray": cellray.__version__,
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def spread(values: Sequence[float]) -> str:
    """Lowest and highest of several rounds, for a note."""
    return f"{len(values)} rounds, {min(values):,.3g} to {max(values):,.3g}"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, str]:
    """Median over the rounds of ours to theirs in the same round, and the spread of that."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), spread(ratios)
