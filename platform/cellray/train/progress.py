"""What a person sees while a run goes on: one line a stage.

In a terminal the line is drawn again and again, and stays, with a mark, when its stage is done:

    unimodal.rna ✓ 1,200 steps in 1:42    12,345 cells/s  1.23M tokens/s  loss 0.432
    joint        ━━━━━━━━━━━━━───────  62%  11,870 cells/s  1.19M tokens/s  loss 0.214  0:42 left

Elsewhere (a file, a pipe, a job's log) it is plain text, a line now and then, without control characters.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal, TextIO

Mode = Literal["auto", "plain", "quiet"]
"""auto: a line that moves where there is a terminal, else plain text. quiet: nothing at all."""

PLAIN_SECONDS = 10.0
"""Least time between two lines of a stage in plain text."""
DRAW_SECONDS = 0.1
"""Least time between two drawings in a terminal."""
NAME = 12
"""Columns of a stage's name."""
BAR = (5, 30)
"""Fewest and most columns of a bar."""


class Progress:
    """The lines of a run, one stage after the other.

        with Progress() as progress:
            line = progress.stage("joint", total=1200)
            for done in range(1200):
                line.update(done + 1, cells_per_second=…, tokens_per_second=…, loss=…)
            line.finish()

    A stage that is not finished when the next begins, or when the `with` is left, is shown as stopped.
    `clock` gives seconds, for tests.
    """

    def __init__(
        self, mode: Mode = "auto", *, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.out = out or sys.stderr
        self.clock = clock
        self.quiet = mode == "quiet"
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        self.moving = mode == "auto" and self.out.isatty() and not dumb
        self.colour = self.moving and not os.environ.get("NO_COLOR")
        self.signs = _signs(self.out)
        self.line: Line | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def stage(self, name: str, total: int, *, done: int = 0, unit: str = "steps") -> "Line":
        """Begin the line of a stage of `total` units, of which `done` were done in an earlier run."""
        self._close()
        self.line = Line(self, name, total, done, unit)
        return self.line

    def say(self, text: str) -> None:
        """A line of text; the stage's own line, if there is one, goes on below it."""
        if self.quiet:
            return
        self._write(f"{self._erase()}{text}\n")
        if self.moving and self.line is not None:
            self.line.draw()

    def _close(self) -> None:
        if self.line is not None:
            self.line.stop()

    def _erase(self) -> str:
        return "\r\x1b[K" if self.moving else ""

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


class Line:
    """The line of one stage; made by `Progress.stage`."""

    def __init__(self, progress: Progress, name: str, total: int, done: int, unit: str) -> None:
        self.progress, self.name, self.total, self.unit = progress, name, max(total, 1), unit
        self.first = self.done = done
        self.begun = self.shown = progress.clock()
        self.facts: list[str] = []
        if progress.moving:
            self.draw()

    def update(
        self,
        done: int,
        *,
        cells_per_second: float | None = None,
        tokens_per_second: float | None = None,
        loss: float | None = None,
    ) -> None:
        """`done` units of the stage are done, whole run counted. Cheap: it draws only now and then."""
        self.done = min(done, self.total)
        self.facts = []
        if cells_per_second is not None:
            self.facts.append(f"{_short(cells_per_second)} cells/s")
        if tokens_per_second is not None:
            self.facts.append(f"{_short(tokens_per_second)} tokens/s")
        if loss is not None:
            self.facts.append(f"loss {loss:.3f}")
        now = self.progress.clock()
        if now - self.shown >= (DRAW_SECONDS if self.progress.moving else PLAIN_SECONDS):
            self.shown = now
            self.draw()

    def finish(self, note: str = "") -> None:
        """The stage is done; its line stays, with `note` at its end."""
        yes = self.progress.signs[2]
        seconds = self.progress.clock() - self.begun
        units = f"{self.total - self.first:,} {self.unit} in {_time(seconds)}"
        self._end([self.progress._paint(yes, "32") + f" {units}", *self.facts, *([note] if note else [])])

    def stop(self) -> None:
        """The stage ended before it was done: its line stays and says where."""
        no = self.progress.signs[3]
        share = f"stopped at {self.done:,} of {self.total:,} {self.unit}"
        self._end([self.progress._paint(no, "31") + f" {share}", *self.facts])

    def draw(self) -> None:
        """Show the line as it stands."""
        if self.progress.quiet:
            return
        percent = f"{100 * self.done // self.total:3d}%"
        facts = [*self.facts, *self._left()]
        if not self.progress.moving:
            where = f"({self.done:,} of {self.total:,} {self.unit})"
            self.progress._write("  ".join([f"{self.name:{NAME}} {percent} {where}", *facts]) + "\n")
            return
        columns = shutil.get_terminal_size().columns - 1
        while facts and self._bar_columns(percent, facts, columns) < BAR[0]:
            facts.pop(1 if len(facts) > 2 else 0)  # tokens/s is missed least, time left most
        bar = self._bar(max(0, min(BAR[1], self._bar_columns(percent, facts, columns))))
        text = "  ".join([f"{self.name:{NAME}} {bar} {percent}", *facts])
        self.progress._write(self.progress._erase() + text)

    def _bar_columns(self, percent: str, facts: list[str], columns: int) -> int:
        taken = max(NAME, len(self.name)) + 2 + len(percent) + sum(len(fact) + 2 for fact in facts)
        return columns - taken

    def _bar(self, columns: int) -> str:
        full = columns * self.done // self.total
        done, rest = self.progress.signs[0] * full, self.progress.signs[1] * (columns - full)
        return self.progress._paint(done, "36") + self.progress._paint(rest, "2")

    def _left(self) -> list[str]:
        """Time left at this run's own pace, once it has one."""
        fresh = self.done - self.first
        if not fresh:
            return []
        seconds = (self.progress.clock() - self.begun) / fresh * (self.total - self.done)
        return [f"{_time(seconds)} left"]

    def _end(self, parts: list[str]) -> None:
        self.progress.line = None
        if not self.progress.quiet:
            text = "  ".join([f"{self.name:{NAME}} {parts[0]}", *parts[1:]])
            self.progress._write(f"{self.progress._erase()}{text}\n")


def _signs(out: TextIO) -> tuple[str, str, str, str]:
    """Signs for done, not done, finished, stopped, in what `out` can write."""
    nice = ("━", "─", "✓", "✗")
    try:
        "".join(nice).encode(out.encoding or "ascii")
    except UnicodeEncodeError:
        return "#", "-", "done:", "stop:"
    return nice


def _short(number: float) -> str:
    """`1234.5` -> `1,234`, `1234567` -> `1.23M`: at most six signs."""
    if number < 9.95:
        return f"{number:.1f}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e5, "k")):
        if number >= size:
            unit = 1e3 if letter == "k" else size
            return f"{number / unit:.3g}{letter}" if number / unit < 999.5 else f"{number / unit:.0f}{letter}"
    return f"{number:,.0f}"


def _time(seconds: float) -> str:
    """`102` -> `1:42`, `4000` -> `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
