import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import f1_score, roc_auc_score

from cellray.tasks import metrics


def weights(cells, rows=4, seed=0):
    drawn = np.random.default_rng(seed).multinomial(cells, np.full(cells, 1 / cells), rows)
    return np.vstack([np.ones(cells), drawn]).astype(np.float32)


def repeated(row):
    """Cells as often as a row of weights says."""
    return np.repeat(np.arange(len(row)), row.astype(int))


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_of_every_feature_is_that_of_scikit_learn(ties):
    rng = np.random.default_rng(1)
    positive = rng.random((200, 300)) < 0.2
    scores = (rng.normal(size=positive.shape) + positive).astype(np.float32)
    if ties:
        scores = np.round(scores)
    scores[:, 0] = 1
    together = np.zeros(200, int)
    right, made = metrics.wins(scores, positive, together), metrics.trials(positive, together)
    ours = (right * positive).sum(axis=0) / (made * positive).sum(axis=0)
    theirs = [roc_auc_score(positive[:, i], scores[:, i]) for i in range(300)]
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert metrics.auroc(right, made, positive, np.ones((1, 200), np.float32))[0] == pytest.approx(
        np.mean(theirs), abs=1e-6
    )


def test_each_cell_gets_right_what_the_pairs_say():
    rng = np.random.default_rng(2)
    positive, scores = rng.random((30, 4)) < 0.4, rng.integers(0, 5, (30, 4)).astype(np.float32)
    right = metrics.wins(scores, positive, np.zeros(30, int))
    for cell in range(30):
        for feature in range(4):
            others = positive[:, feature] != positive[cell, feature]
            gap = scores[cell, feature] - scores[others, feature]
            gap = gap if positive[cell, feature] else -gap
            assert right[cell, feature] == (gap > 0).sum() + (gap == 0).sum() / 2


def test_bins_compare_cells_of_like_depth_only():
    rng = np.random.default_rng(3)
    depth = rng.integers(1, 1000, 2000)
    positive = rng.random((2000, 5)) < (depth / 1000)[:, None]
    scores = np.tile(depth[:, None], (1, 5)).astype(np.float32)
    bins = metrics.depth_bins(depth)
    assert set(np.bincount(bins)) <= set(range(180, 221))
    plain, adjusted = (
        metrics.auroc(
            metrics.wins(scores, positive, b), metrics.trials(positive, b), positive, weights(2000, 0)
        )[0]
        for b in (np.zeros(2000, int), bins)
    )
    assert plain > 0.8
    assert adjusted < 0.58


def test_resampled_auroc_follows_the_exact_bootstrap():
    rng = np.random.default_rng(4)
    positive = rng.random((300, 40)) < 0.3
    scores = (rng.normal(size=positive.shape) + 0.7 * positive).astype(np.float32)
    drawn, together = weights(300, 200), np.zeros(300, int)
    fast = metrics.auroc(
        metrics.wins(scores, positive, together), metrics.trials(positive, together), positive, drawn
    )[1:]
    exact = []
    for row in drawn[1:]:
        cells = repeated(row)
        right = metrics.wins(scores[cells], positive[cells], together)
        made = metrics.trials(positive[cells], together)
        exact.append(metrics.auroc(right, made, positive[cells], np.ones((1, 300), np.float32))[0])
    assert np.corrcoef(fast, exact)[0, 1] > 0.98
    assert np.std(fast) == pytest.approx(np.std(exact), rel=0.1)


def test_auroc_of_a_cell_is_over_its_features():
    rng = np.random.default_rng(5)
    positive, scores = rng.random((20, 90)) < 0.3, rng.normal(size=(20, 90)).astype(np.float32)
    positive[3] = False
    found = metrics.auroc_of_cells(scores, positive)
    assert np.isnan(found[3])
    keep = np.arange(20) != 3
    theirs = [roc_auc_score(positive[i], scores[i]) for i in np.flatnonzero(keep)]
    np.testing.assert_allclose(found[keep], theirs, atol=1e-6)


def test_f1_and_accuracy_are_those_of_scikit_learn_in_every_resample():
    rng = np.random.default_rng(6)
    truth, guess = rng.integers(0, 5, 400), rng.integers(0, 6, 400)
    guess[:250] = truth[:250]
    drawn = weights(400)
    f1, right = metrics.macro_f1(truth, guess, drawn), metrics.accuracy(truth, guess, drawn)
    for i, row in enumerate(drawn):
        cells = repeated(row)
        labels = np.unique(truth[cells])
        theirs = f1_score(truth[cells], guess[cells], labels=labels, average="macro")
        assert f1[i] == pytest.approx(theirs, abs=1e-6)
        assert right[i] == pytest.approx((truth[cells] == guess[cells]).mean(), abs=1e-6)


