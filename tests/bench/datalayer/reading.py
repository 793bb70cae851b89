"""The rows about reading: the feed against bounds and competitors, encodings, memory, vocabularies, Ray.

A section yields its drivers, goes on when they run, and ends before they are closed: so those of several
can start side by side.
"""

import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cellray.data.store import Store
from tests.bench.datalayer import competitors, formats
from tests.bench.datalayer.material import Material
from tests.bench.datalayer.quality import Quality, quality
from tests.bench.harness.report import Report, Row, ratio, spread
from tests.bench.harness.rounds import Driver, in_turns
from tests.bench.harness.venvs import Environment

RATE = "cells/CPU-s"
DRIVERS = "tests.bench.drivers."
TRAIN = "feed in a Ray Train worker / bare"
LEFT_OUT = {"train": TRAIN, "vocabulary": "feed, RNA + many peaks / RNA + 120,000"}
"""Sections that --quick leaves out, as one takes a third Ray and the other two atlases more; their rows."""


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int
    seconds: float


@dataclass(frozen=True)
class Against:
    """A goal: what, at least so many times the rate of the driver of this name."""

    driver: str
    goal: float | None
    baseline: str


GOALS = (
    # The goal names Arrow IPC, zstd: such files our shards were until counts took a byte. Now they are faster
    # to decode, and the feed, which copies what it did before, reaches less of that: it is told beside.
    Against("zstd sequential", 0.8, "sequential decode of plain Arrow IPC, zstd, of the level of our shards"),
    Against("shard sequential", None, "sequential decode of our shards themselves"),
    Against("annbatch + tokens", 5.0, "annbatch + our tokenizer"),
    Against("annbatch", None, "annbatch, CSR rows alone"),
    Against("huggingface numpy", 3.0, "Hugging Face datasets, random rows, as arrays"),
    Against("huggingface arrow", None, "Hugging Face datasets, random rows, as an Arrow table, uncompressed"),
    Against("ray", 5.0, "Ray Data, Parquet lists, local shuffle"),
    Against("webdataset", None, "webdataset"),
    Against("scdataset", None, "scDataset over .h5ad"),
    Against("raw sequential", None, "sequential IPC scan, no compression"),
)


def feed(
    report: Report, material: Material, effort: Effort, others: Sequence[str]
) -> Iterator[Sequence[Driver]]:
    """The feed, the bounds and the competitors named in `others`, in one interleaved run."""
    store = material.store(material.atlas(material.cells))
    drivers = [
        Driver("feed", DRIVERS + "feed", [str(store)]),
        Driver("shard sequential", DRIVERS + "sequential", [str(store)]),
        *(
            Driver(f"{name} sequential", DRIVERS + "sequential", [str(material.converted(name, write))])
            for name, write in (("zstd", formats.packed), ("raw", formats.raw))
        ),
        *_competitors(report, material, others),
    ]
    yield drivers
    for driver in drivers:
        if driver.failed:
            report.add(Row(what=driver.name, value=None, unit=RATE, note=f"left out: {driver.failed}"))
    drivers = [driver for driver in drivers if not driver.failed]
    memory = in_turns(drivers, rounds=effort.rounds, seconds=effort.seconds)
    shuffled = {d.name: _quality(d, material) for d in drivers if "sequential" not in d.name}
    ours = drivers[0]
    for driver in drivers:
        size = driver.rounds[-1].cells / driver.rounds[-1].batches
        note = (
            f"{spread(driver.rates)}; peak {memory[driver.name]['peak']:,.0f} MB; {size:,.0f} cells a batch"
        )
        value = statistics.median(driver.rates)
        report.add(Row(what=driver.name, value=value, unit=RATE, note=f"{note}; {driver.about}"))
    named = {driver.name: driver for driver in drivers}
    for against in GOALS:
        if against.driver in named:
            value, note = ratio(ours.rates, named[against.driver].rates)
            report.add(
                Row(
                    what=f"feed / {against.driver}",
                    value=value,
                    unit="times",
                    goal=against.goal,
                    baseline=against.baseline,
                    note=note,
                )
            )
    for name, found in shuffled.items():
        goal = 0.95 if name == "feed" else None
        report.add(_shuffle_row(name, found, goal))


