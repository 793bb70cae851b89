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
from cellray.train.feed import mix, stir, uniform_tokens
from cellray.train.masks import Independent, Mask

TABLE = 1 << 22
"""Bytes of a table of pairs of cell and feature: little enough for the caches."""


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
    order = _asked_first(cell, ids, asked, rows, keys, modality.context // 2)
    place = np.arange(len(ids)) - np.repeat(firsts[:-1], np.diff(firsts))
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
    return _uncounted(counts, features, cell, drawn)


def _uncounted(
    counts: Counts, features: int, cell: np.ndarray, drawn: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs (cell, feature), each once and sorted, without those counted. `cell` rises.

    They are marked in a table, TABLE of it at a time: sorting them takes ten times as long.
    """
    found = []
    step = max(1, TABLE // features)
    for first in range(0, len(counts), step):
        last = min(first + step, len(counts))
        table = np.zeros((last - first, features), bool)
        a, b = np.searchsorted(cell, [first, last])
        table[cell[a:b] - first, drawn[a:b]] = True
        mine = slice(counts.offsets[first], counts.offsets[last])
        table[np.repeat(np.arange(last - first), counts.lengths[first:last]), counts.ids[mine]] = False
        found.append(np.flatnonzero(table) + first * features)
    asked = np.concatenate([np.empty(0, np.int64), *found])
    return asked // features, asked % features


def _asked_first(
    cell: np.ndarray, ids: np.ndarray, asked: np.ndarray, rows: np.ndarray, keys: tuple[int, ...], most: int
) -> np.ndarray:
    """The order of tokens in which those of a cell are together: `most` of the `asked`, at random, then
    those that are seen, in the order they come, then the others asked. Where seen, `cell` rises."""
    own, seen = np.flatnonzero(asked), np.flatnonzero(~asked)
    numbers = [np.bincount(cell[part], minlength=len(rows)) for part in (own, seen)]
    firsts = np.cumsum(sum(numbers)) - sum(numbers)
    turn = mix(*keys, rows)[cell[own]]
    own = own[_sorted(cell[own], stir(stir(turn, ids[own]), 3) >> np.uint64(11))]
    turns = [np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n) for n in numbers]
    turns[0] += np.where(turns[0] < most, 0, numbers[1][cell[own]])
    turns[1] += np.minimum(numbers[0], most)[cell[seen]]
    order = np.empty(len(cell), np.int64)
    for part, place in zip((own, seen), turns, strict=True):
        order[firsts[cell[part]] + place] = part
    return order


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
    draw = mix(*keys, np.arange(features))  # no two of these are equal
    return np.flatnonzero(draw < np.partition(draw, most)[most])


def targets(counts: Counts, features: int, asked: np.ndarray | None, device: str = "cpu") -> Tensor:
    """Raw counts [cells, asked features], dense float32."""
    cells = np.repeat(np.arange(len(counts)), counts.lengths)
    place = np.arange(features)
    if asked is not None:
        place = np.full(features, -1)
        place[asked] = np.arange(len(asked))
    at = place[counts.ids]
    hits = np.flatnonzero(at >= 0)
    dense = np.zeros((len(counts), features if asked is None else len(asked)), np.float32)
    dense[cells[hits], at[hits]] = counts.counts[hits]
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
