"""From a batch of the store to tensors: tokens, what is hidden, what is asked for.

Every random choice is a pure function of (seed, step, cell, feature): the same whatever the
number of workers, and after a resume.
"""

import numpy as np
import torch
from torch import Tensor

from cellray.data import encodings
from cellray.data.modalities import Modality, scaled
from cellray.data.store import Batch
from cellray.data.tokens import Counts
from cellray.model.encoder import Tokens
from cellray.model.values import BINS
from cellray.train.feed import mix, uniform
from cellray.train.masks import Independent, Mask


def present(batch: Batch, modalities: int) -> np.ndarray:
    """Which modalities each cell has, bool [cells, modalities]."""
    return (batch.present[:, None] >> np.arange(modalities, dtype=np.uint32)) & 1 == 1


def plain_tokens(
    counts: Counts,
    modality: Modality,
    *,
    keep: np.ndarray | None = None,
    encoding: str = "value",
    device: str = "cpu",
) -> Tokens:
    """All tokens, or those where `keep` is true, none hidden, their values as `encoding` reads them."""
    seen = counts if keep is None else visible(counts, keep)
    if encoding == "bins":
        values = _bins(seen)
    else:
        values = _values(counts, modality)
        values = values if keep is None else values[keep]
    return _tokens(seen.ids, values, np.zeros(len(seen.ids), bool), seen.offsets, seen.total, device)


def visible(counts: Counts, keep: np.ndarray) -> Counts:
    """The tokens where `keep`, bool [tokens], is true; of the same cells and depths."""
    offsets = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])[counts.offsets]
    return Counts(offsets, counts.ids[keep], counts.counts[keep], counts.total)


def kept(counts: Counts, rows: np.ndarray, share: float | np.ndarray, *keys: int) -> np.ndarray:
    """Tokens that stay when `share` (one number, or one a cell) of them is dropped, bool [tokens]."""
    row = np.repeat(rows, counts.lengths)
    limit = np.repeat(np.broadcast_to(share, len(rows)), counts.lengths)
    return uniform(*keys, row, counts.ids) >= limit


def masked_tokens(
    counts: Counts,
    rows: np.ndarray,
    modality: Modality,
    features: int,
    *,
    mask: Mask | tuple[float, float],
    zeros: float,
    keys: tuple[int, ...],
    encoding: str = "value",
    device: str = "cpu",
) -> tuple[Tokens, Tensor, Tensor]:
    """Tokens with some values hidden and some absent features asked for.

    Returns the tokens, the positions asked for that lie within the context, and the truth
    there: the scaled value, 0 for an absent feature, whatever the encoding. What is asked for comes
    first in each cell, but takes half of the context at the most while there is more to see. `mask`
    says what is hidden; two bounds of the share stand for `Independent`. Bins are those among the
    counts that stay visible, which stay in rank order.
    """
    mask = Independent(mask) if isinstance(mask, tuple) else mask
    cells = np.repeat(np.arange(len(counts)), counts.lengths)
    hidden = mask(counts, rows, keys)
    absent_cells, absent = _absent(counts, rows, features, zeros, keys, mask)
    cell = np.concatenate([absent_cells, cells])
    ids = np.concatenate([absent, counts.ids.astype(np.int64)])
    truth = np.concatenate([np.zeros(len(absent), np.float32), _values(counts, modality)])
    values = truth
    if encoding == "bins":
        values = np.zeros_like(truth)
        values[len(absent) :][~hidden] = _bins(visible(counts, ~hidden))
    asked = np.concatenate([np.ones(len(absent), bool), hidden])
    firsts = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=len(counts)))])
    draw = np.where(asked, uniform(*keys, rows[cell], ids, 3), np.arange(len(ids)))
    asked_first = np.lexsort((draw, ~asked, cell))
    turn = np.empty(len(ids), np.int64)
    turn[asked_first] = np.arange(len(ids)) - firsts[cell[asked_first]]
    late = asked & (turn >= modality.context // 2)
    order = np.lexsort((draw, np.where(late, 2, ~asked), cell))
    place = np.arange(len(ids)) - firsts[cell[order]]
    tokens = _tokens(ids[order], values[order], asked[order], firsts, counts.total, device)
    at = np.flatnonzero(asked[order] & (place < modality.context))
    return tokens, torch.from_numpy(at).to(device), torch.from_numpy(truth[order][at]).to(device)


def _absent(
    counts: Counts, rows: np.ndarray, features: int, share: float, keys: tuple[int, ...], mask: Mask
) -> tuple[np.ndarray, np.ndarray]:
    """Features that a cell does not count, about `share` times its tokens: (cell, feature), sorted.

    Fewer where `mask` looks for them among few features, of which many are counted.
    """
    wanted = np.ceil(share * counts.lengths).astype(np.int64)
    cell = np.repeat(np.arange(len(counts)), wanted)
    turn = np.arange(len(cell)) - np.repeat(np.cumsum(wanted) - wanted, wanted)
    draw = mix(*keys, rows[cell], turn, 2)
    drawn = mask.beside(counts, rows, keys, cell, draw)
    drawn = np.where(drawn < 0, (draw % np.uint64(features)).astype(np.int64), drawn)
    asked = np.unique(cell * features + drawn)
    counted = np.repeat(np.arange(len(counts)), counts.lengths) * features + counts.ids
    asked = asked[~np.isin(asked, counted)]
    return asked // features, asked % features


def asked_features(features: int, most: int, *keys: int) -> np.ndarray | None:
    """Features a decoder is asked for in this step, the same on every worker; None for all of them."""
    if features <= most:
        return None
    return np.sort(np.argsort(mix(*keys, np.arange(features)), kind="stable")[:most])


def targets(counts: Counts, features: int, asked: np.ndarray | None, device: str = "cpu") -> Tensor:
    """Raw counts [cells, asked features], dense float32."""
    cells = np.repeat(np.arange(len(counts)), counts.lengths)
    place = np.arange(features)
    if asked is not None:
        place = np.full(features, -1)
        place[asked] = np.arange(len(asked))
    at = place[counts.ids]
    dense = np.zeros((len(counts), features if asked is None else len(asked)), np.float32)
    dense[cells[at >= 0], at[at >= 0]] = counts.counts[at >= 0]
    return torch.from_numpy(dense).to(device)


def _values(counts: Counts, modality: Modality) -> np.ndarray:
    return scaled(counts.counts, np.repeat(counts.total, counts.lengths), modality.scale)


def _bins(counts: Counts) -> np.ndarray:
    return encodings.bins(counts, BINS).astype(np.float32)


def _tokens(
    ids: np.ndarray,
    values: np.ndarray,
    hidden: np.ndarray,
    offsets: np.ndarray,
    total: np.ndarray,
    device: str,
) -> Tokens:
    return Tokens(
        torch.from_numpy(ids.astype(np.int64)).to(device),
        torch.from_numpy(values).to(device),
        torch.from_numpy(hidden).to(device),
        torch.from_numpy(offsets.astype(np.int64)).to(device),
        torch.from_numpy(np.log1p(total).astype(np.float32)).to(device),
    )
