"""Simple models that every score of ours stands beside: probes, neighbours, ridge. No setting is tuned."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

NEIGHBOURS = 15
PENALTIES = tuple(10.0**power for power in range(-1, 6))
"""Ridge penalties, chosen among by leave-one-out error over the training cells."""


def linear_probe(train: np.ndarray, codes: np.ndarray, test: np.ndarray, labels: int) -> np.ndarray:
    """Chance of each label, [test cells, labels], by logistic regression on standardised columns."""
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(max_iter=300)
    return _chance(model, scaler.transform(train), codes, scaler.transform(test), labels)


def gene_regression(train: np.ndarray, codes: np.ndarray, test: np.ndarray, labels: int) -> np.ndarray:
    """Chance of each label, [test cells, labels], by logistic regression on log1p(CP10k).

    Genes are not standardised: that would raise the noise of the rare ones to the level of the rest.
    """
    return _chance(LogisticRegression(C=0.1, max_iter=100), train, codes, test, labels)


def _chance(
    model: LogisticRegression, train: np.ndarray, codes: np.ndarray, test: np.ndarray, labels: int
) -> np.ndarray:
    """Chances of all labels, those that the fit never met included.

    A fit that ends at its last iteration is kept: by then the accuracy has long settled.
    """
    chance = np.zeros((len(test), labels))
    if len(np.unique(codes)) == 1:
        chance[:, codes[0]] = 1
        return chance
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train, codes)
    chance[:, model.classes_] = model.predict_proba(test)
    return chance


def neighbours(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Positions in `train` of the Euclidean neighbours of each test cell, [test cells, NEIGHBOURS]."""
    near = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(train))).fit(train)
    return np.asarray(near.kneighbors(test, return_distance=False))


def neighbour_votes(train: np.ndarray, codes: np.ndarray, test: np.ndarray, labels: int) -> np.ndarray:
    """Share of the neighbours with each label, [test cells, labels]."""
    near = codes[neighbours(train, test)]
    return np.asarray((near[:, :, None] == np.arange(labels)).mean(axis=1))


def majority(codes: np.ndarray, cells: int, labels: int) -> np.ndarray:
    """Share of each label among the training cells, for every test cell, [cells, labels]."""
    return np.tile(np.bincount(codes, minlength=labels) / len(codes), (cells, 1))


def ridge(train: np.ndarray, values: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Linear prediction of `values` [cells, outputs] from standardised columns, [test cells, outputs].

    One penalty for all outputs, chosen by leave-one-out error on the first 50 of them.
    """
    scaler = StandardScaler().fit(train)
    known = scaler.transform(train)
    penalty = RidgeCV(alphas=PENALTIES).fit(known, values[:, :50]).alpha_
    found = Ridge(penalty).fit(known, values).predict(scaler.transform(test))
    return np.asarray(found).reshape(len(test), *values.shape[1:])
