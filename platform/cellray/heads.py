"""What stands on the embedding: a label head, and how far a cell lies from those the model was trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST = 50_000
"""Cells a head is fitted on; of more, a random choice."""
CENTRES = 16
"""Centres of the training cells, of which the nearest counts."""
SHRINK = 0.1
"""Weight of the mean variance against the measured covariance."""


@dataclass(frozen=True)
class Head:
    """Multinomial logistic regression on standardised embeddings."""

    classes: tuple[str, ...]
    mean: Tensor
    """[width], as all tensors here float64."""
    scale: Tensor
    """[width]."""
    weight: Tensor
    """[classes, width]."""
    bias: Tensor
    """[classes]."""

    def probabilities(self, vectors: Tensor) -> Tensor:
        """Chance of each class, float64 [cells, classes], for embeddings [cells, width]."""
        standard = (vectors.double() - self.mean) / self.scale
        return torch.softmax(standard @ self.weight.T + self.bias, dim=1)


@dataclass(frozen=True)
class Reference:
    """Where the training cells lie, to say how unusual another cell is."""

    whiten: Tensor
    """[width, width], float64: takes embeddings to where the spread about a centre is round."""
    centres: Tensor
    """[centres, width], float64, whitened."""
    quantiles: Tensor
    """[1001], float64: distances of the training cells to their nearest centre, rising."""

    def distance(self, vectors: Tensor) -> Tensor:
        """Squared Mahalanobis distance to the nearest centre, float64 [cells]."""
        white = vectors.double() @ self.whiten
        return (white[:, None] - self.centres).square().sum(dim=2).min(dim=1).values

    def score(self, vectors: Tensor) -> np.ndarray:
        """Share of the training cells that lie nearer to a centre, float32 [cells].

        0.5 is a typical cell; 1 is further out than every training cell.
        """
        steps = np.linspace(0, 1, len(self.quantiles))
        distance = self.distance(vectors).numpy()
        return np.interp(distance, self.quantiles.numpy(), steps).astype(np.float32)


def fit_head(vectors: np.ndarray, labels: Sequence[str] | np.ndarray, *, seed: int = 0) -> Head | None:
    """The head for embeddings [cells, width] of cells with these labels ("" is none).

    None where there are fewer than two labels.
    """
    from sklearn.linear_model import LogisticRegression

    named = np.asarray(labels, dtype=str)
    rows = _some(np.flatnonzero(named != ""), seed)
    classes = np.unique(named[rows])
    if len(classes) < 2:
        return None
    x = vectors[rows].astype(np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-12] = 1.0
    fit = LogisticRegression(max_iter=2000).fit((x - mean) / scale, named[rows])
    weight, bias = fit.coef_, fit.intercept_
    if len(classes) == 2:
        weight, bias = np.vstack([0 * weight, weight]), np.concatenate([[0.0], bias])
    tensors = [torch.from_numpy(np.ascontiguousarray(a, np.float64)) for a in (mean, scale, weight, bias)]
    return Head(tuple(classes.tolist()), *tensors)


def fit_reference(vectors: np.ndarray, *, seed: int = 0) -> Reference:
    """The reference for embeddings [cells, width] of training cells.

    k-means centres; the covariance within them, shrunk towards a round one, gives the metric.
    """
    from sklearn.cluster import KMeans

    x = vectors[_some(np.arange(len(vectors)), seed)].astype(np.float64)
    if len(x) < 2:
        raise ValueError(
            f"{len(x)} embeddings are too few to learn where training cells lie; give two or more"
        )
    fit = KMeans(min(CENTRES, max(1, len(x) // 50)), n_init=1, random_state=seed).fit(x)
    rest = x - fit.cluster_centers_[fit.labels_]
    covariance = rest.T @ rest / len(x)
    width = x.shape[1]
    spread = max(np.trace(covariance) / width, 1e-12)
    covariance = (1 - SHRINK) * covariance + SHRINK * spread * np.eye(width)
    whiten = np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(covariance)))
    bare = Reference(
        torch.from_numpy(whiten), torch.from_numpy(fit.cluster_centers_ @ whiten), torch.empty(0).double()
    )
    distances = bare.distance(torch.from_numpy(x)).numpy()
    quantiles = np.quantile(distances, np.linspace(0, 1, 1001))
    return Reference(bare.whiten, bare.centres, torch.from_numpy(quantiles))


def to_tensors(head: Head | None, reference: Reference) -> dict[str, Tensor]:
    """Both as named tensors."""
    parts = {f"reference.{k}": getattr(reference, k) for k in ("whiten", "centres", "quantiles")}
    if head is not None:
        parts |= {f"head.{k}": getattr(head, k) for k in ("mean", "scale", "weight", "bias")}
    return parts


def from_tensors(tensors: Mapping[str, Tensor], classes: Sequence[str]) -> tuple[Head | None, Reference]:
    """What `to_tensors` wrote. KeyError for a tensor that is missing."""
    reference = Reference(*(tensors[f"reference.{k}"] for k in ("whiten", "centres", "quantiles")))
    if not classes:
        return None, reference
    parts = [tensors[f"head.{k}"] for k in ("mean", "scale", "weight", "bias")]
    return Head(tuple(classes), *parts), reference


def _some(rows: np.ndarray, seed: int) -> np.ndarray:
    """At most MOST of `rows`, in order."""
    if len(rows) <= MOST:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, MOST, replace=False))
