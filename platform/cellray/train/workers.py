"""What workers tell each other: sums, and rows whose gradients flow back. With one worker, nothing."""

import sys
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def shared_out(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether each worker holds a part of it: a DTensor.

    Where nothing has imported them, which takes half a second of every start, nothing is.
    """
    found = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(tensor, found.DTensor)


def total(values: Tensor) -> Tensor:
    """Sum over the workers, without gradient."""
    values = values.detach().clone()
    if world() > 1:
        dist.all_reduce(values)
    return values


def agreed(flag: bool) -> bool:
    """Whether any worker says so: the same answer for all, who must all ask."""
    return any_of(flag)[0]


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Of each flag, whether any worker says so, in one exchange."""
    if world() == 1:
        return flags
    return tuple(n > 0 for n in total(torch.tensor(flags, dtype=torch.float32)).tolist())


def from_first(value: Any) -> Any:
    """What the first worker holds."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    if world() > 1:
        dist.barrier()


TABLE = 1 << 18
"""Numbers from which on a gradient is exchanged by rows, where that is less: 1 MB of them."""


def sum_gradients(parameters: Iterable[nn.Parameter], tables: Container[int] = ()) -> None:
    """Replace every gradient by its sum over the workers; zeros where there is none.

    Those of `tables`, by `id`, are sparse, and have no rows where there is none.

    Losses are divided by global counts before they are differentiated, so the sum over workers
    is the gradient of the one-worker loss. What is shared out among the workers has been summed before.
    Of tables and other large parameters, one row a feature, workers exchange the rows that any of them
    has something in, and a byte for every row to find them.
    """
    found = [p for p in parameters if p.requires_grad]
    for p in found:
        # With one worker too: the optimizer passes over what has no gradient, and moves what has zeros.
        p.grad = _gradient(p, table=id(p) in tables)
    if world() > 1:
        _unite([p for p in found if p.grad is not None and p.grad.is_sparse])
    whole = [p.grad for p in found if p.grad is not None and not shared_out(p)]
    if world() == 1 or not whole:
        return
    rows = _touched([g for g in whole if not g.is_sparse and g.dim() == 2 and g.numel() >= TABLE])
    gradients = [numbers(g) for g in whole]
    parts = [g.index_select(0, rows[id(g)]) if id(g) in rows else g for g in gradients]
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat)
    for g, part, own in zip(gradients, parts, flat.split([part.numel() for part in parts]), strict=True):
        if part is g:
            g.copy_(own.view_as(g))
        else:
            g.index_copy_(0, rows[id(g)], own.view_as(part))


def _gradient(p: nn.Parameter, *, table: bool) -> Tensor:
    """The gradient: zeros where there is none, of a table no rows; else of a table with rising rows."""
    g = p.grad
    if g is None and table:
        return _rows_of(p, torch.empty(0, dtype=torch.int64, device=p.device), p.new_empty(0, *p.shape[1:]))
    if g is None:
        return torch.zeros_like(p)
    if not g.is_sparse:
        return g
    rows = g._indices()[0]
    # They need not be sorted if they were asked for in order, each once.
    return _rows_of(p, rows, g._values()) if bool((rows[1:] > rows[:-1]).all()) else g.coalesce()


def _unite(tables: list[nn.Parameter]) -> None:
    """Give each sparse gradient the rows that any worker's has, zeros where this worker has none."""
    if not tables:
        return
    own = [p.grad for p in tables if p.grad is not None]
    flags = [torch.zeros(len(g), dtype=torch.bool, device=g.device) for g in own]
    for flag, g in zip(flags, own, strict=True):
        flag[g.indices()[0]] = True
    for p, g, rows in zip(tables, own, _of_any(flags), strict=True):
        values = g.values().new_zeros(len(rows), *g.shape[1:])
        values[torch.searchsorted(rows, g.indices()[0])] = g.values()
        p.grad = _rows_of(g, rows, values)


def _rows_of(table: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A sparse tensor of the shape of `table` with `values` at `rows`, which rise."""
    return torch.sparse_coo_tensor(rows[None], values, table.shape, is_coalesced=True, check_invariants=False)


def numbers(gradient: Tensor) -> Tensor:
    """What a gradient holds; of a sparse one the rows that are in it. No copy."""
    return gradient.values() if gradient.is_sparse else gradient


def _touched(tables: list[Tensor]) -> dict[int, Tensor]:
    """By `id`, the rows of a table in which any worker's is not zero, where they are less than half of them.

    The same on all workers.
    """
    if not tables:
        return {}
    bounds = [table.aminmax(dim=1) for table in tables]
    found = _of_any([(low != 0) | (high != 0) for low, high in bounds])
    return {id(t): rows for t, rows in zip(tables, found, strict=True) if 2 * len(rows) < len(t)}


def _of_any(flags: list[Tensor]) -> list[Tensor]:
    """Where each of `flags`, bool, is set on any worker, rising; one exchange for all of them."""
    every = torch.cat(flags).to(torch.uint8)
    dist.all_reduce(every, op=dist.ReduceOp.MAX)
    return [own.nonzero().squeeze(1) for own in every.split([len(flag) for flag in flags])]


def all_rows(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all workers in rank order, and where this worker's begin. Gradients flow back."""
    if world() == 1:
        return rows, 0
    sizes = torch.zeros(world(), dtype=torch.int64, device=rows.device)
    sizes[rank()] = len(rows)
    dist.all_reduce(sizes)
    counts = [int(n) for n in sizes]
    gathered: Tensor = _Gather.apply(rows, counts)
    return gathered, sum(counts[: rank()])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        first = sum(ctx.counts[: rank()])
        return gradient[first : first + ctx.counts[rank()]], None
