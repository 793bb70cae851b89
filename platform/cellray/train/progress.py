"""What a person sees while a run goes on: one line a stage.

In a terminal the line is drawn again and again, and stays, with a mark, when its stage is done:

    unimodal-rna ✓ 1,200 steps in 1:42  loss 0.432  12.3k cells/s  1.23M tok/s  wait 0%  MFU 41%
    joint        ━━━━━━━━━━━━━─────  62%  loss 0.214  11.9k cells/s  1.19M tok/s  wait 0%  MFU 38%  0:42 left

That, packing and memory have room in a terminal of 100 columns, if not the bar and every word. In a
narrower one what is missed least goes first.

Elsewhere (a file, a pipe, a job's log) it is plain text, a line now and then, without control characters.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
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
"""Fewest and most columns of a bar, where there is one."""
SIZES = ((1e3, "k"), (1e6, "M"), (1e9, "G"))
LEAST = ("memory", "packing", "tokens", "wait", "mfu", "cells", "loss", "left")
"""What is left out of a line that has no room for it, first what is missed least."""


class Progress:
    """The lines of a run, one stage after the other.

        with Progress() as progress:
            line = progress.stage("joint", total=1200)
            for done in range(1200):
                line.update(done + 1, loss=…, cells_per_second=…, tokens_per_second=…)
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
        self.facts: dict[str, str] = {}
        if progress.moving:
            self.draw()

    def update(
        self,
        done: int,
        *,
        loss: float | None = None,
        cells_per_second: float | None = None,
        tokens_per_second: float | None = None,
        data_wait_share: float | None = None,
        packing: float | None = None,
        mfu: float | None = None,
        peak_memory_bytes: float | None = None,
    ) -> None:
        """`done` units of the stage are done, whole run counted. Cheap: it draws only now and then."""
        self.done = min(done, self.total)
        self.facts = _facts(
            loss=(loss, "loss {:.3f}"),
            cells=(cells_per_second, "{} cells/s"),
            tokens=(tokens_per_second, "{} tok/s"),
            wait=(data_wait_share, "wait {:.0%}"),
            packing=(packing, "pack {:.0%}"),
            mfu=(mfu, "MFU {:.0%}"),
            memory=(peak_memory_bytes, "{}B"),
        )
        now = self.progress.clock()
        if now - self.shown >= (DRAW_SECONDS if self.progress.moving else PLAIN_SECONDS):
            self.shown = now
            self.draw()

    def finish(self, note: str = "") -> None:
        """The stage is done; its line stays, with `note` at its end."""
        seconds = self.progress.clock() - self.begun
        units = f"{self.total - self.first:,} {self.unit} in {time_text(seconds)}"
        self._end(self.progress.signs[2], "32", units, note)

    def stop(self) -> None:
        """The stage ended before it was done: its line stays and says where."""
        share = f"stopped at {self.done:,} of {self.total:,} {self.unit}"
        self._end(self.progress.signs[3], "31", share)

    def draw(self) -> None:
        """Show the line as it stands."""
        if self.progress.quiet:
            return
        percent = f"{100 * self.done // self.total:3d}%"
        facts = self.facts | self._left()
        if not self.progress.moving:
            where = f"({self.done:,} of {self.total:,} {self.unit})"
            self._show(f"{percent} {where}", facts.values(), "\n")
            return
        columns = shutil.get_terminal_size().columns - 1
        facts = self._fitting(facts, percent, columns)
        free = columns - self._width(facts, percent) - 1
        bar = f"{self._bar(min(BAR[1], free))} " if free >= BAR[0] else ""
        self._show(f"{bar}{percent}", facts.values())

    def _width(self, facts: dict[str, str], head: str) -> int:
        """Columns of the line with `facts` after `head`."""
        return max(NAME, len(self.name)) + 1 + len(head) + sum(2 + len(fact) for fact in facts.values())

    def _fitting(self, facts: dict[str, str], head: str, columns: int) -> dict[str, str]:
        """`facts`, in fewer words if all fit then; else those that there is room for."""
        short = dict(facts)
        for words in ((), (" left",), (" left", "/s")):
            for word in words:
                short = {name: text.replace(word, "") for name, text in short.items()}
            if self._width(short, head) <= columns:
                return short
        short = dict(facts)
        for name in LEAST:
            if self._width(short, head) <= columns:
                break
            short.pop(name, None)
        return short

    def _show(self, head: str, facts: Iterable[str], end: str = "") -> None:
        text = "  ".join([f"{self.name:{NAME}} {head}", *facts])
        self.progress._write(f"{self.progress._erase()}{text}{end}")

    def _bar(self, columns: int) -> str:
        full = columns * self.done // self.total
        done, rest = self.progress.signs[0] * full, self.progress.signs[1] * (columns - full)
        return self.progress._paint(done, "36") + self.progress._paint(rest, "2")

    def _left(self) -> dict[str, str]:
        """Time left at this run's own pace, once it has one."""
        fresh = self.done - self.first
        if not fresh:
            return {}
        seconds = (self.progress.clock() - self.begun) / fresh * (self.total - self.done)
        return {"left": f"{time_text(seconds)} left"}

    def _end(self, sign: str, colour: str, text: str, note: str = "") -> None:
        self.progress.line = None
        if self.progress.quiet:
            return
        facts = self.facts | ({"note": note} if note else {})
        if self.progress.moving:
            columns = shutil.get_terminal_size().columns - 1
            facts = self._fitting(facts, f"{sign} {text}", columns)
        self._show(f"{self.progress._paint(sign, colour)} {text}", facts.values(), "\n")


def _facts(**said: tuple[float | None, str]) -> dict[str, str]:
    """Name -> text of each value that there is; a place without a format takes the short number."""
    return {
        name: text.format(value if "{:" in text else _short(value))
        for name, (value, text) in said.items()
        if value is not None
    }


def _signs(out: TextIO) -> tuple[str, str, str, str]:
    """Signs for done, not done, finished, stopped, in what `out` can write."""
    nice = ("━", "─", "✓", "✗")
    try:
        "".join(nice).encode(out.encoding or "ascii")
    except UnicodeEncodeError:
        return "#", "-", "done:", "stop:"
    return nice


def _short(number: float) -> str:
    """`1234.5` -> `1,234`, `12345` -> `12.3k`, `1234567` -> `1.23M`: at most five signs."""
    if number < 9.95:
        return f"{number:.1f}"
    if number < 9999.5:
        return f"{number:,.0f}"
    size, letter = next((pair for pair in SIZES if number < 999.5 * pair[0]), SIZES[-1])
    return f"{number / size:.3g}{letter}" if number < 999.5 * size else f"{number / size:.0f}{letter}"


def time_text(seconds: float) -> str:
    """`102` -> `1:42`, `4000` -> `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
