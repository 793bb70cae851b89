"""Large modules shared out among the workers (FSDP2): each worker holds its rows of every parameter.

So it does of the gradients and of what the optimiser keeps. A module's parameters are gathered before
its forward and before its backward, and given up after either; its gradients are summed as they are
scattered. What is small, and what no module of UNITS holds, stays whole on every worker, its gradient
summed as without sharding (`workers.sum_gradients`).

All workers have to gather the same modules in the same order, in every step. So a module is gathered
as a whole, whatever happens within it; one that is called in a step only where this worker has
something for it looks at `awaited`, and if that is set is called with nothing.
"""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from cellray.model.decoder import Decoder
from cellray.model.encoder import Encoder
from cellray.model.student import Block
from cellray.model.teacher import Fusion
from cellray.train import workers
from cellray.train.workers import shared_out

UNITS: Mapping[type[nn.Module], tuple[str, ...]] = {
    Encoder: (),
    Fusion: (),
    Decoder: ("negative_log_likelihood",),
    Block: (),
    nn.EmbeddingBag: (),
}
"""What is gathered as one, and its methods beside `forward` that use its parameters. Such a module has
to be called once in a step, and none of its parameters may be used from outside."""


class Shares:
    """The units below `root` that are trained, shared out among the workers of this process group."""

    def __init__(self, root: nn.Module, device: str) -> None:
        """Takes them out of the memory of this worker, up to its part. All workers hold the same before."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(device, (workers.world(),))
        self._units = []
        for parent, name, unit in list(_units(root)):
            self._units.append((parent, name, unit, _hollow(unit)))
            # A scalar has no rows.
            scalars = {p for p in unit.parameters() if p.ndim == 0}
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
            assert isinstance(unit, FSDPModule)
            # Losses are divided by global counts, so the sum of the gradients is wanted, not their mean.
            # (gloo would take the sum in any case, and silently: it has no other reduce-scatter.)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            # A worker whose cells do not reach some parameter takes part with zeros.
            unit.set_reduce_scatter_unused_params(True)
            for method in UNITS[_kind(unit)]:
                register_fsdp_forward_method(unit, method)
            unit.awaited = True  # type: ignore[assignment]

    def undo(self) -> None:
        """Put plain modules with all parameters back where the units were. All workers have to call it."""
        for parent, name, unit, hollow in self._units:
            state = {key: whole(value.detach()) for key, value in unit.state_dict().items()}
            hollow.load_state_dict(state, strict=True, assign=True)
            parent.add_module(name, hollow)
        self._units = []


def _kind(module: nn.Module) -> type[nn.Module]:
    return next(kind for kind in UNITS if isinstance(module, kind))


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of every trained unit; none lies within another."""
    for name, child in module.named_children():
        if not isinstance(child, tuple(UNITS)):
            yield from _units(child)
        elif any(p.requires_grad for p in child.parameters()):
            yield module, name, child


def _hollow(module: nn.Module) -> nn.Module:
    """A copy whose parameters take no memory."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, empty)


def own(tensor: Tensor) -> Tensor:
    """What this worker holds of a tensor: its rows, or all of one that is not shared out. No copy."""
    with torch.no_grad():
        return tensor.to_local() if shared_out(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every worker; all of them have to ask."""
    return tensor.full_tensor() if shared_out(tensor) else tensor


def rows_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, on this worker, what it holds of `like`, shared out in the same way."""
    if not shared_out(like):
        return tensor
    rows = -(-len(tensor) // workers.world())
    return tensor[workers.rank() * rows : (workers.rank() + 1) * rows]


def shared_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This worker's rows as a part of a tensor that is shared out as `like` is."""
    if not shared_out(like):
        return tensor
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def clip(parameters: list[nn.Parameter], most: float) -> float:
    """The norm of all gradients together, over all workers; scales them down to `most` if it is larger.

    Gradients of what is whole have to be the sums over the workers already.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    rows = [own(g) for g in gradients if shared_out(g)]
    rest = [workers.numbers(g) for g in gradients if not shared_out(g)]
    square = nn.utils.get_total_norm(rest).square()
    if rows:
        square = square + workers.total(nn.utils.get_total_norm(rows).square())
    norm = float(square.sqrt())
    if norm + 1e-6 > most:
        for gradient in [*rows, *rest]:
            gradient.mul_(most / (norm + 1e-6))
    return norm
