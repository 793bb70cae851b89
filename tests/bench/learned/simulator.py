"""What can be known at all: the simulator's own rates, and what they tell of the hidden state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np

from cellray.data import truth
from cellray.data.truth import MODALITIES, Simulation, cells_of

SPREAD = {"rna": 0.35, "atac": 0.35, "protein": 0.25}
"""Standard deviation of a cell's depth, in logs, as `cellray.data.truth` draws it."""
SHAPE = {"rna": 8.0, "protein": 20.0}
"""Inverse dispersion of the counts."""
MOST = 200
"""Counts above this are as good as impossible."""

Draw = Callable[[Simulation, np.random.Generator, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Rates:
    """What the counts of some cells were drawn from; rows of cells without the modality are NaN."""

    mean: dict[str, np.ndarray]
    """Expected counts, for ATAC the chance of being open, float32 [cells, features]."""
    usual: dict[str, np.ndarray]
    """The same at the modality's median depth: what a cell's other modalities could tell at best."""


def rates(simulation: Simulation) -> Rates:
    """Of all cells, in the simulator's order."""
    heard: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {m: [] for m in MODALITIES}
    with _overheard(heard):
        cells = cells_of(simulation, 0, simulation.cells)
        blocks = [truth.BLOCK] * -(-simulation.cells // truth.BLOCK)
        present = np.concatenate(
            [_present(simulation, number) for number in range(len(blocks))]
        )  # of whole blocks: the last one is cut only after it was drawn
    assert (present[: len(cells)] == cells.present).all()
    found: list[dict[str, np.ndarray]] = [{}, {}]
    for bit, name in enumerate(MODALITIES):
        has = (present >> bit) & 1 == 1
        for which, at_usual in enumerate((False, True)):
            parts = [expected(name, simulation, e, d * (not at_usual)) for e, d in heard[name]]
            whole = np.full((len(present), parts[0].shape[1]), np.nan, np.float32)
            whole[has] = np.concatenate(parts)
            found[which][name] = whole[: len(cells)]
    return Rates(*found)


def _present(simulation: Simulation, block: int) -> np.ndarray:
    """What is measured in the cells of a block, those beyond the last cell included."""
    index = block * truth.BLOCK + np.arange(truth.BLOCK)
    return np.array([bits for _, bits in truth.PLACES], np.uint32)[index % len(truth.PLACES)]


@contextmanager
def _overheard(heard: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> Iterator[None]:
    """While the body draws cells, what each draw is given is kept as well."""
    table = cast(dict[str, Draw], truth._DRAW)
    before = dict(table)

    def keeping(name: str) -> Draw:
        def draw(
            simulation: Simulation, rng: np.random.Generator, effect: np.ndarray, depth: np.ndarray
        ) -> np.ndarray:
            heard[name].append((effect.copy(), depth.copy()))
            return before[name](simulation, rng, effect, depth)

        return draw

    table.update({name: keeping(name) for name in before})
    try:
        yield
    finally:
        table.update(before)


def expected(name: str, simulation: Simulation, effect: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Expected counts, for ATAC the chance of being open, from log rates or logits and depths [cells, 1]."""
    shift = SPREAD[name] * depth
    if name == "rna":
        rate = np.exp(effect)
        return rate * (simulation.depth * np.exp(shift) / rate.sum(axis=1, keepdims=True))
    if name == "protein":
        return np.exp(effect + 3.0 + shift)
    centre = np.log(simulation.accessible / (1 - simulation.accessible)) - 0.7
    return 1 / (1 + np.exp(-(effect + centre + shift)))


def state_information(simulation: Simulation, found: Rates, types: np.ndarray) -> dict[str, np.ndarray]:
    """Modality -> what it tells of the state of each cell: 1 / variance, float64 [cells]; 0 where absent.

    Of one who knows the type, the rates and every response of the simulator, and has to tell the state
    from nuisance programmes and depth; the curvature of the likelihood at the truth (Laplace). With the
    prior's 1 added, 1 - 1 / (1 + sum) is the best R2 that any model can reach.
    `types` are the numbers of the cells' types.
    """
    responses = truth._responses(simulation)
    told = {}
    for name in MODALITIES:
        mean, r = found.mean[name], responses[name]
        told[name] = np.zeros(len(mean))
        for cell in np.flatnonzero(np.isfinite(mean[:, 0])):
            mu = mean[cell].astype(np.float64)
            slopes = np.vstack([r.state[types[cell]], r.nuisance]).astype(np.float64)
            if name == "rna":
                slopes -= (slopes @ mu / mu.sum())[:, None]  # counts share a fixed depth
            slopes = np.vstack([slopes, np.ones(len(mu))])
            weight = mu * (1 - mu) if name == "atac" else mu / (1 + mu / SHAPE[name])
            curvature = (slopes * weight) @ slopes.T
            prior = np.r_[np.ones(len(slopes) - 2), SPREAD[name] ** -2]
            others = curvature[1:, 1:] + np.diag(prior)
            told[name][cell] = curvature[0, 0] - curvature[0, 1:] @ np.linalg.solve(others, curvature[1:, 0])
    return told


def value_when_counted(mean: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Mean of log1p(CP10k) of counts that are not 0, of negative binomials with these means and depths."""
    k = np.arange(1, MOST)
    size = SHAPE["rna"]
    step = mean / (mean + size)
    log = np.log1p(1e4 * k / np.maximum(total, 1)[:, None])
    chance = np.cumprod(step[:, None] * (size + k - 1) / k, axis=1)  # relative to the chance of 0
    return np.asarray((chance * log).sum(axis=1) / chance.sum(axis=1))


def counted(mean: np.ndarray) -> np.ndarray:
    """Chance that an RNA count is not 0."""
    return 1 - (1 + mean / SHAPE["rna"]) ** -SHAPE["rna"]
