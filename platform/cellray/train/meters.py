"""What a stage costs and how well it uses the device: rates, data wait, packing, MFU, memory.

Numbers of one row, `Gauges.row`, are means over the steps since the row before it:

    stage, step, steps     where it stands; `step` counts finished steps of the stage
    time, seconds          of the clock (Unix); that the stage took so far, interruptions left out
    cells, tokens          that the stage trained on so far, all workers together
    cells_per_second, tokens_per_second    of all workers together
    data_wait_share        share of the time in which the first worker waited for its next batch
    packing                positions that hold a token (or [CLS]) over positions that were computed
    mfu                    matrix-product operations a second on useful positions, over the measured peak
    peak_memory_bytes      most memory so far: of the GPU that torch held, else of the first worker
    learning_rate, gradient_norm
    loss, loss/PART …      the whole, and each part before it is weighted
"""

import contextlib
import functools
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cellray.model.attention import ROWS, groups
from cellray.model.encoder import Encoder, first_tokens

CURVE = 200
"""Points of a stage's loss curve."""
ROW_SECONDS = (0.5, 30.0)
"""Least and most seconds between two rows: a thousandth of what the stage has taken, between these.
So a stage of a minute is seen in detail, and one of a week leaves some 25,000 rows."""
SIZE = {"cpu": 768, "cuda": 8192}
"""Of the square matrices whose product is the peak: 0.9 and 1,100 GFLOP."""

Row = dict[str, float | str | None]