def _competitors(report: Report, material: Material, others: Sequence[str]) -> list[Driver]:
    """Drivers of those whose environment is there or can be made; a row without a value for the others."""

    def python(environment: Environment) -> str | None:
        if environment.name not in others:
            return None
        try:
            found = material.python(environment)
            reason = "its environment is not there; run once without --quick, which makes it"
        except ValueError as error:
            found, reason = None, str(error)
        if found is None:
            report.add(Row(what=environment.name, value=None, unit=RATE, note=f"left out: {reason}"))
        return found

    drivers: list[Driver] = []

    def add(name: str, module: str, arguments: Sequence[str], python: str = sys.executable) -> None:
        drivers.append(
            Driver(name, DRIVERS + module, arguments, python, optional=True, cluster=name == "ray")
        )

    if found := python(competitors.ANNBATCH):
        try:
            collection = str(material.collection(found))
        except subprocess.CalledProcessError as error:
            report.add(Row(what="annbatch", value=None, unit=RATE, note=f"left out: {error}"))
        else:
            store = str(material.store(material.atlas(material.cells)))
            read = ["read", collection]
            add("annbatch", "annbatch", read, found)
            add("annbatch + tokens", "annbatch", [*read, store], found)
    if found := python(competitors.HUGGINGFACE):
        path = material.converted("huggingface", formats.huggingface) / "cells.arrow"
        for form in ("numpy", "arrow"):
            add(f"huggingface {form}", "huggingface", [str(path), form], found)
    if found := python(competitors.WEBDATASET):
        path = material.converted("webdataset", formats.tars)
        add("webdataset", "webdataset", [str(path)], found)
    if "ray" in others:
        path = material.converted("parquet", formats.parquet)
        add("ray", "ray_data", [str(path)])
    if found := python(competitors.SCDATASET):
        path = material.files(material.cells)[0]
        add("scdataset", "scdataset", [str(path)], found)
    return drivers


def _quality(driver: Driver, material: Material) -> Quality:
    batches = driver.ask(f"quality {4 if material.quick else 24}")["origins"]
    spec = material.spec(material.cells)
    # scDataset reads one file, the first.
    cells = spec.files[0][1] if driver.name == "scdataset" else spec.cells
    return quality([b for b in batches if len(b) > 1], cells=cells, label=spec.label)


def _shuffle_row(name: str, found: Quality, goal: float | None) -> Row:
    note = (
        f"{found.distinct:,.1f} of {found.uniform_distinct:,.1f} source chunks a batch, "
        f"label entropy {found.entropy:.3f} of {found.uniform_entropy:.3f}"
    )
    return Row(
        what=f"shuffle quality of {name}",
        value=found.share,
        unit="of uniform",
        goal=goal,
        baseline="batches drawn uniformly",
        note=note,
    )


WAYS = (
    ("rank", 10.0, "argsort of each cell"),
    ("bins", 30.0, "quantiles of each cell"),
)
"""Encodings, how many times the rate of the loop each is to have, and what the loop does."""


def tokenizers(report: Report, material: Material, effort: Effort) -> Iterator[Sequence[Driver]]:
    """Ours against loops over cells, as their authors wrote them and as lean as such a loop gets; and
    ranking against its bound, numpy's sort of numbers that hold a token each."""
    store = str(material.store(material.atlas(material.cells)))
    cells = "512" if material.quick else "2048"
    names = [f"{way}{kind}" for way, *_ in WAYS for kind in ("", "_loop", "_lean")] + ["rank_bound"]
    named = {name: Driver(name, DRIVERS + "encodings", [name, store, cells]) for name in names}
    yield list(named.values())
    for way, goal, loop in WAYS:
        ours, *others = (driver for name, driver in named.items() if name.startswith(way))
        in_turns([ours, *others], rounds=effort.rounds, seconds=effort.seconds / 2)
        for driver in (ours, *others):
            value, note = statistics.median(driver.rates), f"{spread(driver.rates)}; {driver.about}"
            label = "rank, bound" if driver.name == "rank_bound" else f"{driver.name} tokens"
            report.add(Row(what=label, value=value, unit=RATE, note=note))
        against: list[tuple[str, float | None, str]] = [("loop, as published", goal, loop)]
        against += [
            ("loop, lean", None, loop),
            ("bound", None, "numpy's sort of each cell, keys made before"),
        ]
        for driver, (kind, wanted, baseline) in zip(others, against, strict=False):
            value, note = ratio(ours.rates, driver.rates)
            what = f"{way} / {kind}"
            report.add(Row(what=what, value=value, unit="times", goal=wanted, baseline=baseline, note=note))


