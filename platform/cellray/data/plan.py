"""The plan of an ingest: which cells and features there are, before any count is read.

Reads names and what is known of each cell out of every file; writes nothing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cellray.data.atlas import FIELDS, files
from cellray.data.group import Group, survey_group
from cellray.data.harmony import Harmony, harmony
from cellray.data.isolation import isolated_map
from cellray.data.lineage import identity
from cellray.data.modalities import Modality
from cellray.data.texts import Texts
from cellray.train.recipe import Recipe

VERSION = 3
"""Of what ingest makes out of the same files and settings."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an ingest will read."""

    modalities: tuple[Modality, ...]
    """Those that some file has, in the order of the recipe."""
    groups: tuple[Group, ...]
    """The data sets that are to be read."""
    failed: tuple[dict[str, str], ...]
    """Data sets that cannot be read: `dataset` and `reason`."""
    dropped: dict[str, np.ndarray]
    """Data set -> cells dropped for their label, bool [cells]."""
    inputs: dict[str, Any]
    """All that the store depends on: settings, rows of the atlas, what the files hold."""

    @property
    def fingerprint(self) -> str:
        """sha256 of `inputs`, but for where the files lie."""
        return fingerprint(self.inputs)

    def without(self, datasets: Sequence[str]) -> dict[str, Any]:
        """`inputs` but for the rows of `datasets`."""
        return self.inputs | {"files": [f for f in self.inputs["files"] if f["dataset"] not in datasets]}


def fingerprint(inputs: dict[str, Any]) -> str:
    """sha256 of `Plan.inputs`, but for where the files lie."""
    rows = [{k: v for k, v in row.items() if k != "url"} for row in inputs["files"]]
    return hashlib.sha256(json.dumps(inputs | {"files": rows}, sort_keys=True).encode()).hexdigest()


def inputs_of(recipe: Recipe) -> dict[str, Any]:
    """What the store of the recipe's atlas depends on, from settings and the files' content alone."""
    rows = files(recipe)
    identities = {url: identity(url) for url in dict.fromkeys(row.url for row in rows)}
    columns = ("dataset", "modality", *FIELDS, "layer", "names", "label_from")
    settings = {
        "drop_labels": sorted(recipe.ingest.drop_labels),
        "min_cells": recipe.ingest.min_cells,
        "shard_bytes": recipe.ingest.shard_bytes,
        "qc": asdict(recipe.qc),
    }
    if recipe.ingest.unlabelled:  # not in stores that are older than the setting
        settings["unlabelled"] = sorted(recipe.ingest.unlabelled)
    return {
        "version": VERSION,
        "ingest": settings | harmony(recipe.ingest.genes, recipe.ingest.peaks).facts,
        "modalities": [
            {key: getattr(m, key) for key in ("name", "features", "scale", "min_features")}
            for m in recipe.modalities
        ],
        "files": [
            {"url": row.given} | {name: getattr(row, name) for name in columns} | identities[row.url]
            for row in rows
        ],
    }


def survey(
    recipe: Recipe, inputs: dict[str, Any] | None = None, held: Mapping[str, Any] | None = None
) -> Plan:
    """The plan for the recipe's atlas: what a store that has the data sets `held` still lacks.

    `inputs` is `inputs_of(recipe)`, if it is at hand, `held` the ingest report of that store. A data
    set that cannot be read is left out and listed as failed. ValueError if none can be read, and
    for settings that fit no data set.
    """
    rows = files(recipe)
    there = {entry["name"]: entry for entry in held["datasets"]} if held else {}
    names = [name for name in dict.fromkeys(row.dataset for row in rows) if name not in there]
    todo = [(name, [row for row in rows if row.dataset == name], recipe) for name in names]
    found = isolated_map(survey_group, todo, workers=recipe.ingest.readers, names=names)
    groups = [entry for entry in found if isinstance(entry, Group)]
    failed = [
        {"dataset": name, "reason": str(error)}
        for name, error in zip(names, found, strict=True)
        if isinstance(error, ValueError)
    ]
    if not groups and not there:
        raise ValueError("no data set of the atlas can be read: " + "; ".join(f["reason"] for f in failed))
    _check_species(groups, there, harmony(recipe.ingest.genes, recipe.ingest.peaks))
    modalities = {part.file.modality for group in groups for part in group.parts}
    if not there:
        _check_labels(groups, recipe)
    return Plan(
        modalities=tuple(m for m in recipe.modalities if m.name in modalities),
        groups=tuple(_unlabelled(group, recipe.ingest.unlabelled) for group in groups),
        failed=tuple(failed),
        dropped={group.name: _labelled(group, recipe.ingest.drop_labels) for group in groups},
        inputs=inputs or inputs_of(recipe),
    )


def _check_labels(groups: Sequence[Group], recipe: Recipe) -> None:
    """ValueError for a label of the settings that no cell has."""
    known = sorted({label for group in groups for label in group.about["label"].values} - {""})
    for setting in ("drop_labels", "unlabelled"):
        for label in getattr(recipe.ingest, setting):
            if label not in known:
                raise ValueError(
                    f"ingest.{setting} has {label!r}, but no cell has this label; there are "
                    f"{', '.join(known) or 'no labels'}"
                )


def _labelled(group: Group, labels: Sequence[str]) -> np.ndarray:
    """Which cells have one of `labels`, bool [cells]."""
    texts = group.about["label"]
    return np.array([label in labels for label in texts.values], bool)[texts.codes]


def _unlabelled(group: Group, labels: Sequence[str]) -> Group:
    """The group, whose cells with one of `labels` have none."""
    texts = group.about["label"]
    values = ["" if label in labels else label for label in texts.values]
    return replace(group, about=group.about | {"label": Texts.coded(texts.codes, values)})


def _check_species(groups: Sequence[Group], there: Mapping[str, Any], harmony: Harmony) -> None:
    """ValueError where features of two species could pass for each other."""
    owners: dict[str, dict[str, str]] = {"rna": {}, "atac": {}}
    for entry in there.values():
        for modality in owners.keys() & entry["modalities"].keys():
            owners[modality] |= dict.fromkeys(entry["species"], entry["name"])
    for group in groups:
        for part in group.parts:
            if part.file.modality in owners:
                owners[part.file.modality].setdefault(group.species, group.name)
    named = [part.features.about for group in groups for part in group.parts if part.file.modality == "rna"]
    named += [
        about for entry in there.values() for about in entry["modalities"].get("rna", {}).get("names", [])
    ]
    by_ids = all(set(about["kinds"]) <= {"ensembl id", "versioned id"} for about in named)
    if harmony.peaks:
        harmony.peaks.check(owners["atac"])
    for modality, setting, guard in (
        ("rna", "ingest.genes=FOLDER of gene tables with orthologs", bool(harmony.genes.tables) or by_ids),
        ("atac", "ingest.peaks=bins:5000 or a BED file a species", harmony.peaks is not None),
    ):
        found = owners[modality]
        if len(found) > 1 and not guard:
            told = ", ".join(f"{name!r} of {species or 'unknown species'}" for species, name in found.items())
            raise ValueError(
                f"data sets are of several species ({told}), and names of {modality} features do not tell "
                f"them apart: set {setting}, write species in the atlas, or make a store a species"
            )
