"""Attention of cells of any lengths, packed end to end: nothing is padded. `attention` chooses the kernel.

On a GPU in half precision one call of FlashAttention takes all cells, as they are. Elsewhere cells of
one length go together, so that each is computed by itself, and has the same bits in any batch on a CPU.
"""

import functools
import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 16_384
"""Most positions that pass the layers in one call: enough to fill the cores, little enough for caches."""
BLOCK = 128
"""Positions that FlashAttention takes at a time: an upper bound of lengths may as well be a multiple."""
ROWS = 8
"""Fewest rows of a product; see `steady`."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How the layers of an encoder are computed. Nothing of it changes more than the rounding."""

    together: int = GROUP
    """Most positions, tokens and [CLS], that pass the layers in one call; a longer cell passes alone."""
    recompute: bool = False
    """Keep no activation of a call, but make them anew when its gradient is asked for: memory for one
    call instead of all, for a third more operations. Bit for bit the same."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether torch.compile fuses the layers; auto does on a GPU, where there is a C compiler too."""


class Packed(NamedTuple):
    """Cells end to end: cell i has the positions `[offsets[i], offsets[i + 1])`, one at the least."""

    offsets: Tensor
    """int32 [cells + 1]."""
    longest: int
    """At least as many positions as any cell has."""
    flash: bool
    """Whether FlashAttention takes them: see `flash`."""


def attention(q: Tensor, k: Tensor, v: Tensor, where: Tensor | Packed | None) -> Tensor:
    """What every position takes from those of its own cell, in the shape of `q`.

    Packed, `q`, `k` and `v` are [positions, heads, width of a head]. Else they are [cells, positions,
    heads, width of a head], and `where` says which positions are real, bool [cells, positions], or is
    None if all are.
    """
    if not isinstance(where, Packed):
        return _scaled(q, k, v, None if where is None else where[:, None, None, :])
    if not where.flash:
        return _apart(q, k, v, where.offsets)
    from torch.nn.attention.varlen import varlen_attn  # its import takes a second; since torch 2.10

    mixed = varlen_attn(q, k, v, where.offsets, where.offsets, where.longest, where.longest)
    assert isinstance(mixed, Tensor)
    return mixed


def _by_length(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """One call for each run of cells of the same length, which costs least if cells are sorted by it."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(offsets.diff().tolist())]
    sizes = [length * cells for length, cells in runs]
    found = []
    for (_, cells), *parts in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        a, b, c = (part.unflatten(0, (cells, -1)) for part in parts)
        found.append(_scaled(a, b, c, None).flatten(0, 1))
    return torch.cat(found)


_apart = _by_length


def uncompiled() -> None:
    """Have torch.compile leave `_by_length` as it is: its shapes are another batch's every time.

    No decorator says so: that imports the compiler, a second of every process that embeds some cells.
    """
    global _apart
    _apart = torch.compiler.disable(_by_length)


def _scaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    with torch.autocast("cpu", enabled=False):  # the backward of bf16 attention takes twice the time of fp32
        mixed = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    return mixed.transpose(1, 2)


def flash(device: torch.device, dtype: torch.dtype, head: int) -> bool:
    """Whether FlashAttention takes heads `head` wide, of weights of this type, which autocast may lower.

    It wants half precision, heads of a multiple of 8 up to 128, which run backward on every card, and a
    GPU of compute capability 8 (Ampere) or later.
    """
    if device.type != "cuda":
        return False
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return (
        dtype in (torch.bfloat16, torch.float16)
        and head % 8 == 0
        and head <= 128
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def compiles(compute: Compute, device: torch.device) -> bool:
    """Whether the layers are compiled: asked for, or on a GPU with a C compiler, which Triton calls."""
    if compute.compile == "auto":
        return device.type == "cuda" and _c_compiler()
    return compute.compile == "on"


@functools.cache
def _c_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))


def groups(offsets: Tensor, together: int = GROUP) -> list[Tensor]:
    """Cells by length, the short first, in groups that are packed: each a tensor of cell indices.

    A cell has a position for each of its tokens, `offsets[i + 1] - offsets[i]`, and one for [CLS].
    A group has `together` positions at the most, or one cell.
    """
    sizes = offsets.diff() + 1
    order = torch.argsort(sizes, stable=True)
    found, first, held = [], 0, 0
    for place, size in enumerate(sizes[order].tolist()):
        if held and held + size > together:
            found.append(order[first:place])
            first, held = place, 0
        held += size
    return [*found, order[first:]]


def spans(starts: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Where the elements of some spans lie, one span after the other; `total` is the sum of `lengths`."""
    before = torch.cumsum(lengths, 0) - lengths
    shift = torch.repeat_interleave(starts - before, lengths, output_size=total)
    return torch.arange(total, device=starts.device) + shift


def steady(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`module(x)` for `x` [rows, width], where no row depends on how many there are.

    Products of one to three rows take another way through a CPU's library, and round otherwise.
    """
    if len(x) >= ROWS:
        return module(x)
    # No view: an encoder whose parameters are shared out among workers may not return one.
    return module(F.pad(x, (0, 0, 0, ROWS - len(x))))[: len(x)].clone()
