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
from cellray.train.feed import mix, uniform_tokens
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
    limit = np.repeat(np.broadcast_to(share, len(rows)), counts.lengths)
    return uniform_tokens(rows, counts, *keys) >= limit


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
    from cellray.data.jit import still  # numba, which an embedder need not import
    from cellray.train import compiled

    mask = Independent(mask) if isinstance(mask, tuple) else mask
    hidden, turn = mask(counts, rows, keys), mix(*keys, rows)
    truth = _values(counts, modality)
    read = truth
    if encoding == "bins":
        read = np.zeros_like(truth)
        read[~hidden] = _bins(visible(counts, ~hidden))
    offsets, own = still(counts.offsets, counts.ids)
    tries = np.ceil(zeros * counts.lengths).astype(np.int64)
    firsts = np.concatenate([[0], np.cumsum(tries)])
    draw = compiled.draws(turn, firsts)
    drawn = mask.beside(counts, rows, keys, np.repeat(np.arange(len(counts)), tries), draw)
    begin, absent = compiled.absent(offsets, own, firsts, draw, drawn, features)
    firsts, cell, feature, token, bits = compiled.asked(turn, offsets, own, hidden, begin, absent)
    order = _sorted(cell, bits)
    ids, values, asked, offsets, at, true = compiled.arranged(
        offsets, own, hidden, read, truth, firsts, feature[order], token[order], modality.context
    )
    tokens = _tokens(ids, values, asked, offsets, counts.total, device)
    return tokens, torch.from_numpy(at).to(device), torch.from_numpy(true).to(device)


def _sorted(cell: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """The order by cell, then by draw, uint64 below 2**53, then as they come."""
    if not len(cell) or cell.max() >= 1 << 11:
        return np.lexsort((draw, cell))
    both = (cell.astype(np.uint64) << np.uint64(53)) | draw
    order = np.argsort(both)  # as numbers, which is fast but says nothing of ties; there are hardly ever any
    found = both[order]
    return np.argsort(both, kind="stable") if (found[1:] == found[:-1]).any() else order


def asked_features(features: int, most: int, *keys: int) -> np.ndarray | None:
    """Features a decoder is asked for in this step, the same on every worker; None for all of them."""
    if features <= most:
        return None
    from cellray.train import compiled

    draw = compiled.numbered(mix(*keys)[()], features)  # no two of these are equal
    return np.flatnonzero(draw < np.partition(draw, most)[most])


def targets(counts: Counts, features: int, asked: np.ndarray | None, device: str = "cpu") -> Tensor:
    """Raw counts [cells, asked features], dense float32."""
    from cellray.data.jit import still
    from cellray.train import compiled

    place = np.arange(features)
    if asked is not None:
        place = np.full(features, -1)
        place[asked] = np.arange(len(asked))
    width = features if asked is None else len(asked)
    found = compiled.dense(*still(counts.offsets, counts.ids, counts.counts), place, width)
    return torch.from_numpy(found).to(device)


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
