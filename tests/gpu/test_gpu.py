"""What only a GPU can show: its attention kernel, its memory, compiled layers, one run of every stage."""

import itertools
import math

import pytest
import torch

from cellray.model.attention import Compute, Packed, attention, flash
from cellray.model.encoder import Encoder, Tokens
from cellray.train.chain import chain
from tests import stores, test_rowwise
from tests.attentive import attentive

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]

LENGTHS = [3, 300, 0, 17, 90, 1, 512, 129, 128, 33, 700]
WIDTH = 64


@pytest.fixture
def half():
    """The device, where FlashAttention runs in bf16."""
    device = torch.device("cuda")
    if not flash(device, torch.bfloat16, 16):
        pytest.skip(f"{torch.cuda.get_device_name()} has no FlashAttention in bf16")
    return device


def tokens(lengths, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    n = int(offsets[-1])
    ids, values = torch.randint(500, (n,), generator=g), torch.rand(n, generator=g) * 3
    hidden, depth = torch.rand(n, generator=g) < 0.2, torch.rand(len(lengths), generator=g) + 5
    return Tokens(*(part.to(device) for part in (ids, values, hidden, offsets, depth)))


def encoder(device, layers=2, **compute):
    torch.manual_seed(0)
    model = attentive(Encoder(500, WIDTH, layers, heads=4, context=512))
    model.compute = Compute(**compute)
    return model.to(device)


def outcome(model, cells, *, halved):
    """Summaries, states and gradients of a loss, in fp32 on the CPU."""
    model.zero_grad()
    device = cells.ids.device.type
    with torch.autocast(device, torch.bfloat16, enabled=halved):
        found = model(cells, torch.full((WIDTH,), 0.1, device=device))
    summary, states = found.summary.float(), found.states.float()
    (summary.square().mean() + (states * torch.linspace(-1, 1, WIDTH, device=device)).mean()).backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return summary.detach().cpu(), states.detach().cpu(), gradients


def apart(found, wanted):
    """Distance of two tensors as a share of the length of the one that is wanted."""
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


@pytest.mark.parametrize("width", [16, 64, 128])
def test_flash_attention_of_packed_cells_is_attention_written_out(half, width):
    sizes = [n + 1 for n in LENGTHS]
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=half)
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(sizes), 3, 4, width, generator=g).to(half, torch.bfloat16).requires_grad_()
    mixed = attention(qkv[:, 0], qkv[:, 1], qkv[:, 2], Packed(offsets, 768, True))
    whole = qkv.detach().float().requires_grad_()
    cells = []
    for cell in whole.split(sizes):
        q, k, v = (part.transpose(0, 1) for part in cell.unbind(1))
        cells.append(((q @ k.mT / math.sqrt(width)).softmax(-1) @ v).transpose(0, 1))
    wanted = torch.cat(cells)
    torch.testing.assert_close(mixed.float(), wanted, atol=2e-2, rtol=2e-2)
    weights = torch.randn(wanted.shape, generator=g).to(half)
    (mixed.float() * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert qkv.grad is not None
    assert whole.grad is not None
    assert apart(qkv.grad.float(), whole.grad) < 2e-2


def test_an_encoder_on_a_gpu_says_what_it_says_on_a_cpu():
    wanted = outcome(encoder("cpu"), tokens(LENGTHS, "cpu"), halved=False)
    found = outcome(encoder("cuda", compile="off"), tokens(LENGTHS, "cuda"), halved=False)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def test_an_encoder_in_bf16_is_near_itself_in_fp32(half):
    wanted = outcome(encoder("cpu"), tokens(LENGTHS, "cpu"), halved=False)
    found = outcome(encoder(half, compile="off"), tokens(LENGTHS, half), halved=True)
    assert apart(found[0], wanted[0]) < 3e-2
    assert apart(found[1], wanted[1]) < 3e-2
    assert found[2].keys() == wanted[2].keys()
    for name, gradient in found[2].items():
        assert apart(gradient, wanted[2][name]) < 0.1, name


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_compiled_layers_are_the_eager_ones_for_all_lengths_at_once(half):
    eager, compiled = encoder(half, compile="off"), encoder(half, compile="on")
    graphs = torch._dynamo.utils.counters["stats"]
    after = []
    for seed, lengths in enumerate([LENGTHS, LENGTHS[3:], [9] * 30, [50, 2, 7], [300] * 9]):
        cells = tokens(lengths, half, seed)
        wanted, found = (outcome(model, cells, halved=True) for model in (eager, compiled))
        assert apart(found[0], wanted[0]) < 3e-2
        assert apart(found[1], wanted[1]) < 3e-2
        assert all(apart(found[2][name], wanted[2][name]) < 0.1 for name in wanted[2])
        after.append(graphs["unique_graphs"])
    assert 0 < after[1] == after[-1]


def test_a_batch_of_any_size_needs_the_memory_of_one_call(half):
    def peak(cells, recompute):
        model, batch = (
            encoder(half, layers=8, together=4096, recompute=recompute),
            tokens([255] * cells, half),
        )
        outcome(model, batch, halved=True)  # what is made once
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outcome(model, batch, halved=True)
        return torch.cuda.max_memory_allocated() - before

    grows = [peak(512, recompute) - peak(64, recompute) for recompute in (False, True)]
    assert grows[1] < 0.25 * grows[0]


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_every_stage_trains_on_a_gpu(tmp_path, precision):
    short = {"unimodal.epochs": 0.5, "joint.epochs": 0.5, "distil.epochs": 0.5, "track": ""}
    curves = {}
    for device in ("cpu", "cuda"):
        run = stores.run(tmp_path / device, precision=precision, compile="off", **short)
        events: list = []
        chain(run, events.append, device)
        done = {event["stage"]: event["finished"] for event in events if "finished" in event}
        assert list(done) == run.chain()
        curves[device] = {name: facts["curve"] for name, facts in done.items()}
    for name, curve in curves["cuda"].items():
        wanted = [row["loss"] for row in curves["cpu"][name]]
        tolerance = 2e-2 if precision == "fp32" else 0.1  # rounding, after some updates
        assert [row["loss"] for row in curve] == pytest.approx(wanted, rel=tolerance)


def test_tables_are_updated_by_rows_as_on_a_cpu():
    found = []
    for device in ("cpu", "cuda"):
        model = test_rowwise.Model().to(device)
        own = test_rowwise.optimizer(model, rowwise=True)
        test_rowwise.take(model, own, range(100))
        own.settle()
        found.append(model.cpu())
    test_rowwise.close(*found)
