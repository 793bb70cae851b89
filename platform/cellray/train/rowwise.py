"""AdamW that leaves the rows of large tables alone in the steps that do not ask for them.

In such a step a row has no gradient: its moments shrink, and it moves on by what is left of them. All that
follows from the row as it was asked for last, so it is made up for when it is asked for next. The updates
are those of AdamW, for the price of the rows that are asked for: of 120,000 peaks some thousand in a step.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

SLAB = 1 << 14
"""Rows that are settled at a time."""
NOTHING = 1e-9
"""What a row still has to move, as a share of its last step, when it is taken to stand still."""
TINY = 1e-37
"""Divides the 0 of a row that has moved in the last step."""


def matched(
    tensors: Mapping[str, Tensor], tables: Iterable[str], group: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A checkpoint, of whatever optimiser of this kind, as one needs it that has these `tables` (names).

    `group` has its `betas` and `eps`.
    """
    found, tables = dict(tensors), set(tables)
    steps = {k.removesuffix(".step"): step for k, step in tensors.items() if k.endswith(".step")}
    for place, step in steps.items():
        name = place.removeprefix("optimizer.")
        behind = f"{place}.last" in found
        if name in tables and not behind:
            rows = len(found[f"model.{name}"])
            found[f"{place}.last"] = torch.full((rows,), int(step), dtype=torch.int32)
            found[f"{place}.owed"] = torch.zeros(int(step) + 1, 2, dtype=torch.float64)
        elif behind and name not in tables:
            parts = ("step", "exp_avg", "exp_avg_sq", "last", "owed")
            state = {part: found.pop(f"{place}.{part}").clone() for part in parts}
            found[f"model.{name}"] = found[f"model.{name}"].clone()
            catch_up(found[f"model.{name}"], state, group)
            found |= {f"{place}.{part}": state[part] for part in parts[:3]}
    return found


