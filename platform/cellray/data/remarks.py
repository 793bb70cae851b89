"""What in an ingest report is worth a look: losses, names nobody knows, what was not checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from cellray.data.genes import UNRESOLVED

LOST = 0.2
"""Share of cells, counts, genes or peaks from which on a loss is remarked upon."""
TELLING = ("ensembl id", "versioned id", "symbol", "alias", "entrez id", "second name", "retired id")
"""Kinds of gene names that speak for a species."""
TOPICS = {
    "cells": f"lost more than {100 * LOST:.0f} % of the cells",
    "counts": f"lost more than {100 * LOST:.0f} % of the counts of a modality",
    "genes": f"more than {100 * LOST:.0f} % of the genes are in no gene table",
    "peaks": f"more than {100 * LOST:.0f} % of the peaks are not in the genomic vocabulary",
    "species": "the species is unknown, or only declared: no gene names confirm it",
    "features": "features were dropped",
    "uncompared": "cells hold too few counts to be told from duplicates, and were kept",
}
"""What a remark is about -> the sentence over such remarks. In the order of the page."""


@dataclass(frozen=True)
class Remark:
    """One thing about one data set."""

    dataset: str
    topic: str
    """One of TOPICS."""
    share: float
    """How much of it is concerned: the largest come first."""
    text: str


class Judged(NamedTuple):
    """A group of cells that were judged together, by one modality."""

    modality: str
    group: Mapping[str, Any]
    edges: Mapping[str, list[float]]


def judged(report: Mapping[str, Any]) -> dict[str, list[Judged]]:
    """Data set -> the groups of `qc.judge` that are of it; those of none, if there are any, under ""."""
    names = {entry["name"] for entry in report["datasets"]}
    found: dict[str, list[Judged]] = {}
    for entry in report["quality"]:
        for group in entry["groups"]:
            owner = group["dataset"] if group["dataset"] in names else ""
            found.setdefault(owner, []).append(Judged(entry["modality"], group, entry["edges"]))
    return found


def remarks(report: Mapping[str, Any]) -> list[Remark]:
    """All there are, by topic and then by how much of a data set is concerned."""
    groups = judged(report)
    found = [
        remark for entry in report["datasets"] for remark in _of_dataset(entry, groups.get(entry["name"], []))
    ]
    order = list(TOPICS)
    return sorted(found, key=lambda remark: (order.index(remark.topic), -remark.share))


def _of_dataset(entry: Mapping[str, Any], groups: Iterable[Judged]) -> Iterable[Remark]:
    name = entry["name"]
    if (lost := _lost(entry, "cells")) > LOST:
        out = f"{entry['cells_in'] - entry['cells_kept']:,} of {entry['cells_in']:,} cells"
        yield Remark(name, "cells", lost, f"{out}, {percent(lost)}: {reasons(entry['dropped'])}")
    for modality, part in entry["modalities"].items():
        yield from _of_modality(name, modality, part)
    if not entry["species"]:
        yield Remark(name, "species", 1.0, "unknown")
    elif entry["species_from"] != "genes":
        heard = _telling(entry)
        text = f"{', '.join(entry['species'])}, declared; {percent(heard)} of the names speak for a species"
        yield Remark(name, "species", 1 - heard, text)
    if cells := sum(group["uncompared"] for _, group, _ in groups):
        share = cells / max(entry["cells_kept"], 1)
        yield Remark(name, "uncompared", share, f"{cells:,} cells, {percent(share)} of those kept")


def _of_modality(name: str, modality: str, part: Mapping[str, Any]) -> Iterable[Remark]:
    if (lost := _lost(part, "counts")) > LOST:
        out = f"{part['counts_in'] - part['counts_kept']:,} of {part['counts_in']:,} counts"
        text = f"{modality}: {out}, {percent(lost)}: {reasons(part['counts_dropped'])}"
        yield Remark(name, "counts", lost, text)
    columns, unresolved = gene_columns(part["names"])
    if columns and unresolved / columns > LOST:
        text = f"{modality}: {unresolved:,} of {columns:,} genes, {percent(unresolved / columns)}"
        yield Remark(name, "genes", unresolved / columns, text)
    peaks = sum(summary.get("peaks", 0) for summary in part["names"])
    away = peaks - sum(summary.get("mapped", 0) for summary in part["names"])
    if peaks and away / peaks > LOST:
        text = f"{modality}: {away:,} of {peaks:,} peaks, {percent(away / peaks)}"
        yield Remark(name, "peaks", away / peaks, text)
    if (lost := _lost(part, "features")) > 0:
        out = f"{part['features_in'] - part['features_kept']:,} of {part['features_in']:,}"
        text = f"{modality}: {out}, {percent(lost)}: {reasons(part['features_dropped'])}"
        yield Remark(name, "features", lost, text)


def gene_columns(names: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Columns of the files of a gene modality, and those among them that are no gene of the tables."""
    kinds = [(summary["columns"], summary["kinds"]) for summary in names if "kinds" in summary]
    return sum(columns for columns, _ in kinds), sum(own.get(k, 0) for _, own in kinds for k in UNRESOLVED)


def _telling(entry: Mapping[str, Any]) -> float:
    """Largest share, over files, of gene names that speak for a species; 0 if there are no genes."""
    shares = [
        sum(summary["kinds"].get(kind, 0) for kind in TELLING) / max(summary["columns"], 1)
        for part in entry["modalities"].values()
        for summary in part["names"]
        if "kinds" in summary
    ]
    return max(shares, default=0.0)


def _lost(part: Mapping[str, Any], what: str) -> float:
    return (part[f"{what}_in"] - part[f"{what}_kept"]) / max(part[f"{what}_in"], 1)


def reasons(dropped: Mapping[str, int]) -> str:
    """`too few counts 3, duplicate 1`: the largest first, without those that dropped nothing."""
    ranked = sorted(dropped.items(), key=lambda item: -item[1])
    return ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in ranked if number)


def percent(share: float) -> str:
    """In percent, never rounded to all or nothing that it is not."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if 0.999 < share < 1 else f"{100 * share:.1f} %"
