"""The rows about networks: what is computed in vain, and what a cell costs beside the published method."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellray.data.modalities import RNA
from cellray.data.store import Batch
from cellray.data.tokens import Tokenizer
from cellray.model.encoder import Encoder, Layer, Tokens
from cellray.model.teacher import Heads, Teacher
from cellray.train import recipe
from cellray.train.stages import Unimodal
from tests.bench.datalayer.reading import Effort
from tests.bench.drivers.genes import CELLS, CONTEXTS, NONZERO
from tests.bench.harness.report import Report, Row, ratio, spread
from tests.bench.harness.rounds import Driver, in_turns
from tests.bench.training import stores
from tests.bench.training.loops import Place
from tests.bench.training.networks import Shape

GENES, STUDENTS = "tests.bench.drivers.genes", "tests.bench.drivers.students"
FEATURES = 20_000


def packing(report: Report) -> Iterator[Sequence[Driver]]:
    """Positions that hold a token over positions that pass the layers, on lognormal lengths."""
    yield []
    for cells, sigma in ((64, 0.5), (64, 1.0), (256, 0.5)):
        shares = [packed(lengths(cells, sigma, seed)) for seed in range(8)]
        value = statistics.median(shares)
        report.add(
            Row(
                what=f"packing, batches of {cells} cells",
                value=value,
                unit="of positions",
                goal=0.9,
                baseline="positions that pass the layers",
                note=f"lognormal lengths, median 1,660, sigma {sigma}, none cut; {spread(shares)}",
            )
        )


def lengths(cells: int, sigma: float, seed: int) -> list[int]:
    """Tokens of some cells, lognormal."""
    drawn = np.random.default_rng(seed).lognormal(np.log(1_660), sigma, cells)
    return np.clip(drawn, 1, FEATURES).astype(int).tolist()


def packed(lengths: Sequence[int], context: int = FEATURES) -> float:
    """Tokens and [CLS] of cells of these lengths over the positions that a layer is given."""
    encoder, computed = Encoder(FEATURES, 8, 1, 1, context).eval(), 0

    def counted(x: Tensor, *_: object) -> Tensor:
        nonlocal computed
        computed += x.numel() // x.shape[-1]
        return x

    for module in encoder.modules():
        if isinstance(module, Layer):
            vars(module)["forward"] = counted  # what it would compute is no matter here
    with torch.inference_mode():
        encoder(plain(lengths))
    return sum(min(n, context) + 1 for n in lengths) / computed


def plain(lengths: Sequence[int]) -> Tokens:
    """Cells with the first features of the vocabulary, all of value 1."""
    ids = torch.cat([torch.arange(n) for n in lengths])
    offsets = torch.tensor([0, *np.cumsum(lengths).tolist()])
    hidden = torch.zeros(len(ids), dtype=torch.bool)
    return Tokens(ids, torch.ones(len(ids)), hidden, offsets, torch.full((len(lengths),), 8.0))


def logits(report: Report) -> Iterator[Sequence[Driver]]:
    """What heads and decoders compute in a step of stage 1, over what its losses are made of."""
    yield []
    words, batch = stores.batch(cells=16, genes=FEATURES, nonzero=1_700)
    at_heads, wanted, at_decoder, every = computed(words, batch)
    report.add(
        Row(
            what="logits computed / positions asked for",
            value=at_heads / wanted,
            unit="times",
            goal=1.0,
            at_most=True,
            note=f"{at_heads:,} logits for {wanted:,} of {every:,} tokens; decoders make "
            f"{at_decoder:,} logits a cell, of {FEATURES:,} features",
        )
    )


def computed(words: Tokenizer, batch: Batch) -> tuple[int, int, int, int]:
    """Detection logits in a step of stage 1, positions that its loss counts, logits a cell of the decoder,
    tokens of the batch."""
    torch.manual_seed(0)
    teacher = Teacher({"rna": (RNA, FEATURES)}, width=16, layers=1, heads=2, fusion_layers=1)
    teacher.start(words.vocabularies)
    stage = Unimodal(recipe.Unimodal(), teacher, words, "rna", seed=0, device="cpu")
    made: dict[str, int] = {}

    def count(name: str, module: nn.Module) -> None:
        plain = module.forward

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            found: Tensor = plain(*args, **kwargs)
            made[name] = made.get(name, 0) + found.numel()
            return found

        vars(module)["forward"] = counted  # no hook: losses do not pass it on their way to `forward`

    heads = teacher.heads["rna"]
    assert isinstance(heads, Heads)
    count("heads", heads.detection)
    count("decoder", teacher.decoder("rna"))
    losses = stage.losses(batch, 0)
    tokens = int(batch.counts["rna"].offsets[-1])
    return made["heads"], int(losses["detection"].count), made["decoder"] // len(batch.rows), tokens


def published(report: Report, effort: Effort, shape: Shape, name: str) -> Iterator[Sequence[Driver]]:
    """CPU-seconds a cell of networks over all genes against ours, in one interleaved run."""
    ways, passes = ("published", "cheapest", *CONTEXTS), ("forward", "both")
    drivers = {
        (way, one): Driver(f"{way} {one}", GENES, [way, one, str(shape.layers), name])
        for way in ways
        for one in passes
    }
    yield list(drivers.values())
    in_turns(list(drivers.values()), rounds=effort.rounds, seconds=effort.seconds)
    of = f"{shape.width} wide, {shape.layers} layers, {name}"
    for one, spelt in (("forward", "forward"), ("both", "forward and backward")):
        for way in ways:
            seconds = [1 / rate for rate in drivers[way, one].rates]
            cost = statistics.median(seconds)
            note = f"{of}; {spread(seconds)}"
            if way == "published" and shape.layers != Shape().layers:
                note += f"; that makes {cost * Shape().layers / shape.layers:.3g} for {Shape().layers} layers"
            report.add(Row(what=f"{way}, {spelt}", value=cost, unit="CPU-s a cell", note=note))
        for way in CONTEXTS:
            for baseline, goal in (("published", 20.0), ("cheapest", None)):
                value, note = ratio(drivers[way, one].rates, drivers[baseline, one].rates)
                report.add(
                    Row(
                        what=f"{baseline} / {way}, {spelt}",
                        value=value,
                        unit="times the cost",
                        goal=goal,
                        baseline=BASELINES[baseline].format(genes=shape.genes),
                        note=f"{of}, {NONZERO:,} non-zero genes, {CELLS} cells a batch, {READS[way]}; {note}",
                    )
                )


BASELINES = {
    "published": "all {genes:,} genes as tokens, attention by 266 random features, 10 heads of 64",
    "cheapest": "all {genes:,} genes as tokens, elu + 1 for attention, the least there is",
}
READS = {"ours": "all of them attended", "ours, first 512": "512 attended, all gathered"}


def tables(report: Report, place: Place, effort: Effort, few: int, many: int) -> Iterator[Sequence[Driver]]:
    """Stage 1 over few peaks and over many, the vectors of peaks updated by rows, and whole."""

    def driver(way: str, peaks: int) -> Driver:
        run = place.run(f"{way}-{peaks}")
        return Driver(f"{way} {peaks}", STUDENTS, [way, str(place.store(peaks)), str(run), "bf16"])

    ways = "peaks", "whole"
    drivers = {(way, peaks): driver(way, peaks) for peaks in (few, many) for way in ways}
    yield list(drivers.values())
    in_turns(list(drivers.values()), rounds=effort.rounds, seconds=effort.seconds)
    for peaks in (few, many):
        rates = drivers["peaks", peaks].rates
        value, note = ratio(rates, drivers["whole", peaks].rates)
        report.add(
            Row(
                what=f"stage 1, {peaks:,} peaks, updated by rows / whole",
                value=value,
                unit="times the rate",
                baseline="AdamW over the vectors of all peaks",
                note=f"recipe small, {statistics.median(rates):,.0f} cells/CPU-s; {note}",
            )
        )
    value, note = ratio(drivers["peaks", many].rates, drivers["peaks", few].rates)
    report.add(
        Row(
            what=f"stage 1, {many:,} peaks / {few:,}",
            value=value,
            unit="times the rate",
            baseline="the fewer peaks",
            note=note,
        )
    )


def student(report: Report, place: Place, effort: Effort, peaks: int) -> Iterator[Sequence[Driver]]:
    """Stage 3 against its control, and the student against the teacher's RNA path."""
    store = str(place.store(peaks))

    def driver(way: str, name: str, *settings: str) -> Driver:
        run = place.run(f"{way}-{peaks}-{name}-{len(settings)}")
        return Driver(f"{way} {name}", STUDENTS, [way, store, str(run), name, *settings])

    distil, control = driver("distil", "bf16"), driver("control", "bf16")
    embedders = {
        tokens: [driver("student", "fp32"), *(driver("teacher", name, f"modalities.rna.context={tokens}")
                                              for name in ("fp32", "bf16"))]
        for tokens in (32, 512)
    }  # fmt: skip
    yield [distil, control, *(d for some in embedders.values() for d in some)]
    in_turns([distil, control], rounds=effort.rounds, seconds=effort.seconds)
    value, note = ratio(control.rates, distil.rates)
    rate = statistics.median(distil.rates)
    report.add(
        Row(
            what=f"an epoch of stage 3, RNA and {peaks:,} peaks",
            value=value,
            unit="times the cost",
            goal=1.2,
            at_most=True,
            baseline="the control stage: the student on RNA alone",
            note=f"teacher's vectors in memory, recipe small; {rate:,.0f} cells/CPU-s; {note}",
        )
    )
    for tokens, (ours, *theirs) in embedders.items():
        in_turns([ours, *theirs], rounds=effort.rounds, seconds=effort.seconds)
        best = max(theirs, key=lambda d: statistics.median(d.rates))
        value, note = ratio(ours.rates, best.rates)
        report.add(
            Row(
                what=f"student / RNA path, {tokens} tokens attended",
                value=value,
                unit="times the rate",
                goal=5.0,
                baseline=f"the joint model from RNA, {best.about}, the faster of fp32 and bf16",
                note=f"recipe small, {statistics.median(ours.rates):,.0f} cells/CPU-s in fp32; {note}",
            )
        )