class RowwiseAdamW:
    """AdamW; the weights of `tables` by rows, as their forward asks for them, without weight decay.

    `param_groups` and `state` are those of `torch.optim.AdamW`, whose function this calls. (To make one of
    torch's optimisers imports its compiler, which takes a second of every start.)

    As long as this is in use the tables are behind: read them after `settle`. Beside AdamW's a table has two
    entries in `state`: `last` [rows], the step a row was brought to, and `owed` [steps and room for
    more, 2], how far a row that was brought to that step has moved since, in units of what it moves in
    a step of size 1: if the root of its second moment is large against `eps`, and if it is small.
    Gradients of tables are sparse tensors, coalesced, on every worker of the same rows.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        tables: Sequence[nn.Embedding] = (),
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float = 1e-8,
    ) -> None:
        self.param_groups = [{"lr": lr, "betas": betas, "eps": eps, **group} for group in groups]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self.tables: dict[int, Tensor] = {id(table.weight): table.weight for table in tables}
        """By `id`."""
        self._group = {id(p): group for group in self.param_groups for p in group["params"]}
        self._embeddings = list(tables)
        self._hooks = [table.register_forward_pre_hook(self._ask) for table in tables]
        for table in tables:
            assert self._group[id(table.weight)]["weight_decay"] == 0
            table.sparse = True

    @torch.no_grad()
    def step(self) -> None:
        """One update; rows of tables without a gradient make up for it when they are asked for."""
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None and id(p) not in self.tables]
            states = [self.state[p] for p in found]
            for p, state in zip(found, states, strict=True):
                if not state:
                    state |= _begun(p)
            if found:
                adamw(
                    found,
                    [p.grad for p in found],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [state["step"] for state in states],
                    fused=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
        for table in self.tables.values():
            self._step(table, table.grad)

    def zero_grad(self) -> None:
        """No parameter has a gradient any more."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def catch_up_all(self) -> None:
        """Bring all rows to the last step.

        A step that is not taken needs it: each worker has brought what it read to the last one, and nothing
        told the others. What a row owes is made up for in one go on all of them, or they differ by rounding.
        """
        for table in self.tables.values():
            catch_up(table, self.state[table], self._group[id(table)])

    def settle(self) -> None:
        """Bring all rows to the last step, at the end: after this the tables are as any other."""
        self.catch_up_all()
        for hook, embedding in zip(self._hooks, self._embeddings, strict=True):
            hook.remove()
            embedding.sparse = False

    def _ask(self, table: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Before the forward of a table: what it is asked for has to be up to date."""
        weight = table.weight
        assert isinstance(weight, nn.Parameter)
        if torch.is_grad_enabled():
            catch_up(weight, self.state[weight], self._group[id(weight)], arguments[0])

    def _step(self, p: Tensor, gradient: Tensor | None) -> None:
        state, group = self.state[p], self._group[id(p)]
        if not state:
            state |= _begun(p) | {
                "last": torch.zeros(len(p), dtype=torch.int32, device=p.device),
                "owed": torch.zeros(1, 2, dtype=torch.float64, device=p.device),
            }
        if gradient is not None:  # what only other workers needed is behind on this one
            catch_up(p, state, group, gradient.indices()[0])
        state["step"] += 1
        now, (first, second) = int(state["step"]), group["betas"]
        rate, root = group["lr"] / (1 - first**now), math.sqrt(1 - second**now)
        state["owed"] = _moved(state["owed"], now, (rate * root, rate), (first / math.sqrt(second), first))
        if gradient is not None:
            move = _compiled("moved_rows") if p.device.type == "cpu" else moved_rows
            rows, own = gradient.indices()[0], gradient.values()
            move(p, state, rows, own, (first, second), rate * root, group["eps"] * root)


def _begun(p: Tensor) -> dict[str, Tensor]:
    """What AdamW keeps of a parameter, before the first step."""
    return {
        "step": torch.zeros((), device=p.device),
        "exp_avg": torch.zeros_like(p),
        "exp_avg_sq": torch.zeros_like(p),
    }


def _moved(owed: Tensor, now: int, size: tuple[float, float], shrink: tuple[float, float]) -> Tensor:
    """`owed` after step `now` of this `size`, with room for it; rows move by `shrink` less every step."""
    if len(owed) <= now:
        owed = torch.cat([owed, owed.new_zeros(max(256, len(owed)), 2)])
    reach = min(now, math.ceil(math.log(NOTHING) / math.log(max(shrink))))
    ages = torch.arange(reach, 0, -1, dtype=torch.float64, device=owed.device)
    owed[now - reach : now] += owed.new_tensor(size) * owed.new_tensor(shrink) ** ages[:, None]
    return owed


@torch.no_grad()
def catch_up(
    weight: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any], rows: Tensor | None = None
) -> None:
    """Bring rows of a table, or all, to the last step, in place; `group` has AdamW's `betas` and `eps`."""
    if not state:
        return
    settle = _compiled("settled_rows") if weight.device.type == "cpu" else settled_rows
    every = torch.arange(len(weight), device=weight.device) if rows is None else rows
    for some in every.split(SLAB):
        settle(weight, state, some, group["betas"], group["eps"])


def settled_rows(
    weight: Tensor, state: Mapping[str, Tensor], rows: Tensor, betas: tuple[float, float], eps: float
) -> None:
    """Bring `rows` to the last step, on any device.

    AdamW divides by root + eps, of which the root shrinks and eps does not. What a row has moved since is
    what it comes to if one is much larger than the other, and near it between.
    """
    last = state["last"].index_select(0, rows)
    age = (int(state["step"]) - last)[:, None].float()
    large, small = state["owed"][last.long()].float().split(1, dim=1)
    mean = state["exp_avg"].index_select(0, rows)
    square = state["exp_avg_sq"].index_select(0, rows)
    wide = square.sqrt() * small + (eps * large + TINY)
    weight.index_add_(0, rows, mean * (large * small) / wide, alpha=-1)
    state["exp_avg"].index_copy_(0, rows, mean * betas[0] ** age)
    state["exp_avg_sq"].index_copy_(0, rows, square * betas[1] ** age)
    state["last"].index_fill_(0, rows, int(state["step"]))


def moved_rows(
    weight: Tensor,
    state: Mapping[str, Tensor],
    rows: Tensor,
    gradient: Tensor,
    betas: tuple[float, float],
    rate: float,
    eps: float,
) -> None:
    """AdamW's step for `rows`, whose gradients are `gradient` [rows, width], on any device."""
    mean = state["exp_avg"].index_select(0, rows).lerp_(gradient, 1 - betas[0])
    square = state["exp_avg_sq"].index_select(0, rows)
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    weight.index_add_(0, rows, mean / square.sqrt().add_(eps), alpha=-rate)
    state["exp_avg"].index_copy_(0, rows, mean)
    state["exp_avg_sq"].index_copy_(0, rows, square)
    state["last"].index_fill_(0, rows, int(state["step"]))


def _compiled(name: str) -> Callable[..., None]:
    """The same by a compiled loop, in one pass over the memory."""
    from cellray.train import compiled  # numba, which an embedder need not import

    loop = getattr(compiled, name)

    def run(weight: Tensor, state: Mapping[str, Tensor], rows: Tensor, *more: Any) -> None:
        parts = [state[part].numpy() for part in ("exp_avg", "exp_avg_sq", "last", "owed")]
        given = [value.detach().numpy() if isinstance(value, Tensor) else value for value in more]
        loop(weight.detach().numpy(), *parts, rows.numpy(), int(state["step"]), *given)

    return run
