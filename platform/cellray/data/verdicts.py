"""Which cells of an atlas stay, and why the others do not: quality control over all its files together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd

from cellray.data.group import Group, Part
from cellray.data.modalities import Modality
from cellray.data.qc import (
    EMPTY,
    FEW_COUNTS,
    FEW_FEATURES,
    KEPT,
    LABEL,
    QC,
    Metrics,
    Verdict,
    duplicates,
    judge,
)


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What becomes of every row and every cell; numbers are indices into `qc.REASONS`."""

    rows: list[np.ndarray]
    """The reason of each row of each part, uint8 [rows]: its own, or else that of its cell."""
    cells: dict[str, np.ndarray]
    """Data set -> the reason of each cell, uint8 [cells]. EMPTY where no modality is left of it."""
    digests: dict[str, np.ndarray]
    """Data set -> the digest of each cell's leading modality, uint64 [cells]."""
    judged: list[dict[str, Any]]
    """By modality: what was applied to which data sets and assays, for the report."""


def decide(
    parts: Sequence[tuple[Group, Part]],
    metrics: Sequence[Metrics],
    out: dict[str, np.ndarray],
    modalities: Sequence[Modality],
    qc: QC,
    there: tuple[np.ndarray, np.ndarray] | None = None,
) -> Verdicts:
    """The verdicts on the cells of `parts`, of which `metrics` are the measurements, in the same order.

    A cell is judged by its leading modality: the first, in the order of `modalities`, of which it
    has enough. What fails there for being an outlier or a duplicate is dropped whole; where only too
    little was counted, that modality alone is. `out` are the cells dropped for their label; `there`
    are digest and depth of the cells of an earlier edition, which are not taken again.
    """
    groups = {group.name: group for group, _ in parts}
    cells = {name: np.where(out[name], LABEL, EMPTY).astype(np.uint8) for name in groups}
    led = {name: out[name].copy() for name in groups}
    digests = {name: np.zeros(len(group.cells), np.uint64) for name, group in groups.items()}
    rows = [np.zeros(len(own), np.uint8) for own in metrics]
    judged = []
    for modality in modalities:
        mine: dict[str, list[int]] = {}
        for i, (group, part) in enumerate(parts):
            if part.file.modality == modality.name:
                mine.setdefault(group.name, []).append(i)
                rows[i][metrics[i].features < modality.min_features] = FEW_FEATURES
                rows[i][metrics[i].counts == 0] = EMPTY
        every = [_Led(groups[name], own, parts, metrics, led[name]) for name, own in mine.items()]
        sets = [own for own in every if len(own)]
        if not sets:
            continue
        verdicts = _judged(sets, modality, qc, there)
        for own, verdict in zip(sets, verdicts, strict=True):
            name = own.group.name
            for i, at, reason in own.split(verdict.reason):
                little = np.isin(reason, (EMPTY, FEW_FEATURES, FEW_COUNTS))
                rows[i][at[little]] = reason[little]
                cell = parts[i][1].cells[at[~little]]
                cells[name][cell] = reason[~little]
                digests[name][cell] = metrics[i].digest[at[~little]]
                led[name][cell] = True
        entries = [entry for verdict in verdicts for entry in verdict.groups]
        judged.append({"modality": modality.name, "groups": entries, "edges": verdicts[0].edges})
    for (group, part), reason in zip(parts, rows, strict=True):
        of_cell = cells[group.name][part.cells]
        reason[:] = np.where((of_cell == LABEL) | (reason == KEPT), of_cell, reason)
    return Verdicts(rows=rows, cells=cells, digests=digests, judged=judged)


