"""The rows about reading: the feed against bounds and competitors, encodings, memory, vocabularies, Ray."""

import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cellray.data.store import Store
from tests.bench.datalayer import competitors, formats
from tests.bench.datalayer.material import Material
from tests.bench.datalayer.quality import Quality, quality
from tests.bench.harness.report import Report, Row, ratio, spread
from tests.bench.harness.rounds import Driver, in_turns, started
from tests.bench.harness.venvs import Environment

RATE = "cells/CPU-s"
DRIVERS = "tests.bench.drivers."


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
    Against("zstd sequential", 0.8, "sequential IPC zstd decode"),
    Against("annbatch + tokens", 5.0, "annbatch + our tokenizer"),
    Against("annbatch", None, "annbatch, CSR rows alone"),
    Against("huggingface numpy", 3.0, "Hugging Face datasets, random rows, as arrays"),
    Against("huggingface arrow", None, "Hugging Face datasets, random rows, as an Arrow table, uncompressed"),
    Against("ray", 5.0, "Ray Data, Parquet lists, local shuffle"),
    Against("webdataset", None, "webdataset"),
    Against("scdataset", None, "scDataset over .h5ad"),
    Against("raw sequential", None, "sequential IPC scan, no compression"),
)


def feed(report: Report, material: Material, effort: Effort, others: Sequence[str]) -> None:
    """The feed, the bounds and the competitors named in `others`, in one interleaved run."""
    store = material.store(material.atlas(material.cells))
    drivers = [
        Driver("feed", DRIVERS + "feed", [str(store)]),
        Driver("zstd sequential", DRIVERS + "sequential", [str(store)]),
        Driver("raw sequential", DRIVERS + "sequential", [str(material.converted("raw", formats.raw))]),
    ]
    rivals = _competitors(report, material, others)
    with started(drivers) as running:
        for driver in rivals:
            try:
                running.enter_context(driver)
            except RuntimeError as error:
                report.add(Row(what=driver.name, value=None, unit=RATE, note=f"left out: {error}"))
            else:
                drivers.append(driver)
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
            reason = "no environment yet; without --quick it is made"
        except ValueError as error:
            found, reason = None, str(error)
        if found is None:
            report.add(Row(what=environment.name, value=None, unit=RATE, note=f"left out: {reason}"))
        return found

    drivers = []
    if found := python(competitors.ANNBATCH):
        try:
            collection = str(material.collection(found))
        except subprocess.CalledProcessError as error:
            report.add(Row(what="annbatch", value=None, unit=RATE, note=f"left out: {error}"))
        else:
            store = str(material.store(material.atlas(material.cells)))
            read = ["read", collection]
            drivers.append(Driver("annbatch", DRIVERS + "annbatch", read, found))
            drivers.append(Driver("annbatch + tokens", DRIVERS + "annbatch", [*read, store], found))
    if found := python(competitors.HUGGINGFACE):
        path = material.converted("huggingface", formats.huggingface) / "cells.arrow"
        drivers += [
            Driver(f"huggingface {form}", DRIVERS + "huggingface", [str(path), form], found)
            for form in ("numpy", "arrow")
        ]
    if found := python(competitors.WEBDATASET):
        path = material.converted("webdataset", formats.tars)
        drivers.append(Driver("webdataset", DRIVERS + "webdataset", [str(path)], found))
    if "ray" in others:
        path = material.converted("parquet", formats.parquet)
        drivers.append(Driver("ray", DRIVERS + "ray_data", [str(path)]))
    if found := python(competitors.SCDATASET):
        path = material.files(material.cells)[0]
        drivers.append(Driver("scdataset", DRIVERS + "scdataset", [str(path)], found))
    return drivers


def _quality(driver: Driver, material: Material) -> Quality:
    batches = driver.ask(f"quality {8 if material.quick else 24}")["origins"]
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


def tokenizers(report: Report, material: Material, effort: Effort) -> None:
    """Ours against loops over cells: as their authors wrote them, and as lean as such a loop gets."""
    store = str(material.store(material.atlas(material.cells)))
    for way, goal, loop in (("rank", 10.0, "argsort of each cell"), ("bins", 30.0, "quantiles of each cell")):
        names = (way, f"{way}_loop", f"{way}_lean")
        ours, *loops = [Driver(name, DRIVERS + "encodings", [name, store]) for name in names]
        with started([ours, *loops]):
            in_turns([ours, *loops], rounds=effort.rounds, seconds=effort.seconds / 2)
        for driver in (ours, *loops):
            value, note = statistics.median(driver.rates), spread(driver.rates)
            report.add(Row(what=f"{driver.name} tokens", value=value, unit=RATE, note=note))
        for driver, wanted, kind in zip(loops, (goal, None), ("as published", "lean"), strict=True):
            value, note = ratio(ours.rates, driver.rates)
            what = f"{way} / loop, {kind}"
            report.add(Row(what=what, value=value, unit="times", goal=wanted, baseline=loop, note=note))


def memory(report: Report, material: Material, effort: Effort) -> None:
    """Peak memory of a process that reads a whole pass, by the size of the store."""
    sizes = sorted({min(size, material.cells) for size in (10_000, 100_000, material.cells)})
    for cells in sizes:
        store = material.store(material.atlas(cells))
        with Driver("feed", DRIVERS + "feed", [str(store)]) as driver:
            found = driver.ask(f"round {effort.seconds} {cells}")
            used = driver.ask("memory")
        size = sum(path.stat().st_size for path in store.rglob("*.arrow")) / cells
        note = (
            f"{found['cells']:,.0f} cells read, {found['cells'] / found['cpu']:,.0f} cells/CPU-s, "
            f"{used['anonymous']:,.0f} MB of it anonymous in the end, {size:,.0f} bytes a cell stored"
        )
        report.add(
            Row(
                what=f"peak memory, {cells:,} cells",
                value=used["peak"],
                unit="MB",
                goal=700.0,
                at_most=True,
                note=note,
            )
        )


def vocabularies(material: Material) -> list[Path]:
    """Atlases with few and with many peaks, and the same number of tokens."""
    cells = 2_048 if material.quick else min(20_480, material.cells)
    return [
        material.peaks_atlas(peaks, cells) for peaks in (120_000, 360_000 if material.quick else 1_150_000)
    ]


def vocabulary(report: Report, material: Material, effort: Effort) -> None:
    """Whether the feed's cost grows with the vocabulary."""
    stores = material.stores(vocabularies(material))
    few, many = (Driver(str(store), DRIVERS + "feed", [str(store)]) for store in stores)
    with started([few, many]):
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


def train(report: Report, material: Material, effort: Effort) -> None:
    """The feed in a Ray Train worker against the bare one."""
    store = str(material.store(material.atlas(material.cells)))
    bare, inside = Driver("bare", DRIVERS + "feed", [store]), Driver("train", DRIVERS + "train", [store])
    with started([bare, inside]):
        in_turns([bare, inside], rounds=effort.rounds, seconds=effort.seconds)
    value, note = ratio(inside.rates, bare.rates)
    wall = ratio(*([m.cells / m.wall for m in d.rounds] for d in (inside, bare)))[0]
    tree = statistics.median(m.tree / m.cpu for m in inside.rounds)
    report.add(
        Row(
            what="feed in a Ray Train worker / bare",
            value=value,
            unit="times",
            goal=0.9,
            baseline="the bare feed",
            note=f"{note}; by wall time {wall:.3g}; all processes of Ray use {tree:.3g} times its CPU",
        )
    )
