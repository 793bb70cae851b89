import numpy as np
import pytest
import torch
from scipy import stats

from cellray.data.modalities import BUILT_IN
from cellray.model.decoder import Decoder
from cellray.model.encoder import Encoder, Tokens, first_tokens
from cellray.model.student import SparseMLP
from cellray.model.teacher import Fusion, Teacher, some_cells
from tests import stores
from tests.attentive import attentive


def tokens(lengths, features=50, seed=0, hidden=0.2):
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    n = int(offsets[-1])
    return Tokens(
        torch.randint(features, (n,), generator=g),
        torch.rand(n, generator=g) * 3,
        torch.rand(n, generator=g) < hidden,
        offsets,
        torch.rand(len(lengths), generator=g) + 5,
    )


def encoder(context=40, seed=0):
    torch.manual_seed(seed)
    return attentive(Encoder(50, 32, layers=2, heads=2, context=context))


HIDDEN = torch.full((32,), 0.1)
LENGTHS = [3, 40, 0, 17, 90, 1, 41, 12, 33, 7]


def test_gradients_do_not_depend_on_the_batch():
    model, whole = encoder(), tokens(LENGTHS)
    model(whole, HIDDEN).summary.square().sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i in range(len(LENGTHS)):
        model(some_cells(whole, torch.tensor([i])), HIDDEN).summary.square().sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, together[name], atol=1e-4, rtol=1e-4)


def test_hidden_values_do_not_leak():
    model, whole = encoder(), tokens(LENGTHS)
    other = Tokens(
        whole.ids, torch.where(whole.hidden, 1e6, whole.values), whole.hidden, whole.offsets, whole.depth
    )
    with torch.inference_mode():
        assert torch.equal(model(whole, HIDDEN).summary, model(other, HIDDEN).summary)
        assert torch.equal(model(whole, HIDDEN).states, model(other, HIDDEN).states)


def test_the_first_tokens_of_every_cell_are_found():
    lengths = torch.randint(1, 300, (500,), generator=torch.Generator().manual_seed(0))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    within, left = first_tokens(offsets, 256)
    used = lengths.clamp(max=256)
    assert torch.equal(left[1:] - left[:-1], used)
    assert torch.equal(within[left[:-1]], offsets[:-1])
    assert torch.equal(within[left[1:] - 1], offsets[:-1] + used - 1)


@pytest.mark.parametrize("pattern", range(1, 8))
def test_what_stands_at_an_absent_place_changes_nothing(pattern):
    torch.manual_seed(0)
    fusion = attentive(Fusion(3, 32, 2, 2))
    present = torch.tensor([[bool(pattern & 1), bool(pattern & 2), bool(pattern & 4)]] * 4)
    summaries = torch.randn(4, 3, 32)
    strange = torch.where(present[..., None], summaries, torch.tensor(float("nan")))
    with torch.inference_mode():
        a, b = fusion(summaries, present), fusion(strange, present)
    assert torch.isfinite(a).all()
    assert torch.equal(a, b)


def test_only_present_modalities_are_encoded():
    torch.manual_seed(0)
    modalities = {m.name: (m, 50) for m in BUILT_IN}
    teacher = attentive(Teacher(modalities, width=32, layers=1, heads=2, fusion_layers=1))
    whole = {m.name: tokens([5, 6, 7], seed=i) for i, m in enumerate(BUILT_IN)}
    present = torch.tensor([[True, False, True], [True, True, False], [False, True, False]])
    with torch.inference_mode():
        joint, summaries = teacher(whole, present)
        assert (summaries[~present] == 0).all()
        changed = {**whole, "atac": tokens([5, 6, 7], seed=9)}
        other, _ = teacher(changed, present)
    assert torch.equal(joint[0], other[0])
    assert not torch.equal(joint[1], other[1])


def decoder(seed=0, likelihood="negative_binomial"):
    torch.manual_seed(seed)
    found = Decoder(30, 16, likelihood)
    with torch.no_grad():
        found.bias.normal_()
        if likelihood == "negative_binomial":
            found.dispersion.normal_()
        found.feature.weight.normal_()
    return found


def test_asking_for_some_features_equals_asking_for_all():
    model, cell, ids = decoder(), torch.randn(5, 16), torch.tensor([3, 29, 0, 7])
    depth = torch.rand(5)
    with torch.inference_mode():
        torch.testing.assert_close(model(cell, ids, depth), model(cell, None, depth)[:, ids])


