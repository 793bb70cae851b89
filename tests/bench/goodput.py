"""Goodput: how much of a training's time goes into steps that count, while its workers are killed.

python -m tests.bench.goodput [--quick] [--minutes 15] [--every 60] [--checkpoint 1]

A real run: the command's own training loop on Ray Train, two workers, a stage of the default model on
simulated cells. Every minute one worker, drawn at random, gets a SIGKILL. What a kill costs is the time
between the row of metrics before it and the first one after it, less the seconds of steps between them
that were not done twice; it is split by what could be seen from outside:

    noticed     until Ray has seen it and ended the other worker
    processes   until the new ones exist
    imports     until the training function runs in them
    loading     until model and optimiser are those of the checkpoint
    again       steps that are done again, and the first batch

Goodput is also given against the steps a second of a run that nobody disturbs and that saves nothing:
that leaves nothing out, and is as good as the machine is quiet. The CPU-seconds of a restart are what it
costs on any machine: divided by the cores, seconds it takes at the least.
Prints a table, writes runs/bench/goodput.json.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.bench.harness.report import Report

PARTS = ("noticed", "processes", "imports", "loading", "again")
Event = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.goodput", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="three kills, about two minutes")
    parser.add_argument("--minutes", type=float, help="of training under kills [15; quick 1]")
    parser.add_argument("--every", type=float, help="seconds between two kills [60; quick 20]")
    parser.add_argument("--checkpoint", type=float, default=1.0, help="checkpoint_seconds [%(default)s]")
    parser.add_argument("--workers", type=int, default=2, help="training workers [%(default)s]")
    parser.add_argument("--out", default="runs/bench", help="results and data [%(default)s]")
    found = parser.parse_args()
    found.minutes = found.minutes or (1.0 if found.quick else 15.0)
    found.every = found.every or (20.0 if found.quick else 60.0)
    return found


@dataclass
class Kill:
    """A worker that was killed, and what was seen of the processes then; times are Unix seconds."""

    at: float
    gone: float = 0.0
    """When the last worker of the old group had ended."""
    started: float = 0.0
    """When the last process of the new group was started, or `gone` if that was before."""
    cpu: float = 0.0
    """CPU-seconds that the processes started since had taken when the checkpoint was loaded."""


@dataclass
class Watched:
    """What a run told of itself, and what was done to it."""

    events: list[Event] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)

    def rows(self) -> list[Event]:
        """The rows of metrics."""
        return [event for event in self.events if "seconds" in event]

    def after(self, name: str, since: float) -> float:
        """When the first event of that name after `since` was heard of, 0 if there is none yet."""
        return next((float(e["at"]) for e in list(self.events) if name in e and e["at"] > since), 0.0)


def goodput(rows: Sequence[Event]) -> float:
    """Share of the time between the first and the last row that went into steps that count."""
    first, last = rows[0], rows[-1]
    return float((last["seconds"] - first["seconds"]) / (last["time"] - first["time"]))


def cost(watched: Watched, kill: Kill) -> dict[str, float]:
    """Seconds that a kill cost, by part; the parts add up to the whole."""
    rows = watched.rows()
    begun = watched.after("begun", kill.at)
    resumed = watched.after("resumed", kill.at) or begun
    before = [row for row in rows if row["time"] < kill.at][-1]
    after = next(row for row in rows if row["time"] > resumed)
    whole = (after["time"] - before["time"]) - (after["seconds"] - before["seconds"])
    edges = [kill.at, kill.gone, max(kill.gone, kill.started), begun, resumed]
    found = [b - a for a, b in itertools.pairwise(edges)]
    return dict(zip(PARTS, [*found, whole - sum(found)], strict=True))


@dataclass(frozen=True)
class Process:
    """A process as the system describes it."""

    parent: int
    name: str
    started: float
    """Unix seconds."""
    cpu: float
    """CPU-seconds so far."""


def below(driver: int) -> dict[int, Process]:
    """The living descendants of a process."""
    found, tick = {}, os.sysconf("SC_CLK_TCK")
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "stat").read_text().rpartition(")")[2].split()
                name = (folder / "cmdline").read_text()
            except OSError:
                continue
            if words[0] != "Z":
                cpu = (int(words[11]) + int(words[12])) / tick
                found[int(folder.name)] = Process(int(words[1]), name, booted + int(words[19]) / tick, cpu)

    def descends(pid: int) -> bool:
        while pid in found and pid != driver:
            pid = found[pid].parent
        return pid == driver

    return {pid: process for pid, process in found.items() if pid != driver and descends(pid)}


def trainers() -> dict[int, Process]:
    """Ray Train's workers of this process."""
    return {pid: each for pid, each in below(os.getpid()).items() if "RayTrainWorker" in each.name}


