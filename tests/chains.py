"""Chains of stages that are killed on their way, and what a stage trains."""

import copy

import pytest
import torch

from cellray.train.chain import chain
from cellray.train.fit import adamw
from cellray.train.recipe import Optim
from cellray.train.run import Run


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


def killed(recipe, kills):
    """Run the chain of `recipe` to its end, killed once at each of `kills`, (stage, step of a checkpoint).

    Returns the stages that were resumed, in order.
    """
    left, resumed = set(kills), []

    def emit(event):
        if "resumed" in event:
            resumed.append(event["stage"])
        place = (event["stage"], event.get("saved"))
        if place in left:
            left.discard(place)
            raise Killed

    while left:
        with pytest.raises(Killed):
            chain(Run(recipe), emit)
    chain(Run(recipe), emit)
    return resumed


def check_what_is_trained(work, root, batches):
    """One step a batch: all that `work` trains has a gradient in one of them, the rest of `root` stays.

    Returns the names of what stayed.
    """
    root.requires_grad_(False)
    for module in work.trained():
        module.requires_grad_(True)
    parameters, optimizer = adamw(work.trained(), Optim(lr=1e-3))
    before = copy.deepcopy(root.state_dict())
    touched = set()
    for number, batch in enumerate(batches):
        losses = work.losses(batch, number)
        sum(loss.weight * loss.sum / loss.count for loss in losses.values()).backward()
        touched |= {id(p) for p in parameters if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    trained = {id(p): n for n, p in root.named_parameters() if p.requires_grad}
    assert {trained[i] for i in trained.keys() - touched} == set()
    after = root.state_dict()
    frozen = [n for n, p in root.named_parameters() if not p.requires_grad]
    assert all(torch.equal(before[n], after[n]) for n in [*frozen, *(n for n, _ in root.named_buffers())])
    assert any(not torch.equal(before[n], after[n]) for n in trained.values())
    return frozen