@dataclass
class Meter:
    """What a stage has cost so far. Kept in its checkpoints, so that a resumed stage counts on."""

    seconds: float = 0.0
    waited: float = 0.0
    cells: int = 0
    tokens: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    """The loss curve: means over equal stretches of steps."""
    pending: list[dict[str, float]] = field(default_factory=list)

    def add(self, step: int, steps: int, losses: Mapping[str, float]) -> None:
        self.pending.append(dict(losses))
        if len(self.pending) >= max(1, steps // CURVE) or step == steps - 1:
            self.rows.append({"step": step + 1, **_means(self.pending)})
            self.pending = []

    def facts(self) -> dict[str, Any]:
        wall = max(self.seconds, 1e-9)
        return {
            "seconds": round(self.seconds, 3),
            "cells_per_second": round(self.cells / wall, 2),
            "tokens_per_second": round(self.tokens / wall, 1),
            "data_wait_share": round(self.waited / wall, 5),
        }


class Gauges:
    """Rows of one stage, from its meter and from what its modules do. Use as a context manager.

    The operations of one step are counted, in the first step in this process, and scaled by the
    tokens of the others: batches are cut to like loads. Positions are looked up at every step.
    """

    def __init__(
        self, root: nn.Module, meter: Meter, *, device: str, halved: bool, first_worker: bool
    ) -> None:
        """`halved`: matrix products are in bf16. Another worker than the first gauges nothing."""
        self.meter, self.device, self.halved, self.first_worker = meter, device, halved, first_worker
        self._encoders = [m for m in root.modules() if isinstance(m, Encoder)] if first_worker else []
        self._hooks: list[Any] = []
        self._peak = 0.0
        self._work = 0.0
        """Useful operations of a step of this worker, a token of the global batch."""
        self._wasted = 0.0
        self._useful = self._computed = 0
        self._before = (0, 0)
        """Useful and computed positions at the last row."""
        self._losses: list[dict[str, float]] = []
        self._began = self._told = time.monotonic()
        self._last = (meter.seconds, meter.waited, meter.cells, meter.tokens)

    def __enter__(self) -> "Gauges":
        self._hooks = [m.register_forward_pre_hook(self._encode, with_kwargs=True) for m in self._encoders]
        if self.first_worker:
            self._peak = matmul_peak(self.device, torch.bfloat16 if self.halved else torch.float32)
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
        self._began = self._told = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def counted(self, tokens: int) -> Iterator[None]:
        """Around one step on a global batch of `tokens`: its operations are counted if none were yet."""
        if self._work or not self.first_worker:
            yield
            return
        self._wasted = 0.0
        with contextlib.ExitStack() as stack:
            for encoder in self._encoders:
                stack.enter_context(encoder.eager())
            counter = stack.enter_context(operations())
            yield
        self._work = max(0.0, counter.get_total_flops() - self._wasted) / max(tokens, 1)

    def add(self, losses: Mapping[str, float], learning_rate: float) -> None:
        """Note a finished step, after the meter did. `losses` as `fit.step` returns them."""
        if self.first_worker:  # the others ask for no row, and would keep all
            self._losses.append({**losses, "learning_rate": learning_rate})

    def due(self, now: float) -> bool:
        """Whether it is time for a row; `now` as `time.monotonic`."""
        least, most = ROW_SECONDS
        return now - self._told >= min(most, max(least, (now - self._began) / 1000))

    def row(self, stage: str, step: int, steps: int) -> tuple[Row, dict[str, float]]:
        """The row of the steps since the last one, and the means of their losses under their own names."""
        now = (self.meter.seconds, self.meter.waited, self.meter.cells, self.meter.tokens)
        seconds, waited, cells, tokens = (b - a for a, b in zip(self._last, now, strict=True))
        wall = max(seconds, 1e-9)
        means = _means(self._losses)
        useful, computed = self._useful - self._before[0], self._computed - self._before[1]
        rate, norm = means.pop("learning_rate"), means["gradient_norm"]
        row: Row = {
            "stage": stage,
            "step": step,
            "steps": steps,
            "time": round(time.time(), 3),
            "seconds": round(self.meter.seconds, 3),
            "cells": self.meter.cells,
            "tokens": self.meter.tokens,
            "cells_per_second": round(cells / wall, 2),
            "tokens_per_second": round(tokens / wall, 1),
            "data_wait_share": round(waited / wall, 5),
            "packing": round(useful / computed, 4) if computed else 1.0,
            "mfu": self._mfu(tokens / wall),
            "peak_memory_bytes": peak_memory(self.device),
            "learning_rate": rate,
            "gradient_norm": norm if math.isfinite(norm) else None,
            "loss": means["loss"],
        }
        parts = means.keys() - {"loss", "gradient_norm"}
        row |= {f"loss/{name}": value for name, value in means.items() if name in parts}
        self._losses, self._last = [], now
        self._before, self._told = (self._useful, self._computed), time.monotonic()
        return row, means

    def facts(self) -> dict[str, float | None]:
        """Of the whole stage. Packing and memory of this process alone, if others were killed before."""
        return {
            "packing": round(self._useful / self._computed, 4) if self._computed else 1.0,
            "mfu": self._mfu(self.meter.tokens / max(self.meter.seconds, 1e-9)),
            "peak_memory_bytes": peak_memory(self.device),
        }

    def _mfu(self, tokens_per_second: float) -> float | None:
        return round(self._work * tokens_per_second / self._peak, 5) if self._work and self._peak else None

    def _encode(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(encoder, Encoder)
        tokens = args[0] if args else kwargs["tokens"]
        useful, computed, pairs = positions(tokens.offsets, encoder.context, encoder.compute.together)
        self._useful, self._computed = self._useful + useful, self._computed + computed
        if encoder.compute.recompute and torch.is_grad_enabled():
            self._wasted += repeated(encoder, computed, pairs)


def positions(offsets: Tensor, context: int, together: int) -> tuple[int, int, int]:
    """Of an encoder on cells with these `offsets`: useful and computed positions, and compared pairs.

    A cell's positions are [CLS] and its first `context` tokens. None is padded, but a call on fewer
    than a handful. Pairs are what attention compares: positions squared, summed over cells.
    """
    left = first_tokens(offsets.cpu(), context)[1]  # waits for the device once
    own = left.diff() + 1
    calls = [int(own[cells].sum()) for cells in groups(left, together)]
    return sum(calls), sum(max(call, ROWS) for call in calls), int(own.square().sum())


def repeated(encoder: Encoder, places: int, pairs: int) -> float:
    """Operations by which a training step of an encoder grows if activations are made anew.

    A layer has 12 width² weights, each a multiplication and an addition a position. Attention is two
    products a pair.
    """
    width = encoder.summary.in_features
    return len(encoder.layers) * (2 * 12 * width**2 * places + 2 * 2 * width * pairs)


def operations() -> FlopCounterMode:
    """A context that counts the operations of all matrix products and attention in it, forward and backward.

    A multiplication and an addition are two. Gathers (embedding bags) are none: they move memory. torch
    knows attention on GPUs only; here it is counted on CPUs too.
    """
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    more = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=more)


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product on `device`, the best of some; measured once.

    It takes under 0.3 s, and is what this process can have: its threads on a CPU, its GPU.
    """
    return _measured(device, dtype, torch.get_num_threads() if device == "cpu" else 0)


@functools.cache
def _measured(device: str, dtype: torch.dtype, threads: int) -> float:
    size = SIZE.get(device, SIZE["cuda"])
    a, b = (
        torch.ones(size, size, dtype=dtype, device=device),
        torch.ones(size, size, dtype=dtype, device=device),
    )
    out = torch.empty_like(a)
    best = math.inf
    begin = time.perf_counter()
    with torch.no_grad(), torch.autocast(device, enabled=False):
        for number in range(50):
            before = time.perf_counter()
            torch.mm(a, b, out=out)
            if device == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if number:  # the first one also makes the library ready
                best = min(best, now - before)
            if number >= 2 and now - begin > 0.12:
                break
    return 2.0 * size**3 / best


def peak_memory(device: str) -> int:
    """Most bytes that torch held on the GPU, or that were resident in this process, so far."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts at what the parent held when it started this process
        lines = status.read_text().splitlines()
        held = next((line for line in lines if line.startswith("VmHWM:")), None)
        if held is not None:
            return int(held.split()[1]) << 10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
