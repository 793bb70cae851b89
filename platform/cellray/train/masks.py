"""Masks: which tokens of a cell have their value withheld in stage 1. Values of a recipe, without a registry.

Every choice is a pure function of (seed, step, cell), the same whatever batch the cell is in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cellray.data import storage
from cellray.data.programmes import Groups, programmes, regions
from cellray.data.tokens import Counts, Tokenizer, Vocabulary, gather
from cellray.train import recipe as settings
from cellray.train.feed import uniform, uniform_tokens

Keys = tuple[int, ...]


class Mask(Protocol):
    """What stage 1 needs of a mask. `rows` are the cells' rows in the store, `keys` the seed and the step."""

    @property
    def note(self) -> str:
        """What it was made from, for who started the run; "" where there is nothing to say."""
        ...

    def __call__(self, counts: Counts, rows: np.ndarray, keys: Keys) -> np.ndarray:
        """Tokens whose value is withheld, bool [tokens]."""
        ...

    def beside(
        self, counts: Counts, rows: np.ndarray, keys: Keys, cell: np.ndarray, draw: np.ndarray
    ) -> np.ndarray:
        """Features among which an absent one is looked for, int64 [draws]; -1 where any will do.

        Draw i is for cell number `cell[i]`, from the random `draw[i]`, uint64. Where what is hidden has
        something in common, absent features have to have it too: else a place that is asked
        for would tell by its company whether anything is there.
        """
        ...


@dataclass(frozen=True)
class Independent:
    """Every token on its own, with a chance that is drawn for each cell between two bounds."""

    share: tuple[float, float]
    note: str = ""

    def __call__(self, counts: Counts, rows: np.ndarray, keys: Keys) -> np.ndarray:
        limit = np.repeat(_shares(self.share, rows, keys), counts.lengths)
        return uniform_tokens(rows, counts, *keys, 1) < limit

    def beside(
        self, counts: Counts, rows: np.ndarray, keys: Keys, cell: np.ndarray, draw: np.ndarray
    ) -> np.ndarray:
        return np.full(len(cell), -1)


