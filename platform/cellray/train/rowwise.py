"""AdamW that leaves the rows of large tables alone in the steps that do not ask for them.

In such a step a row has no gradient: its moments shrink, and it moves on by what is left of them. All that
follows from the row as it was asked for last, so it is made up for when it is asked for next. The updates
are those of AdamW, for the price of the rows that are asked for: of 120,000 peaks some 1,000 in a step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SLAB = 1 << 14
"""Rows that are settled at a time."""
NOTHING = 1e-9
"""What a row still has to move, as a share of its last step, when it is taken to stand still."""


TINY = 1e-38
"""Divides what is 0 already."""


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


class RowwiseAdamW(torch.optim.AdamW):
    """AdamW; the weights of `tables` by rows, as their forward asks for them, without weight decay.

    As long as this is in use they are behind: read them after `settle`. Beside AdamW's a table has two
    entries in `state`: `last` [rows], the step a row was brought to, and `owed` [steps and room for
    more, 2], how far a row that was brought to that step has moved since, in units of what it moves in
    a step of size 1: if the root of its second moment is large against `eps`, and if it is small.
    Gradients of tables are sparse tensors, on every worker of the same rows.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        tables: Sequence[nn.Embedding] = (),
        *,
        lr: float,
        betas: tuple[float, float],
    ) -> None:
        super().__init__([dict(group) for group in groups], lr=lr, betas=betas, fused=True)
        self.tables: dict[int, Tensor] = {id(table.weight): table.weight for table in tables}
        """By `id`."""
        self._group = {id(p): group for group in self.param_groups for p in group["params"]}
        self._embeddings = list(tables)
        self._hooks = [table.register_forward_pre_hook(self._ask) for table in tables]
        for table in tables:
            assert self._group[id(table.weight)]["weight_decay"] == 0
            table.sparse = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures here
        """One update of everything that has a gradient, and of all rows of the tables."""
        asked = {key: table.grad for key, table in self.tables.items()}
        for table in self.tables.values():
            table.grad = None
        super().step()
        for key, table in self.tables.items():
            self._step(table, asked[key])
            table.grad = asked[key]

    def settle(self) -> None:
        """Bring all rows to the last step, at the end: after this the tables are as any other."""
        for table in self.tables.values():
            catch_up(table, self.state[table], self._group[id(table)])
        for hook, embedding in zip(self._hooks, self._embeddings, strict=True):
            hook.remove()
            embedding.sparse = False

    def _ask(self, table: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Before the forward of a table: what it is asked for has to be up to date."""
        weight = table.weight
        assert isinstance(weight, nn.Parameter)
        if torch.is_grad_enabled() and self.state[weight]:
            _catch_up(weight, self.state[weight], self._group[id(weight)], arguments[0])

    def _step(self, p: Tensor, gradient: Tensor | None) -> None:
        state, group = self.state[p], self._group[id(p)]
        if not state:
            state |= {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
                "last": torch.zeros(len(p), dtype=torch.int32, device=p.device),
                "owed": torch.zeros(1, 2, dtype=torch.float64),
            }
        state["step"] += 1
        now, (first, second) = int(state["step"]), group["betas"]
        rate, root = group["lr"] / (1 - first**now), math.sqrt(1 - second**now)
        state["owed"] = _moved(state["owed"], now, (rate * root, rate), (first / math.sqrt(second), first))
        if gradient is None:
            return
        rows, own = gradient._indices()[0], gradient._values()
        mean = state["exp_avg"].index_select(0, rows).lerp_(own, 1 - first)
        square = state["exp_avg_sq"].index_select(0, rows).mul_(second).addcmul_(own, own, value=1 - second)
        p.index_add_(0, rows, mean / square.sqrt().add_(group["eps"] * root), alpha=-rate * root)
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)
        state["last"].index_fill_(0, rows, now)


def _moved(owed: Tensor, now: int, size: tuple[float, float], shrink: tuple[float, float]) -> Tensor:
    """`owed` after step `now` of this `size`, with room for it; rows move by `shrink` less every step."""
    if len(owed) <= now:
        owed = torch.cat([owed, owed.new_zeros(max(256, len(owed)), 2)])
    reach = min(now, math.ceil(math.log(NOTHING) / math.log(max(shrink))))
    ages = torch.arange(reach, 0, -1, dtype=torch.float64, device=owed.device)
    owed[now - reach : now] += owed.new_tensor(size) * owed.new_tensor(shrink) ** ages[:, None]
    return owed


@torch.no_grad()
def catch_up(weight: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
    """Bring all rows of a table to the last step, in place; `group` has AdamW's `betas` and `eps`."""
    if state:
        for rows in torch.arange(len(weight), device=weight.device).split(SLAB):
            _catch_up(weight, state, group, rows)


@torch.no_grad()
def _catch_up(weight: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any], rows: Tensor) -> None:
    first, second = group["betas"]
    now = int(state["step"])
    last = state["last"].index_select(0, rows)
    age = (now - last)[:, None].float()
    large, small = state["owed"].to(weight.device)[last.long()].float().split(1, dim=1)
    mean = state["exp_avg"].index_select(0, rows)
    square = state["exp_avg_sq"].index_select(0, rows)
    # AdamW divides by root + eps, of which the root shrinks and eps does not. This is what it comes to if
    # one is much larger than the other, and near it between.
    wide = square.sqrt() * small + group["eps"] * large
    weight.index_add_(0, rows, mean * large * small / wide.clamp_min(TINY), alpha=-1)
    state["exp_avg"].index_copy_(0, rows, mean * first**age)
    state["exp_avg_sq"].index_copy_(0, rows, square * second**age)
    state["last"].index_fill_(0, rows, now)