def test_calibration_error_is_zero_for_honest_chances():
    truth = np.array([0, 0, 0, 1])
    honest = np.tile([0.75, 0.25], (4, 1))
    sure = np.tile([1.0, 0.0], (4, 1))
    one = np.ones((1, 4), np.float32)
    assert metrics.calibration_error(truth, honest, one)[0] == pytest.approx(0)
    assert metrics.calibration_error(truth, sure, one)[0] == pytest.approx(0.25)


def test_pearson_is_that_of_scipy_in_every_resample():
    rng = np.random.default_rng(7)
    truth = rng.normal(size=(150, 3)) + 50
    guess = truth + rng.normal(size=truth.shape)
    drawn = weights(150)
    found = metrics.pearson(guess, truth, drawn)
    for i, row in enumerate(drawn):
        cells = repeated(row)
        theirs = [pearsonr(guess[cells, j], truth[cells, j])[0] for j in range(3)]
        assert found[i] == pytest.approx(np.mean(theirs), abs=1e-6)


def test_pearson_within_groups_ignores_what_the_group_tells():
    rng = np.random.default_rng(8)
    group = rng.integers(0, 3, 3000)
    truth = 10 * group[:, None] + rng.normal(size=(3000, 2))
    told, one = 10.0 * np.tile(group[:, None], (1, 2)), np.ones((1, 3000), np.float32)
    assert metrics.pearson(told + 0.01 * rng.normal(size=truth.shape), truth, one)[0] > 0.98
    assert metrics.pearson(told, truth, one, group)[0] == 0
    own = truth + rng.normal(size=truth.shape)
    assert metrics.pearson(own, truth, one, group)[0] == pytest.approx(0.5**0.5, abs=0.03)


def test_pearson_leaves_out_constant_features_and_counts_a_constant_guess_as_zero():
    rng = np.random.default_rng(9)
    truth = np.column_stack([rng.normal(size=80), np.zeros(80)])
    one = np.ones((1, 80), np.float32)
    assert metrics.pearson(truth, truth, one)[0] == pytest.approx(1)
    assert metrics.pearson(np.zeros_like(truth), truth, one)[0] == 0
    assert np.isnan(metrics.pearson(truth, np.zeros_like(truth), one)[0])


def test_r2_of_the_mean_is_zero():
    truth = np.random.default_rng(10).normal(3, 2, 60)
    one = np.ones((1, 60), np.float32)
    assert metrics.r2(np.full(60, truth.mean()), truth, one)[0] == pytest.approx(0, abs=1e-6)
    assert metrics.r2(truth, truth, one)[0] == pytest.approx(1)


def test_a_collapsed_embedding_scores_chance_by_foscttm_and_has_no_spread():
    truth = np.random.default_rng(11).normal(size=(600, 5))
    flat = np.ones((600, 5))
    assert metrics.foscttm(truth, truth).max() == 0
    assert metrics.foscttm(flat, flat).mean() == pytest.approx(0.5)
    assert metrics.foscttm(flat, truth).mean() == pytest.approx(0.5, abs=0.01)
    assert metrics.spread(flat) == 0
    assert metrics.spread(truth) > 0.9


def test_foscttm_counts_cells_nearer_than_the_match_in_both_directions():
    rng = np.random.default_rng(12)
    left, right = rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
    gaps = np.linalg.norm(left[:, None] - right[None], axis=2)
    own = np.diag(gaps)
    forth, back = (gaps < own[:, None]).sum(axis=1), (gaps < own[None]).sum(axis=0)
    np.testing.assert_allclose(metrics.foscttm(left, right), (forth + back) / 2 / 39)


def test_neighbours_of_a_rotated_embedding_are_the_same():
    rng = np.random.default_rng(13)
    vectors = rng.normal(size=(100, 4))
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    assert metrics.neighbour_overlap(vectors, vectors @ turn).min() == 1
    assert metrics.neighbour_overlap(vectors, rng.normal(size=(100, 4))).mean() < 0.3


def test_centred_log_ratios_do_not_see_depth():
    log = np.random.default_rng(14).normal(size=(5, 7))
    shifted = metrics.centred_log_ratio(log + np.arange(5)[:, None])
    np.testing.assert_allclose(shifted, metrics.centred_log_ratio(log), atol=1e-12)
