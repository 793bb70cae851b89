import copy
import functools
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cellray.model.decoder import Decoder
from cellray.model.encoder import Encoder
from cellray.train import checkpoint, rowwise
from cellray.train.fit import adamw
from cellray.train.recipe import Optim
from cellray.train.rowwise import RowwiseAdamW, catch_up
from tests import pair_worker

ROWS, WIDTH = 200, 6


class Model(nn.Module):
    """A table of which some rows are asked for, and a layer beside it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids):
        return nn.functional.softplus(self.layer(self.table(ids))).sum()


def optimizer(model, *, rowwise):
    """By rows, or AdamW itself."""
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    if rowwise:
        return RowwiseAdamW(groups, [model.table], lr=1e-2, betas=(0.9, 0.98))
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98))


def asked(step):
    """Rows that a step asks for: some often, some seldom, and most of them never."""
    rng = np.random.default_rng(step)
    often, seldom = rng.choice(20, 6, replace=False), 20 + rng.choice(100, 3, replace=False)
    return torch.from_numpy(np.sort(np.concatenate([often, seldom])))


def take(model, own, steps, scale=1.0):
    for step in steps:
        for group in own.param_groups:
            group["lr"] = 1e-2 * (1 + math.sin(step / 9))
        (scale * model(asked(step).to(model.table.weight.device))).backward()
        for p in model.parameters():
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.coalesce()
        own.step()
        own.zero_grad()


@pytest.fixture(scope="module")
def plain():
    model = Model()
    own = optimizer(model, rowwise=False)
    take(model, own, range(400))
    return model, own


def close(found, wanted):
    for (name, a), b in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=2e-6, rtol=2e-5), f"{name}: {(a - b).abs().max()}"


def test_rows_that_are_made_up_for_are_where_adamw_takes_them(plain):
    model = Model()
    own = optimizer(model, rowwise=True)
    take(model, own, range(400))
    behind = (model.table.weight - plain[0].table.weight).abs().amax(1) > 1e-4
    assert behind[20:120].sum() > 20
    own.settle()
    close(model, plain[0])
    for part in ("exp_avg", "exp_avg_sq"):
        found, wanted = (o.state[m.table.weight][part] for m, o in ((model, own), plain))
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-3)
    untouched = own.state[model.table.weight]["exp_avg_sq"].amax(1) == 0
    assert untouched[120:].all()
    assert torch.equal(model.table.weight[120:], Model().table.weight[120:])
    # From now on the table is as any other.
    assert not model.table.sparse
    model(asked(0)).backward()
    gradient = model.table.weight.grad
    assert gradient is not None
    assert not gradient.is_sparse


def test_what_is_no_table_is_updated_as_by_torch_itself():
    found = []
    for way in (RowwiseAdamW, functools.partial(torch.optim.AdamW, fused=True)):
        model = Model()
        groups = [
            {"params": [model.layer.weight, model.table.weight], "weight_decay": 0.1},
            {"params": [model.layer.bias], "weight_decay": 0.0},
        ]
        own = way(groups, lr=1e-2, betas=(0.9, 0.98))
        take(model, own, range(20))
        found.append((model.state_dict(), [own.state[p] for p in model.parameters()]))
    (one, kept), (two, wanted) = found
    assert all(torch.equal(one[name], value) for name, value in two.items())
    assert all(torch.equal(a[part], b[part]) for a, b in zip(kept, wanted, strict=True) for part in b)


@pytest.mark.parametrize("scale", [1e-6, 1e-8, 1e-9])
def test_gradients_as_small_as_eps_move_rows_as_far_but_for_a_fiftieth(scale):
    models = []
    for way in (True, False):
        model = Model()
        own = optimizer(model, rowwise=way)
        take(model, own, range(400), scale)
        if way:
            own.settle()
        models.append(model.table.weight)
    start = Model().table.weight
    moved = (models[1] - start)[20:120].abs().amax(1)
    assert moved.max() > 1e-3
    assert ((models[0] - models[1])[20:120].abs().amax(1) <= 0.02 * moved).all()


def test_compiled_loops_are_the_plain_ones(monkeypatch):
    found = []
    for way in (rowwise._compiled, lambda name: getattr(rowwise, name)):
        monkeypatch.setattr(rowwise, "_compiled", way)
        model = Model()
        own = optimizer(model, rowwise=True)
        take(model, own, range(100))
        own.settle()
        found.append(model)
    close(*found)
    assert not torch.equal(found[0].table.weight, found[1].table.weight)  # two ways, indeed


def test_looking_does_not_bring_rows_up_to_date():
    model = Model()
    own = optimizer(model, rowwise=True)
    take(model, own, range(5))
    before = {k: v.clone() for k, v in own.state[model.table.weight].items()}
    with torch.no_grad():
        model(torch.arange(ROWS))
    assert all(torch.equal(v, before[k]) for k, v in own.state[model.table.weight].items())


def test_a_step_without_the_table_counts():
    found, wanted = Model(), Model()
    for model, way in ((found, True), (wanted, False)):
        own = optimizer(model, rowwise=way)
        take(model, own, range(3))
        for _ in range(4):
            model.layer(torch.ones(1, WIDTH)).sum().backward()
            if not way:
                model.table.weight.grad = torch.zeros_like(model.table.weight)
            own.step()
            own.zero_grad()
        take(model, own, range(3, 6))
        if way:
            own.settle()
    close(found, wanted)


def snapshot(model, own):
    return copy.deepcopy(checkpoint.snapshot(model, own))


def test_a_run_goes_on_bit_for_bit():
    whole, first, second = Model(), Model(), Model()
    own = optimizer(whole, rowwise=True)
    take(whole, own, range(300))
    own.settle()
    own = optimizer(first, rowwise=True)
    take(first, own, range(130))
    tensors = snapshot(first, own)
    own = optimizer(second, rowwise=True)
    checkpoint.restore(tensors, second, own)
    take(second, own, range(130, 300))
    own.settle()
    for a, b in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("before", "after"), [*itertools.product([True, False], repeat=2)])
def test_either_way_goes_on_from_what_the_other_wrote(plain, before, after):
    first, second = Model(), Model()
    own = optimizer(first, rowwise=before)
    take(first, own, range(130))
    tensors = snapshot(first, own)
    kept = copy.deepcopy(tensors)
    own = optimizer(second, rowwise=after)
    checkpoint.restore(tensors, second, own)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors.items())
    assert ("last" in own.state[second.table.weight]) == after
    take(second, own, range(130, 400))
    if after:
        own.settle()
    close(second, plain[0])


def test_what_a_row_owes_is_settled_in_slabs(monkeypatch):
    model = Model()
    own = optimizer(model, rowwise=True)
    take(model, own, range(50))
    state, group = own.state[model.table.weight], own.param_groups[0]
    found = []
    for slab in (rowwise.SLAB, 7):
        monkeypatch.setattr(rowwise, "SLAB", slab)
        weight, mine = model.table.weight.detach().clone(), copy.deepcopy(state)
        catch_up(weight, mine, group)
        assert (mine["last"] == 50).all()
        found.append(weight)
    assert torch.equal(*found)
    assert not torch.equal(found[0], model.table.weight)


def test_a_run_that_is_killed_ends_as_if_it_had_not_been(tmp_path):
    few = pair_worker.FEW
    whole, _ = pair_worker.trained(tmp_path / "whole", **few)
    pair_worker.trained(tmp_path / "killed", at=pair_worker.AT, **few)
    names = [
        name
        for path in (tmp_path / "killed").glob("checkpoints/joint/*/state.safetensors")
        for name in load_file(path)
    ]
    assert any(name.endswith("feature.weight.last") for name in names)
    broken, events = pair_worker.trained(tmp_path / "killed", **few)
    assert any("resumed" in event for event in events)
    for one, other in zip(whole.parameters(), broken.parameters(), strict=True):
        assert torch.equal(one, other)


def test_tables_are_those_with_many_more_features_than_a_step_needs():
    decoders = [Decoder(features, 4, "bernoulli") for features in (19, 20, 400)]
    encoders = [Encoder(features, 4, 1, 1, 8) for features in (59, 60)]
    modules = [*decoders, *encoders, nn.Embedding(1000, 4)]
    parameters, own = adamw(modules, Optim(), asked=10, read=60)
    assert len(parameters) == sum(1 for m in modules for _ in m.parameters())
    assert list(own.tables) == [
        id(t.weight) for t in (decoders[1].feature, decoders[2].feature, encoders[1].feature)
    ]
    assert not adamw(modules, Optim())[1].tables
    assert not adamw(modules, Optim(ema=0.9), asked=10, read=60)[1].tables


STARTED = """
import sys, torch
from cellray.train import fit
from cellray.train.recipe import Optim
layer = torch.nn.Linear(2, 2)
parameters, optimizer = fit.adamw([layer], Optim())
layer(torch.ones(1, 2)).sum().backward()
fit.workers.sum_gradients(parameters, optimizer.tables)
fit.sharding.clip(parameters, 1.0)
optimizer.step()
assert optimizer.state[layer.weight]["step"] == 1
print(sorted({"torch._dynamo", "torch.distributed.tensor", "sympy"} & sys.modules.keys()))
"""


def test_a_training_starts_without_the_compiler_and_what_few_need():
    found = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
