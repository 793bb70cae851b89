"""Which cells stay: limits on counts, features and mitochondrial share, outliers, duplicates.

All of it works on a few numbers a cell, so an atlas is judged at once, after its counts were read
in pieces. Every cell gets exactly one reason, the first of REASONS that applies: drops add up.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

REASONS = (
    "kept",
    "label",
    "empty",
    "too_few_features",
    "too_few_counts",
    "mitochondrial",
    "outlier_counts",
    "outlier_features",
    "outlier_mitochondrial",
    "duplicate",
)
"""What becomes of a cell, in the order in which it is asked; "label" is what the caller dropped before."""
(
    KEPT,
    LABEL,
    EMPTY,
    FEW_FEATURES,
    FEW_COUNTS,
    MITOCHONDRIAL,
    OUT_COUNTS,
    OUT_FEATURES,
    OUT_MITOCHONDRIAL,
    DUPLICATE,
) = range(len(REASONS))

TELLING = 40.0
"""Surprise in nats that a cell's counts must hold to be looked for elsewhere. Ten million cells make
exp(32) pairs: the chance that any two of them are alike by chance is then below one in a thousand."""
STEPS = 1000
"""A nat in the integers that surprise is summed in, so that sums are exact."""

COUNT_EDGES = np.unique(np.round(10.0 ** (np.arange(81) / 10)).astype(np.int64))
"""Lower edges of the bins of counts and features, ten a decade; below the first are cells without any."""
SHARE_BINS = 100
"""Bins of the mitochondrial share, each a hundredth wide."""


@dataclass(frozen=True, kw_only=True)
class QC:
    """Which cells are dropped, and reported, beside those with too few features."""

    min_counts: int = 1
    """Cells with fewer counts are dropped."""
    max_mito: float = 1.0
    """Cells with a larger share of mitochondrial counts are dropped; 1 drops none."""
    mads: float = 5.0
    """Median absolute deviations beyond which a cell is an outlier of its data set and assay: in
    log counts and log features on both sides, in mitochondrial share above. 0 drops none."""
    min_group: int = 50
    """Data sets and assays with fewer cells are not looked through for outliers."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What is done with cells whose counts are, feature by feature, those of an earlier cell."""

    def __post_init__(self) -> None:
        if self.min_counts < 1:
            raise ValueError(f"min_counts is {self.min_counts}, but cells without a count are never kept")
        if not 0 <= self.max_mito <= 1:
            raise ValueError(f"max_mito is {self.max_mito}, but it is a share: write 0.1 for 10 %")
        if not (self.mads == 0 or 1 <= self.mads < float("inf")):
            raise ValueError(
                f"mads is {self.mads}; it is 1 or more, usually 3 to 5, or 0 to drop no outliers"
            )
        if self.min_group < 2:
            raise ValueError(f"min_group is {self.min_group}, but the spread of fewer than 2 cells is none")
        if self.duplicates not in ("drop", "keep"):
            raise ValueError(f"duplicates is {self.duplicates!r}: write drop or keep")


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What is known of the counts of each cell in one modality. Arrays are [cells]."""

    counts: np.ndarray
    """Depth over all features, int64."""
    features: np.ndarray
    """Features with a count, int32."""
    mito: np.ndarray
    """Counts in mitochondrial genes, int64; zeros for what is no RNA."""
    digest: np.ndarray
    """Hash of the cell's counts, uint64; see `compiled.measured`."""

    def __len__(self) -> int:
        return len(self.counts)

    @staticmethod
    def joined(parts: Iterable["Metrics"]) -> "Metrics":
        """The cells of all parts, in order. At least one part."""
        own = list(parts)
        names = [field.name for field in fields(Metrics)]
        return Metrics(**{name: np.concatenate([getattr(part, name) for part in own]) for name in names})


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `judge` found."""

    reason: np.ndarray
    """Index into REASONS, uint8 [cells]; 0 for cells that stay."""
    groups: list[dict[str, Any]]
    """For each group, as plain JSON: its `cells`, how many of them for each `reason`, the `limits`
    applied, how many were kept `uncompared` for want of counts, and histograms `before` and `after`."""
    edges: dict[str, list[float]]
    """Lower edges of the histograms' bins, by metric."""


