"""The plan of an ingest: which cells and features there are, before any count is read.

Reads names and what is known of each cell out of every file; writes nothing.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from cellray.data.atlas import FIELDS, File, files
from cellray.data.formats import opened
from cellray.data.lineage import identity
from cellray.data.modalities import Modality, normalise_names
from cellray.data.reading import Source, known, modality_keys, open_source
from cellray.train.recipe import Recipe

VERSION = 1
"""Of what ingest makes out of the same files and settings."""
CELLXGENE = {
    "label": "cell_type",
    "donor": "donor_id",
    "assay": "assay",
    "species": "organism",
    "tissue": "tissue",
}
"""obs columns that are used of a file of the CELLxGENE schema where the atlas says nothing."""
SPECIES = {"Homo sapiens": "human", "Mus musculus": "mouse"}
"""One spelling for the organisms that the CELLxGENE schema names in Latin."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One modality of one file."""

    file: File
    """Its row of the atlas, modality and layer filled in."""
    cells: np.ndarray
    """Which cell of the data set each row is, int64 [rows]."""
    features: np.ndarray
    """Names of the features in the vocabulary's spelling, each once, str [features]."""
    symbols: np.ndarray
    """Second names of the features, str [features]."""
    columns: np.ndarray
    """Which feature each column of the file is, int32 [columns]."""
    stored: int
    """Numbers stored in the file for it."""
    step: int
    """Rows that one task reads."""

    @property
    def units(self) -> list[tuple[int, int]]:
        """Row ranges, one a task."""
        return [(i, min(i + self.step, len(self.cells))) for i in range(0, len(self.cells), self.step)]


@dataclass(frozen=True, kw_only=True)
class Group:
    """One data set: its cells, what is known of them, and the files their counts are in."""

    name: str
    cells: np.ndarray
    """Cell names, str [cells]: those of the first file in its order, then what further files add."""
    about: dict[str, np.ndarray]
    """Each of FIELDS, str [cells], "" where it is not known."""
    parts: tuple[Part, ...]
    label_from: str
    """The modality that the labels were made from, "" if none."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an ingest will read."""

    modalities: tuple[Modality, ...]
    """Those that some file has, in the order of the recipe."""
    groups: tuple[Group, ...]
    failed: tuple[dict[str, str], ...]
    """Data sets that cannot be read: `dataset` and `reason`."""
    dropped: dict[str, np.ndarray]
    """Data set -> cells dropped for their label, bool [cells]."""
    inputs: dict[str, Any]
    """All that the store depends on: settings, rows of the atlas, what the files hold."""

    @property
    def fingerprint(self) -> str:
        """sha256 of `inputs`, but for where the files lie."""
        rows = [{k: v for k, v in row.items() if k != "url"} for row in self.inputs["files"]]
        return hashlib.sha256(json.dumps(self.inputs | {"files": rows}, sort_keys=True).encode()).hexdigest()


def survey(recipe: Recipe) -> Plan:
    """The plan for the recipe's atlas. ValueError names the file that cannot be taken as it is.

    With `ingest.allow_failed_files` the data set of such a file is left out and listed instead.
    """
    rows = files(recipe)
    groups, failed = [], []
    for name in dict.fromkeys(row.dataset for row in rows):
        try:
            groups.append(_group(name, [row for row in rows if row.dataset == name], recipe))
        except ValueError as error:
            if not recipe.ingest.allow_failed_files:
                raise
            failed.append({"dataset": name, "reason": str(error)})
    if not groups:
        raise ValueError("no data set of the atlas can be read: " + "; ".join(f["reason"] for f in failed))
    found = {part.file.modality for group in groups for part in group.parts}
    modalities = tuple(m for m in recipe.modalities if m.name in found)
    return Plan(
        modalities=modalities,
        groups=tuple(groups),
        failed=tuple(failed),
        dropped=_dropped(groups, recipe.ingest.drop_labels),
        inputs=_inputs(recipe, modalities, rows),
    )


