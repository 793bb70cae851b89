"""Metrics of held-out cells, each with its bootstrap resamples.

Every metric takes `weights` [1 + resamples, cells], how often each cell counts, and gives one
value a row. The first row is all ones, so the first value is the metric itself, and values of
two models under the same weights are paired.
"""

import numpy as np
from sklearn.neighbors import NearestNeighbors

BINS = 10
"""Bins of confidence, and of depth."""
CHUNK = 256
"""Features ranked at a time, so that they stay in the processor's cache."""


def accuracy(truth: np.ndarray, guess: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of cells whose label code is guessed."""
    return mean((truth == guess).astype(np.float32), weights)


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over cells of `values` [cells]."""
    return np.asarray(weights @ values / weights.sum(axis=1))


def macro_f1(truth: np.ndarray, guess: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 averaged over the labels that occur among the held-out cells of a resample."""
    classes = np.unique(truth)
    true, guessed = truth[:, None] == classes, guess[:, None] == classes
    hits = weights @ (true & guessed).astype(np.float32)
    actual, called = weights @ true.astype(np.float32), weights @ guessed.astype(np.float32)
    f1 = np.where(actual > 0, 2 * hits / np.maximum(actual + called, 1e-9), np.nan)
    return np.asarray(np.nanmean(f1, axis=1))


def calibration_error(truth: np.ndarray, chance: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error over BINS equal bins of confidence. `chance` is [cells, labels]."""
    confidence = chance.max(axis=1)
    right = (chance.argmax(axis=1) == truth).astype(np.float32)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    inside = (bins[:, None] == np.arange(BINS)).astype(np.float32)
    gap = weights @ (inside * (confidence - right)[:, None])
    return np.asarray(np.abs(gap).sum(axis=1) / weights.sum(axis=1))


def r2(guess: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the variance of `truth` [cells] that `guess` explains; below 0 if worse than the mean."""
    error = weights @ (truth - guess) ** 2
    truth = truth - truth.mean()
    total = weights.sum(axis=1)
    return np.asarray(1 - error / (weights @ truth**2 - (weights @ truth) ** 2 / total))


def pearson(
    guess: np.ndarray, truth: np.ndarray, weights: np.ndarray, groups: np.ndarray | None = None
) -> np.ndarray:
    """Correlation over cells, averaged over the columns of `truth` [cells, features].

    With `groups` [cells] the correlation is within groups: of deviations from the mean of the
    group, all groups together; cells of group -1 are left out. Columns without variance in
    `truth` are left out; a guess without variance correlates 0.
    """
    codes = np.zeros(len(truth), np.int64) if groups is None else groups
    guess, truth = np.asarray(guess, np.float64), np.asarray(truth, np.float64)
    shape = (len(weights), truth.shape[1])
    cross, left, right = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for code in np.unique(codes[codes >= 0]):
        inside = codes == code
        w = weights[:, inside].astype(np.float64)
        x, y = guess[inside] - guess[inside].mean(axis=0), truth[inside] - truth[inside].mean(axis=0)
        total = np.maximum(w.sum(axis=1, keepdims=True), 1e-9)
        mean_x, mean_y = w @ x / total, w @ y / total
        cross += w @ (x * y) - total * mean_x * mean_y
        left += w @ (x * x) - total * mean_x**2
        right += w @ (y * y) - total * mean_y**2
    varies = right[0] > 1e-9
    if not varies.any():
        return np.full(len(weights), np.nan)
    scale = np.sqrt(np.maximum(left, 0) * np.maximum(right, 0))[:, varies]
    moves = scale > 1e-9 * right[0, varies]
    return np.asarray(np.where(moves, cross[:, varies] / np.where(moves, scale, 1), 0).mean(axis=1))


def centred_log_ratio(log: np.ndarray) -> np.ndarray:
    """log1p counts [cells, proteins] less their mean over the proteins of each cell."""
    return np.asarray(log - log.mean(axis=1, keepdims=True))


def depth_bins(depth: np.ndarray) -> np.ndarray:
    """BINS bins of about equally many cells by rising depth, int64 [cells]; equal depths share a bin."""
    edges = np.quantile(depth, np.arange(1, BINS) / BINS)
    return np.searchsorted(edges, depth, side="left")


def wins(scores: np.ndarray, positive: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Comparisons within its bin that each cell gets right, float32 [cells, features].

    A positive is right about each negative that scores lower, a negative about each positive
    that scores higher; ties are half right. One sort a feature and bin.
    """
    found = np.empty(scores.shape, np.float32)
    for number in np.unique(bins):
        rows = np.flatnonzero(bins == number)
        for first in range(0, scores.shape[1], CHUNK):
            columns = slice(first, first + CHUNK)
            part = np.ascontiguousarray(scores[rows, columns].T)
            truth = np.ascontiguousarray(positive[rows, columns].T)
            found[rows, columns] = _wins(part, truth).T
    return found


def _wins(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """`wins` within one bin, on [features, cells]."""
    order = np.argsort(scores, axis=1)
    ranked, true = np.take_along_axis(scores, order, 1), np.take_along_axis(positive, order, 1)
    negatives = np.cumsum(~true, axis=1, dtype=np.float32)
    positives = np.cumsum(true, axis=1, dtype=np.float32)
    same = ranked[:, 1:] == ranked[:, :-1]
    if same.any():
        negatives, positives = _halved(negatives, ~true, same), _halved(positives, true, same)
    right = np.where(true, negatives, true.sum(axis=1, keepdims=True, dtype=np.float32) - positives)
    found = np.empty(scores.shape, np.float32)
    np.put_along_axis(found, order, right, 1)
    return found


def _halved(running: np.ndarray, counted: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Running counts where all cells of a tie get the mean of the counts before and through it."""
    cells = running.shape[1]
    ends = np.ones((len(running), 1), bool)
    place = np.arange(cells)
    first = np.maximum.accumulate(np.where(np.hstack([ends, ~same]), place, 0), axis=1)
    last = np.where(np.hstack([~same, ends]), place, cells)
    last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
    before = np.take_along_axis(running - counted, first, 1)
    return (before + np.take_along_axis(running, last, 1)) / 2


def trials(positive: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Comparisons within its bin that each cell takes part in, float32 [cells, features]."""
    found = np.empty(positive.shape, np.float32)
    for number in np.unique(bins):
        rows = np.flatnonzero(bins == number)
        true = positive[rows]
        count = true.sum(axis=0)
        found[rows] = np.where(true, len(rows) - count, count)
    return found


def auroc(right: np.ndarray, made: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve over cells, averaged over features.

    `right` and `made` come from `wins` and `trials`. Resamples use each cell's share of the
    comparisons with *all* held-out cells, which is first-order exact and needs no new ranking.
    Source: DeLong 1988, doi:10.2307/2531595, the structural components; self-normalised here.
    """
    area = (right * positive).sum(axis=0, dtype=np.float64) / (made * positive).sum(axis=0, dtype=np.float64)
    total = -area[None, :]
    for side in (positive, ~positive):
        own, tried = weights @ (right * side), weights @ (made * side)
        total = total + np.where(tried > 0, own / np.where(tried > 0, tried, 1), np.nan)
    return np.asarray(np.nanmean(total, axis=1))


def auroc_of_cells(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Area under the ROC curve over the features of each cell, [cells]; NaN without both kinds."""
    right = wins(scores.T, positive.T, np.zeros(scores.shape[1], np.int64)).T
    count = positive.sum(axis=1)
    pairs = (count * (positive.shape[1] - count)).astype(np.float64)
    return np.asarray(np.where(pairs > 0, (right * positive).sum(axis=1) / np.maximum(pairs, 1), np.nan))


def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosine of each cell's two vectors, [cells]; 0 where one of them is 0."""
    size = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray((left * right).sum(axis=1) / np.maximum(size, 1e-12))


def neighbour_overlap(left: np.ndarray, right: np.ndarray, k: int = 15) -> np.ndarray:
    """Share of each cell's `k` Euclidean neighbours in `left` that are also such in `right`, [cells]."""
    k = min(k, len(left) - 1)
    found = []
    for vectors in (left, right):
        near = NearestNeighbors(n_neighbors=k).fit(vectors)
        found.append(near.kneighbors(return_distance=False))
    shared = [len(np.intersect1d(a, b)) / k for a, b in zip(*found, strict=True)]
    return np.asarray(shared, np.float32)


def foscttm(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Fraction of cells closer than the true match, [cells], both directions; 0 best, 0.5 chance.

    Half of the ties count, the cell itself aside, so that a collapsed embedding scores chance.
    Source: Singh 2020, doi:10.1145/3388440.3412410; the tie term is ours.
    """
    number = len(left)
    shares = np.zeros(number)
    for one, other in ((left, right), (right, left)):
        square = (other.astype(np.float64) ** 2).sum(axis=1)
        for first in range(0, number, 512):
            rows = np.arange(first, min(first + 512, number))
            part = one[rows].astype(np.float64)
            gaps = (part**2).sum(axis=1)[:, None] - 2 * part @ other.T.astype(np.float64) + square
            own = gaps[np.arange(len(rows)), rows][:, None]
            near = np.isclose(gaps, own, rtol=1e-9, atol=1e-12)
            closer = ((gaps < own) & ~near).sum(axis=1) + (near.sum(axis=1) - 1) / 2
            shares[rows] += closer / (number - 1) / 2
    return shares


def spread(vectors: np.ndarray) -> float:
    """Total variance of an embedding over its mean squared length: 0 for a collapsed one."""
    length = float((vectors.astype(np.float64) ** 2).sum(axis=1).mean())
    return float(vectors.astype(np.float64).var(axis=0).sum()) / max(length, 1e-12)
