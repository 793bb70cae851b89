"""The rows about a GPU: steps of stage 1 at the size of the recipe `base`, batches in its memory."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import nn

from cellray.data.modalities import RNA
from cellray.model.attention import Compute
from cellray.model.teacher import Teacher
from cellray.train import recipe
from cellray.train.fit import adamw
from cellray.train.meters import matmul_peak, operations
from cellray.train.stages import Unimodal
from tests.bench.harness.report import Report, Row, ratio, spread
from tests.bench.harness.rounds import Driver
from tests.bench.training import stores

MFU = "matrix products at base, bf16, MFU"
WHATS = {
    MFU: ("of the peak", 0.4),
    "bf16 / fp32": ("times the rate", None),
    "as it is / padded to the longest cell": ("times the rate", None),
    "torch.compile / eager": ("times the rate", None),
    "peak memory of a step at base": ("MB", None),
}
"""Rows of this part, their units and goals."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is trained: the recipe `base`."""

    width: int = 512
    layers: int = 12
    heads: int = 8
    context: int = 2_048
    genes: int = 20_000
    cells: int = 64
    nonzero: int = 2_000


def rows(report: Report, rounds: int, steps: int) -> Iterator[Sequence[Driver]]:
    """The rows, or what they would be."""
    yield []
    if not torch.cuda.is_available():
        for what, (unit, goal) in WHATS.items():
            report.add(Row(what=what, value=None, unit=unit, goal=goal, note="left out: no CUDA device here"))
        return
    measure(report, "cuda", Size(), rounds, steps)


class Trained:
    """Steps of stage 1 on one batch that is on the device."""

    def __init__(self, size: Size, device: str, *, halved: bool = True, compiled: bool = False) -> None:
        self.device, self.halved = device, halved
        rna = replace(RNA, context=size.context)
        words, self.batch = stores.batch(cells=size.cells, genes=size.genes, nonzero=size.nonzero)
        words = replace(words, vocabularies={"rna": replace(words.vocabularies["rna"], modality=rna)})
        torch.manual_seed(0)
        self.teacher = Teacher(
            {"rna": (rna, size.genes)},
            width=size.width,
            layers=size.layers,
            heads=size.heads,
            fusion_layers=1,
        ).to(device)
        self.teacher.start(words.vocabularies)
        self.teacher.encoder("rna").compute = Compute(compile="on" if compiled else "off")
        self.stage = Unimodal(recipe.Unimodal(), self.teacher, words, "rna", seed=0, device=device)
        self.teacher.requires_grad_(False)
        for module in self.stage.trained():
            module.requires_grad_(True)
        self.parameters, self.optimizer = adamw(self.stage.trained(), recipe.Optim())

    def step(self) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.halved):
            losses = self.stage.losses(self.batch, 0).values()
            parts = [x.weight / max(x.count, 1.0) * x.sum for x in losses]
        torch.stack(parts).sum().backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rate(self, steps: int) -> float:
        """Cells a second."""
        synchronise(self.device)
        begun = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronise(self.device)
        return steps * len(self.batch.rows) / (time.perf_counter() - begun)

    def operations(self) -> float:
        """Of a step."""
        with operations() as counter:
            self.step()
        return float(counter.get_total_flops())


class Padded:
    """The same cells, each padded to the context, through layers of the same size; nothing but the layers."""

    def __init__(self, size: Size, device: str, lengths: Sequence[int]) -> None:
        self.device, self.lengths, self.size = device, lengths, size
        layer = nn.TransformerEncoderLayer(
            size.width, size.heads, 4 * size.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.network = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False).to(device)

    def step(self, longest: int) -> None:
        """Forward and backward at `longest` positions a cell."""
        x = torch.ones(len(self.lengths), longest, self.size.width, device=self.device)
        places = torch.arange(longest, device=self.device)
        absent = places >= torch.tensor(self.lengths, device=self.device)[:, None]
        with torch.autocast(self.device, torch.bfloat16):
            found = self.network(x, src_key_padding_mask=absent)
        found.sum().backward()
        self.network.zero_grad(set_to_none=True)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_rounds(rounds: int, *rates: Callable[[], float]) -> list[list[float]]:
    """Each measured in turns."""
    for rate in rates:
        rate()
    found = [[rate() for rate in rates] for _ in range(rounds)]
    return [list(column) for column in zip(*found, strict=True)]


def measure(
    report: Report, device: str, size: Size, rounds: int, steps: int, *, compiled: bool = True
) -> None:
    """The rows on `device`."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    of = f"{size.width} wide, {size.layers} layers, {size.cells} cells of {size.nonzero:,} genes; {name}"

    def add(what: str, value: float, note: str, baseline: str = "") -> None:
        unit, goal = WHATS[what]
        report.add(Row(what=what, value=value, unit=unit, goal=goal, baseline=baseline, note=f"{of}; {note}"))

    with ExitStack() as stack:
        half, full = Trained(size, device), Trained(size, device, halved=False)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            stack.callback(torch.cuda.empty_cache)
        work = half.operations() / size.cells
        fast, slow = in_rounds(rounds, lambda: half.rate(steps), lambda: full.rate(steps))
        if device == "cuda":
            add("peak memory of a step at base", torch.cuda.max_memory_allocated() / 1e6, "torch's own count")
        peak = matmul_peak(device, torch.bfloat16)
        note = f"{statistics.median(fast):,.1f} cells/s; {spread(fast)}; {peak / 1e12:,.3g} TFLOP/s peak"
        add(MFU, statistics.median(fast) * work / peak, note, "the largest rate of one matrix product here")
        add("bf16 / fp32", *ratio(fast, slow), "fp32")
        add("as it is / padded to the longest cell", *_padding(size, device, rounds), "padded")
        if compiled:
            quick = Trained(size, device, compiled=True)
            found = in_rounds(rounds, lambda: quick.rate(steps), lambda: half.rate(steps))
            add("torch.compile / eager", *ratio(*found), "eager")


def _padding(size: Size, device: str, rounds: int) -> tuple[float, str]:
    """Rate of the encoder on cells of many lengths against padded layers of the same size."""
    from tests.bench.training.costs import lengths, plain

    sizes = [min(n, size.context) for n in lengths(size.cells, 0.5, 0)]
    padded, encoder = Padded(size, device, sizes), Trained(size, device).teacher.encoder("rna")
    encoder.requires_grad_(True)
    tokens = plain(sizes)
    tokens = replace(tokens, **{k: v.to(device) for k, v in vars(tokens).items() if v is not None})

    def ours() -> float:
        return _timed(device, forward)

    def forward() -> None:
        with torch.autocast(device, torch.bfloat16):
            found = encoder(tokens).summary
        found.float().sum().backward()
        encoder.zero_grad(set_to_none=True)

    mine, theirs = in_rounds(rounds, ours, lambda: _timed(device, lambda: padded.step(max(sizes))))
    return ratio(mine, theirs)


def _timed(device: str, work: Callable[[], None]) -> float:
    """How often a second."""
    synchronise(device)
    begun = time.perf_counter()
    for _ in itertools.repeat(None, 3):
        work()
    synchronise(device)
    return 3 / (time.perf_counter() - begun)
