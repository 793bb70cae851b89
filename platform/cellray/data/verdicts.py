"""Which cells of an atlas stay, and why the others do not: quality control over all its files together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cellray.data.group import Group, Part
from cellray.data.modalities import Modality
from cellray.data.qc import EMPTY, FEW_COUNTS, FEW_FEATURES, KEPT, LABEL, QC, Metrics, Verdict, judge


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
        mine = [i for i, (_, part) in enumerate(parts) if part.file.modality == modality.name]
        for i in mine:
            rows[i][metrics[i].features < modality.min_features] = FEW_FEATURES
            rows[i][metrics[i].counts == 0] = EMPTY
        leads = [np.flatnonzero(~led[parts[i][0].name][parts[i][1].cells]) for i in mine]
        verdict = _judge([parts[i] for i in mine], [metrics[i] for i in mine], leads, modality, qc, there)
        if verdict is None:
            continue
        found = np.split(verdict.reason, np.cumsum([len(own) for own in leads])[:-1])
        for i, own, reason in zip(mine, leads, found, strict=True):
            group, part = parts[i]
            little = np.isin(reason, (EMPTY, FEW_FEATURES, FEW_COUNTS))
            rows[i][own[little]] = reason[little]
            at, reason = part.cells[own[~little]], reason[~little]
            cells[group.name][at] = reason
            digests[group.name][at] = metrics[i].digest[own[~little]]
            led[group.name][at] = True
        judged.append({"modality": modality.name, "groups": verdict.groups, "edges": verdict.edges})
    for (group, part), reason in zip(parts, rows, strict=True):
        of_cell = cells[group.name][part.cells]
        reason[:] = np.where((of_cell == LABEL) | (reason == KEPT), of_cell, reason)
    return Verdicts(rows=rows, cells=cells, digests=digests, judged=judged)


def _judge(
    parts: Sequence[tuple[Group, Part]],
    metrics: Sequence[Metrics],
    leads: Sequence[np.ndarray],
    modality: Modality,
    qc: QC,
    there: tuple[np.ndarray, np.ndarray] | None,
) -> Verdict | None:
    """The verdict on the rows `leads` of each part, one after the other; None if there are none."""
    if not any(len(own) for own in leads):
        return None
    owners = [np.full(len(own), group.name, object) for (group, _), own in zip(parts, leads, strict=True)]
    assays = [group.about["assay"][part.cells[own]] for (group, part), own in zip(parts, leads, strict=True)]
    keys = pd.MultiIndex.from_arrays([np.concatenate(owners), np.concatenate(assays)])
    codes, found = pd.factorize(keys)
    whole = Metrics.joined(
        Metrics(counts=m.counts[own], features=m.features[own], mito=m.mito[own], digest=m.digest[own])
        for m, own in zip(metrics, leads, strict=True)
    )
    verdict = judge(
        whole,
        codes,
        [", ".join(filter(None, key)) for key in found],
        np.zeros(len(whole), bool),
        qc,
        min_features=modality.min_features,
        held=_among(whole, *there) if there else None,
    )
    for entry, (dataset, assay) in zip(verdict.groups, found, strict=True):
        entry |= {"dataset": dataset, "assay": assay}
    return verdict


def _among(metrics: Metrics, digest: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Which cells are among those of `digest` and `depth`, bool [cells]."""
    known = pd.MultiIndex.from_arrays([digest, depth])
    mine = pd.MultiIndex.from_arrays([metrics.digest, metrics.counts])
    return np.asarray(mine.isin(known)) & (metrics.digest != 0)