def _dropped(groups: Sequence[Group], labels: Sequence[str]) -> dict[str, np.ndarray]:
    """Cells that have one of `labels`. ValueError for a label that no cell has."""
    known = sorted({str(label) for group in groups for label in set(group.about["label"])} - {""})
    for label in labels:
        if label not in known:
            raise ValueError(
                f"ingest.drop_labels has {label!r}, but no cell has this label; there are "
                f"{', '.join(known) or 'no labels'}"
            )
    return {group.name: pd.Series(group.about["label"]).isin(labels).to_numpy() for group in groups}


def _inputs(recipe: Recipe, modalities: Sequence[Modality], rows: Sequence[File]) -> dict[str, Any]:
    identities = {url: identity(url) for url in dict.fromkeys(row.url for row in rows)}
    columns = ("dataset", "modality", *FIELDS, "layer", "names", "label_from")
    return {
        "version": VERSION,
        "ingest": {
            "drop_labels": sorted(recipe.ingest.drop_labels),
            "min_cells": recipe.ingest.min_cells,
            "shard_bytes": recipe.ingest.shard_bytes,
        },
        "modalities": [
            {key: getattr(m, key) for key in ("name", "features", "scale", "min_features")}
            for m in modalities
        ],
        "files": [
            {"url": row.given} | {name: getattr(row, name) for name in columns} | identities[row.url]
            for row in rows
        ],
    }


def _group(name: str, rows: Sequence[File], recipe: Recipe) -> Group:
    """One data set, out of the names and columns in its files."""
    cells = pd.Index([], dtype=object)
    parts: list[Part] = []
    values: list[dict[str, np.ndarray | ValueError]] = []
    for row in rows:
        try:
            for file in _expand(row, recipe):
                with ExitStack() as stack:
                    source, file = _open(file, stack)
                    names = pd.Index(source.cell_names, dtype=object)
                    cells = cells.append(names[~names.isin(cells)])
                    parts.append(_part(file, source, cells.get_indexer(names), recipe))
                    values.append({field: _values(source, getattr(file, field)) for field in FIELDS})
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
    _check_cells(name, parts, cells)
    about = {field: _merge(field, parts, [v[field] for v in values], cells) for field in FIELDS}
    about["species"] = pd.Series(about["species"]).replace(SPECIES).to_numpy(dtype=object)
    origins = sorted({row.label_from for row in rows if row.label_from})
    if len(origins) > 1:
        raise ValueError(f"data set {name!r} has label_from {' and '.join(origins)}: it can be one only")
    return Group(
        name=name,
        cells=cells.to_numpy(dtype=object),
        about=about,
        parts=tuple(parts),
        label_from="".join(origins),
    )


def _expand(row: File, recipe: Recipe) -> list[File]:
    """The row, once for each modality it stands for."""
    if row.modality:
        return [row]
    modalities = [m.name for m in recipe.modalities]
    with opened(row.url) as root:
        keys = modality_keys(root)
    for key in keys:
        if known(key) not in modalities:
            raise ValueError(
                f"{row.url} holds {', '.join(keys)}; {key!r} is none of {', '.join(modalities)}. "
                "Write a row, with its modality, for each that is to be read."
            )
    return [replace(row, modality=name) for name in [known(key) for key in keys] or ["rna"]]


def _open(file: File, stack: ExitStack) -> tuple[Source, File]:
    """The file opened, and its row with what the CELLxGENE schema adds."""
    settings = {"modality": file.modality, "layer": file.layer, "names": file.names}
    source = stack.enter_context(open_source(file.url, **settings))
    if not len(source.cell_names) or not len(source.feature_names):
        raise ValueError(
            f"{file.url} has {len(source.cell_names):,} cells and {len(source.feature_names):,} features: "
            "there is nothing to read"
        )
    if file.modality == "rna" and source.looks_like_peaks:
        raise ValueError(
            f"{file.url} holds peaks such as {source.feature_names[0]!r}, not genes: write modality atac"
        )
    if not source.cellxgene:
        return source, file
    empty = {field: column for field, column in CELLXGENE.items() if not getattr(file, field)}
    file = replace(file, **{k: v for k, v in empty.items() if v in source.obs_columns})
    if file.layer or not source.has_raw:
        return source, file
    file = replace(file, layer="raw")
    return stack.enter_context(open_source(file.url, **(settings | {"layer": "raw"}))), file