@dataclass(frozen=True)
class Grouped:
    """In some cells whole groups of features, in the others every token on its own.

    The share of a cell's tokens that is hidden is drawn as by `Independent`, and is as large on
    average: groups are hidden in random order until they hold that much, and the last one,
    which holds more, is hidden with the chance that leaves the mean as it is. Where all groups
    together hold less, tokens that are in none are hidden too, each on its own.
    """

    groups: Groups
    share: tuple[float, float]
    cells: float
    """Share of the cells in which groups are hidden."""

    @property
    def note(self) -> str:
        return self.groups.note

    def __call__(self, counts: Counts, rows: np.ndarray, keys: Keys) -> np.ndarray:
        hidden = Independent(self.share)(counts, rows, keys)
        picked = self._picked(rows, keys)
        _, at = gather(counts.offsets, picked)
        hidden[at] = self._hidden(counts.take(picked), rows[picked], keys)[0]
        return hidden

    def beside(
        self, counts: Counts, rows: np.ndarray, keys: Keys, cell: np.ndarray, draw: np.ndarray
    ) -> np.ndarray:
        """A random feature of the group that hid a random hidden token of the cell."""
        found = np.full(len(cell), -1)
        picked = self._picked(rows, keys)
        part = counts.take(picked)
        hidden, group = self._hidden(part, rows[picked], keys)
        known = np.flatnonzero(hidden & (group >= 0))
        owners = np.repeat(picked, part.lengths)[known]
        # By id: their order in the store would tell how large the hidden counts are.
        known = known[np.lexsort((part.ids[known], owners))]
        many = np.bincount(owners, minlength=len(counts))
        mine = np.flatnonzero(many[cell] > 0)
        asked = cell[mine]
        turn = (draw[mine] >> np.uint64(32)).astype(np.int64) % many[asked]
        chosen = group[known[np.searchsorted(owners, asked) + turn]]
        first, last = self.groups.offsets[chosen], self.groups.offsets[chosen + 1]
        place = (draw[mine] & np.uint64(0xFFFFFFFF)).astype(np.int64) % (last - first)
        found[mine] = self.groups.members[first + place]
        return found

    def _picked(self, rows: np.ndarray, keys: Keys) -> np.ndarray:
        """Numbers of the cells in which groups are hidden."""
        return np.flatnonzero(uniform(*keys, 4, rows) < self.cells)

    def _hidden(self, counts: Counts, rows: np.ndarray, keys: Keys) -> tuple[np.ndarray, np.ndarray]:
        """Hidden tokens, bool [tokens], and the group each goes with, -1 for none, int64 [tokens]."""
        lengths = counts.lengths
        cell, row = np.repeat(np.arange(len(counts)), lengths), np.repeat(rows, lengths)
        turn, group = self._turns(counts, row, keys)
        # Groups come in the order of their turns: a token is hidden when the first of its groups is.
        order = np.lexsort((turn, cell))
        wanted = _shares(self.share, rows, keys) * lengths
        last = np.maximum(np.ceil(wanted).astype(np.int64), 1) - 1
        some = np.flatnonzero(lengths)
        cross = np.full(len(counts), -np.inf)
        cross[some] = turn[order[counts.offsets[some] + last[some]]]
        before, at = turn < cross[cell], turn == cross[cell]
        already = np.bincount(cell[before], minlength=len(counts))
        more = np.bincount(cell[at], minlength=len(counts))
        chance = (wanted - already) / np.maximum(more, 1)
        whole = uniform(*keys, 5, rows) < chance
        alone = uniform_tokens(rows, counts, *keys, 1) < chance[cell]
        return before | (at & np.where(group >= 0, whole[cell], alone)), group

    def _turns(self, counts: Counts, row: np.ndarray, keys: Keys) -> tuple[np.ndarray, np.ndarray]:
        """When each token is hidden, infinite for those in no group, and the group it is hidden with."""
        firsts, groups = self.groups.by_feature
        offsets, at = gather(firsts, counts.ids.astype(np.int64))
        many = np.diff(offsets)
        drawn = uniform(*keys, 6, np.repeat(row, many), groups[at])
        turn, group = np.full(len(many), np.inf), np.full(len(many), -1)
        some = np.flatnonzero(many)
        if len(some):
            turn[some] = np.minimum.reduceat(drawn, offsets[some])
        best = drawn == np.repeat(turn, many)
        group[np.repeat(np.arange(len(many)), many)[best]] = groups[at][best]
        return turn, group


def mask_of(setting: settings.Unimodal, vocabulary: Vocabulary) -> Mask:
    """What a recipe hides of the modality of `vocabulary`. ValueError where it cannot be done.

    Programmes are of genes, regions of peaks; all else is hidden token by token.
    """
    features = vocabulary.modality.features
    # Not in the recipe: settings are changed one by one, and a check of two would refuse the first.
    if "programme" in setting.mask_by and not setting.programmes:
        raise ValueError("unimodal.mask_by has programme: name a .gmt file in unimodal.programmes")
    if setting.programmes and "programme" not in setting.mask_by:
        raise ValueError(
            f"unimodal.programmes is {setting.programmes!r}, which mask_by={','.join(setting.mask_by)} does "
            "not use: set unimodal.mask_by=programme, or leave it out"
        )
    if "programme" in setting.mask_by and features == "gene":
        groups = programmes(storage.absolute(setting.programmes), vocabulary)
    elif "region" in setting.mask_by and features == "peak":
        groups = regions(vocabulary, setting.region)
    else:
        return Independent(setting.mask)
    return Grouped(groups, setting.mask, setting.grouped)


def notes(setting: settings.Unimodal, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """Modality and what its mask was made from, where there is something to say. Reads the files named."""
    for name, vocabulary in tokenizer.vocabularies.items():
        if note := mask_of(setting, vocabulary).note:
            yield name, note


def _shares(share: tuple[float, float], rows: np.ndarray, keys: Keys) -> np.ndarray:
    """Share of the tokens of each cell that is hidden, float64 [cells]."""
    return share[0] + (share[1] - share[0]) * uniform(*keys, rows, 0)
