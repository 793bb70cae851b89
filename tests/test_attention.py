"""Packed cells against the plainest padded reference; what saves memory changes no bit."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from cellray.model.attention import Compute, Packed, attention, compiles, flash, groups
from cellray.model.encoder import Encoder, Tokens
from cellray.model.teacher import some_cells
from cellray.train.feed import Share
from cellray.train.fit import adamw, step
from cellray.train.meters import Gauges, Meter
from cellray.train.recipe import Optim
from cellray.train.stages import Joint
from tests import stores
from tests.attentive import attentive

WIDTH, CONTEXT = 32, 60
LENGTHS = [3, 60, 0, 17, 90, 1, 61, 12, 33, 7, 7, 8]
HIDDEN = torch.full((WIDTH,), 0.1)


def tokens(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    n = int(offsets[-1])
    return Tokens(
        torch.randint(50, (n,), generator=g),
        torch.rand(n, generator=g) * 3,
        torch.rand(n, generator=g) < 0.2,
        offsets,
        torch.rand(len(lengths), generator=g) + 5,
    )


def encoder(layers=2, **compute):
    torch.manual_seed(0)
    model = attentive(Encoder(50, WIDTH, layers, heads=2, context=CONTEXT))
    model.compute = Compute(**compute)
    return model


def plain_attention(q, k, v, real):
    """Attention written out: [cells, heads, positions, width of a head], `real` [cells, positions]."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~real[:, None, None, :], -math.inf).softmax(-1) @ v


def plain_encoder(model, cells):
    """What `model` says of a batch, every cell padded to the longest, nothing shared with it but weights."""
    ids, values, hidden = (
        torch.zeros(len(cells), CONTEXT, dtype=kind) for kind in (torch.int64, torch.float32, torch.bool)
    )
    real = torch.zeros(len(cells), CONTEXT, dtype=torch.bool)
    start = []
    for i in range(len(cells)):
        own = slice(int(cells.offsets[i]), int(cells.offsets[i + 1]))
        seen = cells.values[own].masked_fill(cells.hidden[own], 0.0) / model.unit
        bag = (seen[:, None] * model.feature.weight[cells.ids[own]]).sum(0)
        start.append(model.cls + model.depth((cells.depth[i] - model.reference)[None]) + model.bag(bag))
        n = min(own.stop - own.start, CONTEXT)
        first = slice(own.start, own.start + n)
        ids[i, :n], values[i, :n], hidden[i, :n], real[i, :n] = (
            cells.ids[first],
            seen[:n],
            cells.hidden[first],
            True,
        )
    said = torch.where(hidden[..., None], HIDDEN, model.value(values[..., None]))
    x = torch.cat([torch.stack(start)[:, None], model.feature(ids) + said], dim=1)
    exists = torch.cat([torch.ones(len(cells), 1, dtype=torch.bool), real], dim=1)
    for layer in model.layers:
        parts = layer.qkv(layer.before(x)).chunk(3, dim=-1)
        q, k, v = (p.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for p in parts)
        x = x + layer.mix(plain_attention(q, k, v, exists).transpose(1, 2).flatten(-2))
        x = x + layer.body(x)
    x = model.out(x)
    return model.summary(x[:, 0]), [x[i, 1 : 1 + int(real[i].sum())] for i in range(len(cells))]


def loss(summary, states):
    return (summary.square().sum() + (states * torch.linspace(-1, 1, WIDTH)).sum()) / 100


def outcome(model, cells):
    """Summaries, states, and the gradients of a loss on both."""
    model.zero_grad()
    found = model(cells, HIDDEN)
    loss(found.summary, found.states).backward()
    return found.summary, found.states, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("together", [1, 100, 16_384])