class Killer(threading.Thread):
    """Kills a worker of this process's run every `every` seconds, `number` times, then has the run stop."""

    def __init__(self, watched: Watched, *, every: float, number: int, calm: float) -> None:
        super().__init__(name="killer", daemon=True)
        self.watched, self.every, self.number, self.calm = watched, every, number, calm
        self.stop, self.over = threading.Event(), threading.Event()

    def run(self) -> None:
        while not self.watched.rows() and not self.over.wait(0.05):
            pass
        draw, due = random.Random(0), time.time() + self.calm
        for _ in range(self.number):
            due += self.every
            if self.over.wait(max(0.0, due - time.time())):
                return
            self._kill(draw)
        self.over.wait(self.every / 2)
        self.stop.set()

    def _kill(self, draw: random.Random) -> None:
        while not (old := trainers()) and not self.over.wait(0.02):
            pass
        kill = Kill(time.time())
        os.kill(draw.choice(sorted(old)), signal.SIGKILL)
        self.watched.kills.append(kill)
        while old.keys() & trainers().keys() and not self.over.wait(0.02):
            pass
        kill.gone = time.time()
        while not self.watched.after("begun", kill.at) and not self.over.wait(0.05):
            kill.started = max([kill.gone, *(each.started for each in trainers().values())])
        # A group that found no checkpoint begins anew, and says nothing of it.
        while not (self.watched.after("resumed", kill.at) or self.watched.after("seconds", kill.started)):
            if self.over.wait(0.02):
                return
        fresh = [each.cpu for each in below(os.getpid()).values() if each.started > kill.at]
        kill.cpu = sum(fresh)


def trained(options: argparse.Namespace, folder: Path, *, kills: int, checkpoint: float) -> Watched:
    """A training under kills, or with none, for the time that the options say."""
    from cellray.data.truth import Simulation
    from cellray.train.loop import train
    from cellray.train.recipe import Recipe, override
    from tests import stores

    if not (folder / "store").exists():
        stores.write(str(folder / "store"), Simulation(cells=8192, genes=1000, peaks=200, proteins=12), 2048)
    changes = {
        "run": str(folder / f"run-{kills}"),
        "store": str(folder / "store"),
        "workers": options.workers,
        "stages": "unimodal",
        "unimodal.epochs": 600.0,
        "checkpoint_seconds": checkpoint,
        "precision": "fp32",
    }
    watched = Watched()
    every = options.every if kills else min(60.0, 60 * options.minutes)
    killer = Killer(watched, every=every, number=kills, calm=0.0 if kills else every / 2)
    killer.start()
    try:
        train(override(Recipe(), changes), watched.events.append, stop=killer.stop)
    finally:
        killer.over.set()
        killer.join()
    if not killer.stop.is_set():
        raise SystemExit("the stage came to its end before the time was over")
    return watched


def rate(watched: Watched) -> float:
    """Steps a second that count, of the whole time between the first row and the last."""
    first, last = watched.rows()[0], watched.rows()[-1]
    return float((last["step"] - first["step"]) / (last["time"] - first["time"]))


def main() -> int:
    options = arguments()
    from cellray import cluster
    from tests.bench.harness.report import Report

    folder = Path(options.out).absolute()
    number = max(1, round(60 * options.minutes / options.every))
    about = f"{number} kills, one every {options.every:g} s"
    report = Report(folder / "goodput.json", quick=about if options.quick else "")
    scratch = folder / "cache" / "goodput"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with cluster.connect("local", cpus=4):
            calm = trained(options, scratch, kills=0, checkpoint=1e9)
            killed = trained(options, scratch, kills=number, checkpoint=options.checkpoint)
        told(report, calm, killed, about)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"written: {report.path}")
    return 0


def told(report: "Report", calm: Watched, killed: Watched, about: str) -> None:
    """The rows of the table."""
    from tests.bench.harness.report import Row, spread

    rows = killed.rows()
    wall = rows[-1]["time"] - rows[0]["time"]
    note = f"{about}, {wall:,.0f} s, {rows[-1]['step']:,} steps of {1 / rate(calm):.3f} s"
    share, what = goodput(rows), "goodput, seconds of steps"
    report.add(Row(what=what, value=share, unit="of time", goal=0.95, note=note))
    share, what = rate(killed) / rate(calm), "goodput, steps a second"
    against = "as many steps, undisturbed and without checkpoints"
    report.add(Row(what=what, value=share, unit="of time", goal=0.95, baseline=against))
    costs = [cost(killed, kill) for kill in killed.kills]
    whole = [sum(each.values()) for each in costs]
    report.add(Row(what="a kill costs", value=statistics.mean(whole), unit="s", note=spread(whole)))
    for part in PARTS:
        values = [each[part] for each in costs]
        report.add(Row(what=f"  {part}", value=statistics.mean(values), unit="s", note=spread(values)))
    used = [kill.cpu for kill in killed.kills]
    report.add(Row(what="a restart takes", value=statistics.mean(used), unit="CPU-s", note=spread(used)))


if __name__ == "__main__":
    sys.exit(main())