def test_the_negative_binomial_is_scipys():
    model, cell = decoder(), torch.randn(5, 16)
    counts = torch.poisson(torch.full((5, 30), 3.0), generator=torch.Generator().manual_seed(0))
    depth = torch.full((5,), 1.0)
    with torch.inference_mode():
        fit = model.negative_log_likelihood(cell, counts, depth)
        error = (model.log_depth(cell) - depth).square().sum()
        mean = model(cell, None, depth).double().exp().numpy()
        shape = (torch.nn.functional.softplus(model.dispersion) + 1e-4).double().numpy()
    wanted = -stats.nbinom.logpmf(counts.numpy(), shape, shape / (shape + mean)).sum()
    assert float(fit - error) == pytest.approx(wanted, rel=1e-5)


def test_gradients_of_the_negative_binomial_are_those_of_every_term_everywhere():
    model, cell, ids = decoder(), torch.randn(5, 16), torch.tensor([3, 29, 0, 7])
    counts = torch.poisson(torch.full((5, 4), 0.7), generator=torch.Generator().manual_seed(0))
    depth = torch.full((5,), 1.0)
    assert 0 < int((counts > 0).sum()) < counts.numel()
    found = model.negative_log_likelihood(cell, counts, depth, ids)
    rate = model(cell, ids, depth).exp()
    shape = torch.nn.functional.softplus(model.dispersion[ids]) + 1e-4
    plain = torch.distributions.NegativeBinomial(shape.expand(5, 4), logits=(rate / shape).log())
    wanted = -plain.log_prob(counts).sum() + (model.log_depth(cell) - depth).square().sum()
    torch.testing.assert_close(found, wanted)
    trained = list(model.parameters())
    for own, other in zip(
        torch.autograd.grad(found, trained), torch.autograd.grad(wanted, trained), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("likelihood", ["bernoulli", "negative_binomial"])
@pytest.mark.parametrize("ids", [None, torch.tensor([3, 29, 0, 7])], ids=["every", "asked"])
def test_a_prior_weighs_squared_departures_from_the_mean_profile(likelihood, ids):
    model, cell, depth = decoder(likelihood=likelihood), torch.randn(5, 16), torch.rand(5)
    counts = torch.ones(5, 30 if ids is None else 4)
    plain = model.negative_log_likelihood(cell, counts, depth, ids)
    found = model.negative_log_likelihood(cell, counts, depth, ids, prior=0.3)
    feature = model.feature.weight if ids is None else model.feature.weight[ids]
    departures = model.direction(cell) @ feature.T
    torch.testing.assert_close(found - plain, 0.3 * departures.square().sum())
    mean = [model.bias, model.slope]
    for own, other in zip(
        torch.autograd.grad(found, mean, retain_graph=True), torch.autograd.grad(plain, mean), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_decoders_begin_at_the_mean_profile(tmp_path):
    vocabularies = stores.run(tmp_path).store.tokenizer.vocabularies
    for name, vocabulary in vocabularies.items():
        model = Decoder(len(vocabulary), 16, vocabulary.modality.likelihood)
        model.start(vocabulary)
        with torch.inference_mode():
            said = model(torch.zeros(1, 16), None, model.reference[None])[0].double().numpy()
        cells = vocabulary.cells[""]
        if vocabulary.modality.likelihood == "bernoulli":
            np.testing.assert_allclose(1 / (1 + np.exp(-said)), vocabulary.nonzero[""] / cells, atol=1e-4)
        else:
            np.testing.assert_allclose(np.exp(said), vocabulary.sums[""] / cells, rtol=1e-4, atol=1e-4), name


def test_an_inherited_decoder_says_the_same_of_rescaled_vectors():
    old, new = decoder(), decoder(1)
    mean, spread = np.random.default_rng(0).normal(size=16).astype(np.float32), 2.5
    new.inherit(old, mean, spread)
    cell = torch.randn(6, 16)
    with torch.inference_mode():
        torch.testing.assert_close(
            new((cell - torch.from_numpy(mean)) / spread), old(cell), atol=1e-4, rtol=1e-4
        )


def test_the_sparse_student_equals_a_dense_one():
    torch.manual_seed(0)
    student = SparseMLP({"rna": (BUILT_IN[0], 50), "atac": (BUILT_IN[1], 20)}, width=16, hidden=32, blocks=2)
    whole = tokens([4, 0, 9, 30], hidden=0.0)
    dense = torch.zeros(4, 50).index_put(
        (torch.repeat_interleave(torch.arange(4), torch.tensor([4, 0, 9, 30])), whole.ids),
        whole.values,
        accumulate=True,
    )
    with torch.inference_mode():
        said = student(whole.ids, whole.values, whole.offsets[:-1], whole.depth)
        x = dense @ student.bag.weight + student.depth(whole.depth[:, None])
        wanted = student.joint(student.blocks(student.lift(x)))
    torch.testing.assert_close(said.embedding, wanted, atol=1e-4, rtol=1e-4)
    assert set(said.summaries) == {"atac"}