def memory(report: Report, material: Material, effort: Effort) -> Iterator[Sequence[Driver]]:
    """Peak memory of a process that reads a whole pass, by the size of the store."""
    sizes = sorted({min(size, material.cells) for size in (10_000, 100_000, material.cells)})
    stores = material.stores([material.atlas(cells) for cells in sizes])
    drivers = [Driver("feed", DRIVERS + "feed", [str(store)]) for store in stores]
    yield drivers
    for cells, store, driver in zip(sizes, stores, drivers, strict=True):
        found = driver.ask(f"round {effort.seconds} {cells}")
        used = driver.ask("memory")
        size = sum(path.stat().st_size for path in store.rglob("*.arrow")) / cells
        note = (
            f"{found['cells']:,.0f} cells read, {found['cells'] / found['cpu']:,.0f} cells/CPU-s, "
            f"{used['anonymous']:,.0f} MB of it anonymous in the end, {size:,.0f} bytes a cell stored"
        )
        what, peak = f"peak memory, {cells:,} cells", used["peak"]
        report.add(Row(what=what, value=peak, unit="MB", goal=700.0, at_most=True, note=note))


def vocabularies(material: Material) -> list[Path]:
    """Atlases with few and with many peaks, and the same number of tokens."""
    cells = 1_024 if material.quick else min(20_480, material.cells)
    return [
        material.peaks_atlas(peaks, cells) for peaks in (120_000, 360_000 if material.quick else 1_150_000)
    ]


def vocabulary(report: Report, material: Material, effort: Effort) -> Iterator[Sequence[Driver]]:
    """Whether the feed's cost grows with the vocabulary."""
    stores = material.stores(vocabularies(material))
    few, many = (Driver(str(store), DRIVERS + "feed", [str(store)]) for store in stores)
    yield [few, many]
    in_turns([few, many], rounds=effort.rounds, seconds=effort.seconds)
    value, note = ratio(many.rates, few.rates)
    tokens = [driver.rounds[-1].tokens / driver.rounds[-1].cells for driver in (few, many)]
    sizes = [Store(str(store)).tokenizer.vocabularies["atac"] for store in stores]
    report.add(
        Row(
            what=f"feed, RNA + {len(sizes[1]):,} peaks / RNA + {len(sizes[0]):,}",
            value=value,
            unit="times",
            goal=0.9,
            baseline=f"the fewer peaks, {statistics.median(few.rates):,.0f} {RATE}",
            note=f"{note}; {tokens[1]:,.0f} and {tokens[0]:,.0f} tokens a cell",
        )
    )


def train(report: Report, material: Material, effort: Effort) -> Iterator[Sequence[Driver]]:
    """The feed in a Ray Train worker against the bare one."""
    store = str(material.store(material.atlas(material.cells)))
    bare = Driver("bare", DRIVERS + "feed", [store])
    inside = Driver("train", DRIVERS + "train", [store], cluster=True)
    yield [bare, inside]
    in_turns([bare, inside], rounds=effort.rounds, seconds=effort.seconds)
    value, note = ratio(inside.rates, bare.rates)
    wall = ratio(*([m.cells / m.wall for m in d.rounds] for d in (inside, bare)))[0]
    tree = statistics.median(m.tree / m.cpu for m in inside.rounds)
    report.add(
        Row(
            what=TRAIN,
            value=value,
            unit="times",
            goal=0.9,
            baseline="the bare feed",
            note=f"{note}; by wall time {wall:.3g}; all processes of Ray use {tree:.3g} times its CPU",
        )
    )
