"""The rows about the loop: what Ray Train, the feed and the meters cost, and what a second worker brings."""

import itertools
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.bench.datalayer.reading import Effort
from tests.bench.harness.report import Report, Row, ratio, spread
from tests.bench.harness.rounds import Driver, Measured, in_turns
from tests.bench.training.gate import undisturbed
from tests.bench.training.stores import stored

TRAINING = "tests.bench.drivers.training"
BARE = "a bare torch loop, tensors in memory"


@dataclass(frozen=True)
class Place:
    """Where stores and runs of the bench are, and how large stores are."""

    folder: Path
    cells: int

    def store(self, peaks: int = 0) -> Path:
        return stored(self.folder / "cache", cells=self.cells, peaks=peaks)

    def run(self, name: str) -> Path:
        """A folder for a run, in which nothing is left of an earlier one."""
        path = self.folder / "cache" / "train-runs" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


@dataclass(frozen=True)
class Size:
    """What is trained."""

    name: str
    settings: tuple[str, ...]


SMALL = Size("recipe small, 32 tokens attended", ())
LONG = Size(
    "recipe small with 512 tokens attended",
    ("modalities.rna.context=512", "feed.tokens=32768"),
)
LARGE = Size(
    "recipe small with 512 tokens attended, batches four times as large",
    ("modalities.rna.context=512", "feed.tokens=131072", "feed.cells=256"),
)


def overhead(report: Report, place: Place, effort: Effort, size: Size) -> Iterator[Sequence[Driver]]:
    """Steps on Ray, without it, and in bare loops, in one interleaved run."""
    store = str(place.store())
    runs = {way: place.run(f"{way}-{len(size.settings)}") for way in ("tensors", "batches", "loop", "ray")}
    drivers = {
        way: Driver(way, TRAINING, [way, store, str(run), *size.settings], cluster=way == "ray")
        for way, run in runs.items()
    }
    yield list(drivers.values())
    memory = in_turns(list(drivers.values()), rounds=effort.rounds, seconds=effort.seconds)
    for way, name in (("ray", "Ray Train, real feed"), ("loop", "no Ray, real feed")):
        _against(report, f"{name} / bare loop", drivers[way], drivers["tensors"], size, 0.97, BARE)
    _against(
        report, "Ray Train / the same without Ray", drivers["ray"], drivers["loop"], size, None, "no Ray"
    )
    _against(
        report,
        "bare loop, tensors made in each step",
        drivers["batches"],
        drivers["tensors"],
        size,
        None,
        BARE,
    )
    for way in ("ray", "loop"):
        _own(report, way, drivers[way], runs[way], memory[way], size)


def _against(
    report: Report, what: str, ours: Driver, theirs: Driver, size: Size, goal: float | None, baseline: str
) -> None:
    """Step rates, by CPU time of the training's process and by the clock."""
    by_cpu, by_clock = ratio(ours.rates, theirs.rates), ratio(_walls(ours), _walls(theirs))
    tree = statistics.median(m.tree / m.cpu for m in ours.rounds)
    for unit, (value, note) in (("of its rate, CPU", by_cpu), ("of its rate, wall", by_clock)):
        more = f"; all its processes use {tree:.3g} times that" if unit.endswith("CPU") else ""
        report.add(
            Row(
                what=what,
                value=value,
                unit=unit,
                goal=goal,
                baseline=baseline,
                note=f"{size.name}; {note}{more}",
            )
        )


def _walls(driver: Driver) -> list[float]:
    return [m.cells / m.wall for m in driver.rounds]


def _own(
    report: Report, way: str, driver: Driver, run: Path, memory: Mapping[str, float], size: Size
) -> None:
    """What the training itself says in metrics.jsonl, of the time in which it was not held."""
    rows = undisturbed(run)
    where = f"in {'Ray Train' if way == 'ray' else 'the loop without Ray'}; {size.name}"
    note = f"{where}; its own meters, {len(rows)} rows"
    if not rows:
        report.add(Row(what="data wait", value=None, unit="of the time", goal=0.02, at_most=True, note=note))
        return
    seconds = [later["seconds"] - before for before, later in _pairs(run, rows)]
    waited = sum(s * row["data_wait_share"] for s, row in zip(seconds, rows, strict=True)) / sum(seconds)
    report.add(Row(what="data wait", value=waited, unit="of the time", goal=0.02, at_most=True, note=note))
    for key, unit in (("cells_per_second", "cells/s"), ("tokens_per_second", "tokens/s")):
        report.add(Row(what="trained", value=statistics.median(r[key] for r in rows), unit=unit, note=note))
    mfu = [row["mfu"] for row in rows if row["mfu"]]
    if mfu:
        what = "matrix products, MFU"
        peak = "the largest rate of one matrix product here"
        report.add(Row(what=what, value=statistics.median(mfu), unit="of the peak", baseline=peak, note=note))
    rate = f"{statistics.median(driver.rates):,.1f} cells/CPU-s; {spread(driver.rates)}"
    report.add(
        Row(
            what="peak memory of a training process",
            value=memory["peak"],
            unit="MB",
            note=f"{where}; {memory['anonymous']:,.0f} MB of it anonymous in the end; {rate}",
        )
    )


def _pairs(run: Path, rows: Sequence[Mapping[str, float]]) -> list[tuple[float, Mapping[str, float]]]:
    """Each row with the stage's seconds at the row before it in the file."""
    import json

    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before = {row["step"]: old["seconds"] for old, row in itertools.pairwise(every)}
    return [(before[row["step"]], row) for row in rows]


def workers(
    report: Report, place: Place, effort: Effort, size: Size, cores: Sequence[int]
) -> Iterator[Sequence[Driver]]:
    """Two workers with the same global batch against one, and two trainings of their own against one."""
    tokens = int(dict(word.split("=") for word in size.settings)["feed.tokens"])
    what = f"two workers / one, batches of {tokens:,} tokens"
    if len(cores) < 2:
        yield []
        report.add(Row(what=what, value=None, unit="times", goal=1.8, note="left out: one core"))
        return
    a, b = cores[:2]
    store = str(place.store())

    def driver(name: str, *on: int) -> Driver:
        run = place.run(f"{name}-{tokens}")
        arguments = ["loop", store, str(run), *size.settings, "--cores", *map(str, on)]
        return Driver(name, TRAINING, arguments, pinned=False)

    one, other, two = driver("one", a), driver("other", b), driver("two", a, b)
    yield [one, other, two]
    alone, both, apart = [], [], []
    with ThreadPoolExecutor(2) as pool:

        def asked(*drivers: Driver) -> float:
            """Cells a second of these, all at a time."""
            found = pool.map(lambda d: Measured(**d.ask(f"round {effort.seconds}")), drivers)
            return sum(m.cells / m.wall for m in found)

        for _ in range(effort.rounds):
            alone.append(asked(one))
            both.append(asked(two))
            apart.append(asked(one, other))
    value, note = ratio(both, alone)
    bound, _ = ratio(apart, alone)
    report.add(
        Row(
            what=what,
            value=value,
            unit="times, wall",
            goal=1.8,
            baseline=f"one worker on one core, {statistics.median(alone):,.3g} cells/s",
            note=f"gloo, same global batch, {size.name}; {note}; of what two trainings that share nothing "
            f"bring on these cores {value / bound:.3g}",
        )
    )
    value, note = ratio(apart, alone)
    what = "two trainings apart / one: the machine's bound"
    report.add(Row(what=what, value=value, unit="times, wall", baseline="one of them alone", note=note))
