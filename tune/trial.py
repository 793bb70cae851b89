"""One trial of a sweep: what it keeps, and how its training is judged.

RUN/trials/NUMBER/               the trial's run
RUN/trials/NUMBER/reports.json   what it has told Tune so far
RUN/trials/NUMBER/outcome.json   what came of it, once it has finished or was stopped
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cellray.data import storage

EVERY = 5
"""Percent of a stage between two reports."""
LAST = 0.1
"""Share of a stage's steps over which its final loss is taken."""

Report = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of one trial."""

    trial: str
    """Its number; 000 is the recipe as it stands."""
    settings: dict[str, Any]
    loss: float | None
    percent: int
    """How far it came in the judged stage."""
    seconds: float
    state: str
    """finished, stopped (it was behind) or failed."""
    error: str = ""


def folder(run: str, number: str) -> str:
    """Where a trial of the sweep in `run` keeps its own things."""
    return storage.join(run, "trials", number)


def read_reports(url: str) -> list[Report]:
    path = storage.join(url, "reports.json")
    return list(json.loads(storage.read_bytes(path))) if storage.exists(path) else []


class Judge:
    """Turns the events of training into reports of one stage's loss.

    Progress is told in percent of the stage, because trials with other batches count other steps.
    A loss is the mean over the events since the last report, the final one that over the last
    tenth of the steps. `tell` gets all reports, the newest last.
    """

    def __init__(
        self,
        stage: str,
        before: list[Report],
        tell: Callable[[list[Report]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.tell, self.clock = stage, tell, clock
        self.reports = list(before)
        self.pending: list[float] = []
        self.began = clock() - (before[-1]["seconds"] if before else 0.0)

    def __call__(self, event: dict[str, Any]) -> None:
        if event["stage"] != self.stage:
            return
        if "finished" in event:
            self._report(100, final_loss(event["finished"]["curve"]))
        elif "losses" in event:
            self.pending.append(event["losses"]["loss"])
            percent = 100 * event["step"] // event["steps"]
            told = self.reports[-1]["percent"] if self.reports else 0
            if told + EVERY <= percent < 100:
                self._report(percent, sum(self.pending) / len(self.pending))
                self.pending = []

    def _report(self, percent: int, loss: float) -> None:
        seconds = round(self.clock() - self.began, 1)
        self.reports.append({"percent": percent, "loss": loss, "seconds": seconds})
        self.tell(self.reports)


def final_loss(curve: list[dict[str, float]]) -> float:
    """Mean loss of the last tenth of a stage's steps."""
    last = curve[-1]["step"]
    losses = [row["loss"] for row in curve if row["step"] > (1 - LAST) * last]
    return sum(losses) / len(losses)


def spell(value: Any) -> str:
    """A setting as a person reads it."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return ",".join(map(spell, value)) if isinstance(value, tuple | list) else str(value)