def name_hashes(names: Iterable[str]) -> np.ndarray:
    """A hash of each name, uint64 [names], the same in every file and on every machine."""
    joined = b"".join(hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(joined, "<u8").astype(np.uint64)


def _surprise() -> np.ndarray:
    """-log of the chance that a Poisson count of mean c is c, in nats / STEPS, for each c below 1,000."""
    count = np.arange(1, 1000, dtype=np.float64)
    nats = count + np.cumsum(np.log(count)) - count * np.log(count)
    return np.concatenate([[0], np.round(nats * STEPS)]).astype(np.int64)


SURPRISE = _surprise()


def duplicates(
    digest: np.ndarray, counts: np.ndarray, features: np.ndarray, order: np.ndarray | None = None
) -> np.ndarray:
    """Which cells are an earlier one again, bool [cells]: all but the first of those alike.

    Alike are cells with the same digest, depth and number of features; none is that has the digest
    0. First is the lowest in `order`, int [cells], each value once; else the first in the arrays.
    Takes about 24 bytes a cell.
    """
    found = np.zeros(len(digest), bool)
    by_digest = np.argsort(digest, kind="stable")
    ordered = digest[by_digest]
    same = ordered[1:] == ordered[:-1]
    alike = np.zeros(len(digest), bool)
    alike[1:] |= same
    alike[:-1] |= same
    some = by_digest[alike & (ordered != 0)]
    if not len(some):
        return found
    rank = some if order is None else order[some]
    some = some[np.lexsort((rank, features[some], counts[some], digest[some]))]
    again = np.ones(len(some) - 1, bool)
    for values in (digest, counts, features):
        again &= values[some[1:]] == values[some[:-1]]
    found[some[1:][again]] = True
    return found


def judge(
    metrics: Metrics,
    groups: np.ndarray,
    names: Sequence[str],
    out: np.ndarray,
    qc: QC,
    *,
    min_features: int = 1,
    order: np.ndarray | None = None,
    held: np.ndarray | None = None,
) -> Verdict:
    """The reason of every cell of one modality, and what was applied.

    `groups` is the index into `names` of each cell's data set and assay, int [cells]; `out` are the
    cells that the caller dropped, bool [cells]. Outliers are told by the spread of those cells of
    their group that pass the fixed limits; a group with fewer than `qc.min_group` of these, and a
    metric whose deviation is 0, drop none. Duplicates are told last, over all groups: the first cell, by
    `order` or else in the arrays, of those that pass everything before stays, unless it is `held`,
    bool [cells]: alike to a cell that the caller has already.

    The deviation is the median absolute one as it is, without the factor 1.4826.
    Source: Heumos 2023, best practices, doi:10.1038/s41576-023-00586-w; there the mitochondrial
    share has a limit of 3 deviations or 8 %, here that of the other metrics, or `max_mito`.
    """
    reason = np.zeros(len(metrics), np.uint8)
    fixed = {
        LABEL: out,
        EMPTY: metrics.counts == 0,
        FEW_FEATURES: metrics.features < min_features,
        FEW_COUNTS: metrics.counts < qc.min_counts,
        MITOCHONDRIAL: _share(metrics, slice(None)) > qc.max_mito,
    }
    for number, applies in fixed.items():
        reason[(reason == KEPT) & applies] = number
    rows = _by_group(groups, len(names))
    limits = [_limits(metrics, own[reason[own] == KEPT], qc) for own in rows]
    for own, limit in zip(rows, limits, strict=True):
        reason[own] = _outliers(metrics, own, reason[own], limit)
    if qc.duplicates == "drop":
        if held is not None:
            reason[(reason == KEPT) & held] = DUPLICATE
        kept = np.flatnonzero(reason == KEPT)
        ranks = None if order is None else order[kept]
        again = duplicates(metrics.digest[kept], metrics.counts[kept], metrics.features[kept], ranks)
        reason[kept[again]] = DUPLICATE
    fixed_limits = {"min_features": min_features, "min_counts": qc.min_counts, "max_mito": qc.max_mito}
    return Verdict(
        reason=reason,
        groups=[
            _about(name, metrics, own, reason[own], fixed_limits | limit)
            for name, own, limit in zip(names, rows, limits, strict=True)
        ],
        edges={
            "counts": [0, *COUNT_EDGES.tolist()],
            "features": [0, *COUNT_EDGES.tolist()],
            "mito": [number / SHARE_BINS for number in range(SHARE_BINS)],
        },
    )


def _by_group(groups: np.ndarray, size: int) -> list[np.ndarray]:
    """The cells of each group, in order."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.searchsorted(groups[order], np.arange(1, size)))


def _limits(metrics: Metrics, rows: np.ndarray, qc: QC) -> dict[str, Any]:
    """The limits beyond which a cell is an outlier, from the cells `rows`; None where there is none.

    Limits of counts and features are whole numbers, both still inside, so that they mean the same
    on every machine, and can be read.
    """
    none: dict[str, Any] = {"counts": None, "features": None, "mito": None, "judged_on": len(rows)}
    if qc.mads == 0 or len(rows) < qc.min_group:
        return none
    middle, spread = _middle(_share(metrics, rows))
    return none | {
        "counts": _inside(metrics.counts[rows], qc.mads),
        "features": _inside(metrics.features[rows], qc.mads),
        "mito": middle + qc.mads * spread if spread > 0 else None,
    }


def _share(metrics: Metrics, rows: np.ndarray | slice) -> np.ndarray:
    """Share of mitochondrial counts of the cells `rows`; 0 for empty ones."""
    return metrics.mito[rows] / np.maximum(metrics.counts[rows], 1)


def _middle(values: np.ndarray) -> tuple[float, float]:
    """Median, and median absolute deviation from it."""
    middle = float(np.median(values))
    return middle, float(np.median(np.abs(values - middle)))


def _inside(values: np.ndarray, mads: float) -> list[int] | None:
    """Lowest and highest of the whole numbers within `mads` deviations of the median, by log(1 + value)."""
    middle, spread = _middle(np.log1p(values.astype(np.float64)))
    if spread < 1e-9:  # all the same, but for rounding
        return None
    low, high = np.expm1([middle - mads * spread, min(middle + mads * spread, 42.0)])
    return [max(0, int(np.ceil(np.round(low, 6)))), int(np.floor(np.round(high, 6)))]


def _outliers(metrics: Metrics, rows: np.ndarray, reason: np.ndarray, limits: dict[str, Any]) -> np.ndarray:
    """`reason` of the cells `rows`, where outliers among those that were kept have theirs."""
    reason = reason.copy()
    for number, name in ((OUT_COUNTS, "counts"), (OUT_FEATURES, "features")):
        if limits[name] is not None:
            values = getattr(metrics, name)[rows]
            odd = (values < limits[name][0]) | (values > limits[name][1])
            reason[(reason == KEPT) & odd] = number
    if limits["mito"] is not None:
        reason[(reason == KEPT) & (_share(metrics, rows) > limits["mito"])] = OUT_MITOCHONDRIAL
    return reason


def _about(
    name: str, metrics: Metrics, rows: np.ndarray, reason: np.ndarray, limits: dict[str, Any]
) -> dict[str, Any]:
    found = np.bincount(reason, minlength=len(REASONS)).tolist()
    kept = rows[reason == KEPT]
    return {
        "group": name,
        "cells": len(rows),
        "reasons": {REASONS[number]: count for number, count in enumerate(found) if count},
        "limits": limits,
        "uncompared": int((metrics.digest[kept] == 0).sum()),
        "before": _histograms(metrics, rows[reason != LABEL]),
        "after": _histograms(metrics, kept),
    }


def _histograms(metrics: Metrics, rows: np.ndarray) -> dict[str, list[int]]:
    """Cells in each bin, by metric. Cells without a count have no mitochondrial share."""
    found = {}
    for name in ("counts", "features"):
        bins = np.searchsorted(COUNT_EDGES, getattr(metrics, name)[rows], side="right")
        found[name] = np.bincount(bins, minlength=len(COUNT_EDGES) + 1).tolist()
    some = rows[metrics.counts[rows] > 0]
    bins = np.minimum(metrics.mito[some] * SHARE_BINS // metrics.counts[some], SHARE_BINS - 1)
    found["mito"] = np.bincount(bins, minlength=SHARE_BINS).tolist()
    return found
