import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from cellray.tasks import baselines, networks


def groups(cells=400, width=12, seed=0):
    """Vectors of three groups, and the codes of the groups."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3, cells)
    centres = np.random.default_rng(9).normal(size=(3, width)) * 2
    return (centres[codes] + rng.normal(size=(cells, width))).astype(np.float32), codes


def test_every_classifier_tells_groups_apart_and_gives_chances():
    train, codes = groups()
    test, truth = groups(seed=1)
    for probe in (baselines.linear_probe, baselines.gene_regression, baselines.neighbour_votes):
        chance = probe(train, codes, test, 4)
        np.testing.assert_allclose(chance.sum(axis=1), 1, rtol=1e-5)
        assert (chance[:, 3] == 0).all()
        assert (chance.argmax(axis=1) == truth).mean() > 0.95


def test_a_probe_of_one_label_or_of_a_constant_embedding_does_not_fail():
    train, codes = groups()
    one = baselines.linear_probe(train, np.full(len(codes), 2), train, 3)
    assert (one.argmax(axis=1) == 2).all()
    flat = baselines.linear_probe(np.zeros((400, 1)), codes, np.zeros((5, 1)), 3)
    np.testing.assert_allclose(flat, baselines.majority(codes, 5, 3), atol=0.01)


def test_ridge_finds_a_line_and_ignores_noise():
    rng = np.random.default_rng(2)
    known, asked = rng.normal(size=(300, 5)), rng.normal(size=(50, 5))
    slope = rng.normal(size=(5, 70))
    found = baselines.ridge(known, known @ slope + 4 + 0.1 * rng.normal(size=(300, 70)), asked)
    np.testing.assert_allclose(found, asked @ slope + 4, atol=0.15)
    noise = baselines.ridge(known, rng.normal(size=(300, 1)), asked)
    assert noise.std() < 0.2


@pytest.mark.parametrize("size", [360, 400], ids=["some", "all"])
def test_an_mlp_learns_labels_detections_and_values(size):
    train, codes = groups()
    test, truth = groups(seed=1)
    draw = np.sort(np.random.default_rng(0).choice(400, size, replace=False))
    logits = networks.mlp(train, codes, draw, test, outputs=3, loss="label", seed=0)
    assert (logits.argmax(axis=1) == truth).mean() > 0.95
    seen = (codes[:, None] == np.arange(3)).astype(np.float32)
    logits = networks.mlp(train, seen, draw, test, outputs=3, loss="detection", seed=0)
    assert roc_auc_score(truth == 1, logits[:, 1]) > 0.95
    values = networks.mlp(train, train[:, :2] * 2, draw, test, outputs=2, loss="value", seed=0)
    assert np.corrcoef(values[:, 0], test[:, 0])[0, 1] > 0.8


def test_an_mlp_is_the_same_for_a_seed_and_leaves_the_global_stream_alone():
    train, codes = groups()
    draw = np.arange(360)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two, other = (
        networks.mlp(train, codes, draw, train[:9], outputs=3, loss="label", seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_autoencoder_embeds_held_out_cells_by_group():
    rng = np.random.default_rng(3)
    rates = np.exp(rng.normal(size=(3, 50)))
    codes = rng.integers(0, 3, 500)
    counts = rng.poisson(rates[codes]).astype(np.float32)
    log = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4).astype(np.float32)
    train, test = networks.autoencoder((log[:400], counts[:400]), (log[:400], log[400:]), seed=0)
    assert train.shape == (400, networks.WIDTH)
    chance = baselines.neighbour_votes(train, codes[:400], test, 3)
    assert (chance.argmax(axis=1) == codes[400:]).mean() > 0.95


def test_the_autoencoder_loss_is_a_negative_binomial_likelihood():
    torch.manual_seed(0)
    model = networks.Autoencoder(6)
    counts = torch.poisson(torch.full((4, 6), 1.5))
    log = torch.log1p(counts)
    torch.manual_seed(1)
    ours = model.loss(log, counts)
    torch.manual_seed(1)
    shown = log * (torch.rand_like(log) >= networks.MASKED) / (1 - networks.MASKED)
    rate = torch.softmax(model.decoder(model.encoder(shown)), dim=1) * counts.sum(dim=1, keepdim=True)
    r = model.dispersion.exp()
    likely = torch.distributions.NegativeBinomial(r, logits=rate.log() - r.log()).log_prob(counts)
    constant = torch.lgamma(counts + 1)
    assert ours.item() == pytest.approx(-(likely + constant).mean().item(), rel=1e-4)


def test_a_ridge_on_one_output_keeps_its_column():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(40, 5)), rng.normal(size=(7, 5))
    assert baselines.ridge(train, train[:, :1], test).shape == (7, 1)