def test_packed_is_padded(together):
    cells = tokens(LENGTHS)
    model = encoder(together=together)
    summary, states, gradients = outcome(model, cells)
    plain, wanted = plain_encoder(model, cells)
    torch.testing.assert_close(summary, plain, atol=1e-5, rtol=0)
    for i, own in enumerate(wanted):
        first, last = int(cells.offsets[i]), int(cells.offsets[i + 1])
        torch.testing.assert_close(states[first : first + len(own)], own, atol=1e-5, rtol=0)
        assert (states[first + len(own) : last] == 0).all()
    gradients = {name: g.clone() for name, g in gradients.items()}
    model.zero_grad()
    loss(plain, torch.cat(wanted)).backward()
    assert len(gradients) > 20
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, atol=1e-4, rtol=0)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 99))
def test_attention_is_each_cells_own_packed_or_padded(lengths, seed):
    q, k, v = torch.randn(3, sum(lengths), 2, 8, generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    packed = attention(q, k, v, Packed(ends, 128, False))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    q, k, v = (torch.full((*real.shape, 2, 8), 1e3).index_put((real,), part) for part in (q, k, v))
    heads = [part.transpose(1, 2) for part in (q, k, v)]
    wanted = plain_attention(heads[0], heads[1], heads[2], real).transpose(1, 2)[real]
    torch.testing.assert_close(packed, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(attention(q, k, v, real)[real], wanted, atol=1e-5, rtol=0)


def test_the_kernel_for_gpus_takes_what_it_is_given_forward_and_backward():
    """On tensors without numbers, as there is no such kernel here: its arguments, shapes and types."""
    with FakeTensorMode():
        qkv = torch.empty(50, 3, 4, 16, dtype=torch.bfloat16, requires_grad=True)
        offsets = torch.empty(4, dtype=torch.int32)
        mixed = attention(qkv[:, 0], qkv[:, 1], qkv[:, 2], Packed(offsets, 128, True))
        assert (mixed.shape, mixed.dtype) == ((50, 4, 16), torch.bfloat16)
        assert "varlen" in type(mixed.grad_fn).__name__
        mixed.sum().backward()
        assert qkv.grad is not None
        assert qkv.grad.shape == qkv.shape


def test_a_cell_has_the_same_bits_in_any_batch():
    model = encoder(together=300)
    lengths = [*LENGTHS, *range(9, 60, 3)]
    whole = tokens(lengths)
    with torch.inference_mode():
        together = model(whole, HIDDEN)
        batches = [[i] for i in range(len(lengths))]
        for batch in [*batches, [5, 2], [8, 0, 4], list(range(len(lengths)))[::-1]]:
            some = model(some_cells(whole, torch.tensor(batch)), HIDDEN)
            assert torch.equal(some.summary, together.summary[batch])
            theirs = [together.states[whole.offsets[i] : whole.offsets[i + 1]] for i in batch]
            assert torch.equal(some.states, torch.cat(theirs))


@pytest.mark.parametrize("halved", [False, True])
def test_making_activations_anew_changes_no_bit(halved):
    cells, found = tokens(LENGTHS), []
    for recompute in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=halved):
            found.append(outcome(encoder(together=100, recompute=recompute), cells))
    (summary, states, gradients), (summary2, states2, gradients2) = found
    assert torch.equal(summary, summary2)
    assert torch.equal(states, states2)
    assert gradients.keys() == gradients2.keys()
    assert len(gradients) > 20
    assert all(torch.equal(gradients[name], gradients2[name]) for name in gradients)


def test_a_run_computes_as_its_recipe_says_and_comes_to_the_same_bits(tmp_path):
    plain, frugal = stores.run(tmp_path), stores.run(tmp_path, recompute=True, compile="off")
    teachers = plain.teacher(), frugal.teacher()
    assert teachers[1].encoder("rna").compute == Compute(recompute=True, compile="off")
    assert plain.key("joint", "") == frugal.key("joint", "")
    batch = Share(0, 48, 0, plain.store.read(np.arange(48)))
    losses = []
    for run, teacher in zip((plain, frugal), teachers, strict=True):
        stage = Joint(run.recipe.joint, teacher, run.tokenizer, seed=0, device="cpu")
        parameters, optimizer = adamw(stage.trained(), Optim(lr=1e-3))
        losses.append([step(stage, batch, parameters, optimizer, 1.0) for _ in range(2)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]
    after = [teacher.state_dict() for teacher in teachers]
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


def kept(model, cells):
    """Bytes that the graph of a loss keeps for its gradient."""
    held: dict[int, torch.Tensor] = {}  # all stay alive, so that no address comes twice

    def note(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = model(cells, HIDDEN)
        loss(found.summary, found.states)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def test_memory_of_a_step_grows_by_what_goes_in_and_out_of_the_layers():
    few, many = tokens([50] * 20), tokens([50] * 160)
    plain, frugal = encoder(layers=4, together=1000), encoder(layers=4, together=1000, recompute=True)
    grows, still = (kept(model, many) - kept(model, few) for model in (plain, frugal))
    assert still < 0.12 * grows


def test_cells_are_grouped_by_length_within_the_limit():
    lengths = torch.randint(0, 300, (500,), generator=torch.Generator().manual_seed(0))
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    for together in (1, 1000, 1 << 20):
        found = groups(offsets, together)
        assert torch.equal(torch.cat(found).sort().values, torch.arange(500))
        assert torch.equal(lengths[torch.cat(found)], lengths.sort().values)
        sizes = [int((lengths[cells] + 1).sum()) for cells in found]
        assert all(size <= together or len(cells) == 1 for size, cells in zip(sizes, found, strict=True))
        assert all(a + b > together for a, b in itertools.pairwise(sizes))


def test_a_batch_without_cells_is_encoded():
    found = encoder()(tokens([]), HIDDEN)
    assert (found.summary.shape, found.states.shape) == ((0, WIDTH), (0, WIDTH))
    found.summary.sum().backward()


def test_nothing_of_a_gpu_is_taken_on_a_cpu():
    cpu = torch.device("cpu")
    assert not flash(cpu, torch.bfloat16, 64)
    assert [compiles(Compute(compile=how), cpu) for how in ("auto", "on", "off")] == [False, True, False]


@pytest.mark.slow  # compiling takes half a minute
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_compiled_layers_are_the_eager_ones_for_all_lengths_at_once():
    eager, compiled = encoder(together=100), encoder(together=100, compile="on")
    recomputed = encoder(together=100, compile="on", recompute=True)
    graphs = torch._dynamo.utils.counters["stats"]
    after = []
    for seed, lengths in enumerate([LENGTHS, LENGTHS[3:], [9] * 30, [50, 2, 7], [33]]):
        cells = tokens(lengths, seed)
        wanted = outcome(eager, cells)
        for model in (compiled, recomputed):
            found = outcome(model, cells)
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        after.append(graphs["unique_graphs"])
    assert 0 < after[1] == after[-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_layers_are_compiled_though_the_first_step_was_watched():
    model, cells = encoder(compile="on"), tokens(LENGTHS)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    gauges = Gauges(model, Meter(), device="cpu", halved=False, first_worker=True)
    with gauges, gauges.counted(len(cells.ids)):
        outcome(model, cells)
    before = graphs["unique_graphs"]
    outcome(model, cells)
    assert graphs["unique_graphs"] > before