def _part(file: File, source: Source, cells: np.ndarray, recipe: Recipe) -> Part:
    kind = next(m.features for m in recipe.modalities if m.name == file.modality)
    names = np.array(normalise_names(source.feature_names.tolist(), kind), dtype=object)
    columns, features = pd.factorize(names)
    first = np.unique(columns, return_index=True)[1]
    return Part(
        file=file,
        cells=cells,
        features=features,
        symbols=source.symbols[first],
        columns=columns.astype(np.int32),
        stored=source.stored,
        step=source.step(recipe.ingest.unit_cells),
    )


def _values(source: Source, setting: str) -> np.ndarray | ValueError:
    """What `setting`, a column or =VALUE or "", says of each cell; an error to raise if nobody has it."""
    if not setting or setting.startswith("="):
        return np.full(len(source.cell_names), setting[1:], object)
    try:
        return source.obs([setting])[setting]
    except ValueError as error:
        return error


def _merge(
    field: str, parts: Sequence[Part], values: Sequence[np.ndarray | ValueError], cells: pd.Index
) -> np.ndarray:
    """One value a cell out of what all files say of it, str [cells].

    A column has to be in one file at least of those whose rows name it.
    """
    merged = np.full(len(cells), "", object)
    setter = np.full(len(cells), -1)
    seen = {
        getattr(p.file, field) for p, v in zip(parts, values, strict=True) if not isinstance(v, ValueError)
    }
    for number, (part, value) in enumerate(zip(parts, values, strict=True)):
        if isinstance(value, ValueError):
            if getattr(part.file, field) not in seen:
                raise ValueError(f"{part.file.where}: {field}: {value}")
            continue
        old = merged[part.cells]
        odd = np.flatnonzero((old != "") & (value != "") & (old != value))
        if len(odd):
            at = odd[0]
            other = parts[setter[part.cells[at]]].file
            raise ValueError(
                f"{len(odd):,} cells have another {field} in {part.file.url} than in {other.url}, such as "
                f"{cells[part.cells[at]]}: {value[at]!r} and {old[at]!r}. "
                f"Leave {field} empty in the row of one of the files."
            )
        fresh = part.cells[(old == "") & (value != "")]
        merged[fresh] = value[(old == "") & (value != "")]
        setter[fresh] = number
    return merged


def _check_cells(name: str, parts: Sequence[Part], cells: pd.Index) -> None:
    """ValueError where a cell has a modality twice, or a file's cells are in no file of another modality.

    The first file's modality may have files alone; those of the others have to match something.
    """
    owner = {part.file.modality: np.full(len(cells), -1) for part in parts}
    for number, part in enumerate(parts):
        mine = owner[part.file.modality]
        twice = part.cells[mine[part.cells] >= 0]
        if len(twice):
            other = parts[mine[twice[0]]]
            raise ValueError(
                f"{len(twice):,} cells of {part.file.url} are in {other.file.url} too, such as "
                f"{cells[twice[0]]!r}: data set {name!r} would have their {part.file.modality} twice. "
                "Give the files cell names of their own, or make them two data sets."
            )
        mine[part.cells] = number
    first = parts[0].file.modality
    paired = {modality: _paired(owner, modality) for modality in owner}
    for part in sorted(parts, key=lambda part: part.file.modality == first):
        modality = part.file.modality
        matched = paired[modality] if modality == first else paired[modality][part.cells]
        if len(owner) == 1 or matched.any():
            continue
        other = next(p for p in parts if p.file.modality != modality)
        raise ValueError(
            f"no cell of {part.file.url} is in another file of data set {name!r}: its cells are named like "
            f"{cells[part.cells[0]]!r}, those of {other.file.url} like {cells[other.cells[0]]!r}. "
            "Make the names alike, or, if the cells are others, give the file a data set of its own."
        )


def _paired(owner: dict[str, np.ndarray], modality: str) -> np.ndarray:
    """Cells that have `modality` and another one, bool [cells]."""
    others = [mine >= 0 for name, mine in owner.items() if name != modality]
    return (owner[modality] >= 0) & np.any(others, axis=0) if others else owner[modality] >= 0