class _Led:
    """The cells of one data set that are led by one modality: rows of its parts, one part after the other."""

    def __init__(
        self,
        group: Group,
        mine: Sequence[int],
        parts: Sequence[tuple[Group, Part]],
        metrics: Sequence[Metrics],
        led: np.ndarray,
    ) -> None:
        """Rows of the parts `mine` whose cells are `led` by none before."""
        self.group, self._mine = group, mine
        self._cells = [parts[i][1].cells for i in mine]
        self._metrics = [metrics[i] for i in mine]
        self._rows = [~led[cells] for cells in self._cells]

    def __len__(self) -> int:
        return sum(int(np.count_nonzero(rows)) for rows in self._rows)

    def metrics(self) -> Metrics:
        """Copied each time, so that there are the copies of one data set at a time."""
        pairs = list(zip(self._metrics, self._rows, strict=True))
        return Metrics(
            **{f.name: np.concatenate([getattr(m, f.name)[r] for m, r in pairs]) for f in fields(Metrics)}
        )

    def judge(self, modality: Modality, qc: QC, again: np.ndarray | None) -> Verdict:
        """The verdict on the cells, assay by assay; those that are there `again` are duplicates."""
        assays = self.group.about["assay"]
        codes = np.concatenate([assays.codes[c[r]] for c, r in zip(self._cells, self._rows, strict=True)])
        kinds = pd.unique(codes)  # in the order in which they come
        number = np.zeros(len(assays.values), np.int32)
        number[kinds] = np.arange(len(kinds))
        names = [assays.values[int(kind)] for kind in kinds]
        verdict = judge(
            self.metrics(),
            number[codes],
            [", ".join(filter(None, (self.group.name, assay))) for assay in names],
            np.zeros(len(codes), bool),
            qc,
            min_features=modality.min_features,
            held=again,
        )
        for entry, assay in zip(verdict.groups, names, strict=True):
            entry |= {"dataset": self.group.name, "assay": assay}
        return verdict

    def split(self, reason: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each part its number, its rows that are led, and their share of `reason`."""
        rows = [np.flatnonzero(own) for own in self._rows]
        reasons = np.split(reason, np.cumsum([len(own) for own in rows])[:-1])
        yield from zip(self._mine, rows, reasons, strict=True)


def _judged(
    sets: Sequence[_Led], modality: Modality, qc: QC, there: tuple[np.ndarray, np.ndarray] | None
) -> list[Verdict]:
    """The verdict on each of `sets`: every data set by itself, then again when all duplicates are known."""
    alone = [own.judge(modality, replace(qc, duplicates="keep"), None) for own in sets]
    if qc.duplicates == "keep":
        return alone
    again = _again(sets, [verdict.reason == KEPT for verdict in alone], there)
    return [own.judge(modality, qc, same) for own, same in zip(sets, again, strict=True)]


def _again(
    sets: Sequence[_Led], stay: Sequence[np.ndarray], there: tuple[np.ndarray, np.ndarray] | None
) -> list[np.ndarray]:
    """Which cells are, of those that `stay` or are `there`, an earlier one again, bool [cells] a data set.

    Cells are compared only if another has their digest. To find these takes 16 bytes a cell.
    """
    digests = [own.metrics().digest[kept] for own, kept in zip(sets, stay, strict=True)]
    every = np.concatenate([*digests, *(there or [])[:1]])
    del digests
    every.sort()
    twice = every[1:][(every[1:] == every[:-1]) & (every[1:] > 0)]
    del every
    found = [kept & _within(own.metrics().digest, twice) for own, kept in zip(sets, stay, strict=True)]
    some = Metrics.joined(_take(own.metrics(), rows) for own, rows in zip(sets, found, strict=True))
    again = np.zeros(len(some), bool)
    if there:
        known = _within(there[0], twice)
        pairs = pd.MultiIndex.from_arrays([there[0][known], there[1][known]])
        again |= pd.MultiIndex.from_arrays([some.digest, some.counts]).isin(pairs)
    left = _take(some, ~again)
    again[~again] = duplicates(left.digest, left.counts, left.features)
    cuts = np.cumsum([np.count_nonzero(own) for own in found])[:-1]
    for own, same in zip(found, np.split(again, cuts), strict=True):
        own[own] = same
    return found


def _within(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which `values` are in `ordered`, which is sorted, bool [values]."""
    return np.searchsorted(ordered, values, "right") > np.searchsorted(ordered, values)


def _take(metrics: Metrics, rows: np.ndarray) -> Metrics:
    return Metrics(**{f.name: getattr(metrics, f.name)[rows] for f in fields(Metrics)})
