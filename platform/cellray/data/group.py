"""One data set of the atlas: its cells and features, out of the names and columns in its files."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from cellray.data.atlas import FIELDS, File
from cellray.data.formats import naming, opened
from cellray.data.genes import Genes
from cellray.data.harmony import Features, Harmony, harmony
from cellray.data.reading import Source, known, modality_keys, open_source
from cellray.data.texts import Texts, common
from cellray.data.tokens import narrow
from cellray.train.recipe import Recipe

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
    """Which cell of the data set each row is, of the narrowest unsigned type [rows]."""
    features: Features
    """What its columns count."""
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
    cells: pa.LargeStringArray
    """Cell names [cells]: those of the first file in its order, then what further files add."""
    about: dict[str, Texts]
    """Each of FIELDS [cells], "" where it is not known."""
    species: str
    """The one species of all its cells, "" if nobody knows."""
    species_from: str
    """How that is known: `genes`, `atlas`, or ""."""
    parts: tuple[Part, ...]
    label_from: str
    """The modality that the labels were made from, "" if none."""


def survey_group(name: str, rows: Sequence[File], recipe: Recipe) -> Group:
    """One data set, out of the names and columns in its files."""
    how = harmony(recipe.ingest.genes, recipe.ingest.peaks)
    cells = pd.Index([], dtype=object)
    read: list[_Read] = []
    values: list[dict[str, Texts | ValueError]] = []
    with ExitStack() as stack:
        for row in rows:
            try:
                for file in _expand(row, recipe):
                    source, file = _open(file, stack)
                    names = pd.Index(source.cell_names, dtype=object)
                    if read:
                        cells = cells.append(names[~names.isin(cells)])
                        read.append(_Read(file, source, cells.get_indexer(names)))
                    else:  # most data sets are one file, whose names nothing has to be looked up by
                        cells = names
                        read.append(_Read(file, source, np.arange(len(names))))
                    values.append({field: _values(source, getattr(file, field)) for field in FIELDS})
            except ValueError as error:
                raise ValueError(f"{row.where}: {error}") from error
        _check_cells(name, read, cells)
        about = {field: _merge(field, read, [v[field] for v in values], cells) for field in FIELDS}
        species, species_from = _species(name, about["species"], read, how)
        about["species"] = Texts.full(len(cells), species)
        modalities = {m.name: m for m in recipe.modalities}
        parts = [
            Part(
                file=file,
                cells=at.astype(narrow(len(cells))),
                features=how.features(source, modalities[file.modality], species),
                stored=source.stored,
                step=source.step(recipe.ingest.unit_cells),
            )
            for file, source, at in read
        ]
    origins = sorted({row.label_from for row in rows if row.label_from})
    if len(origins) > 1:
        raise ValueError(f"data set {name!r} has label_from {' and '.join(origins)}: it can be one only")
    return Group(
        name=name,
        cells=pa.array(cells, pa.large_string()),
        about=about,
        species=species,
        species_from=species_from,
        parts=tuple(parts),
        label_from="".join(origins),
    )


class _Read(NamedTuple):
    """One modality of one open file."""

    file: File
    source: Source
    cells: np.ndarray
    """Which cell of the data set each row is, int64 [rows]."""


def _species(name: str, said: Texts, read: Sequence["_Read"], how: Harmony) -> tuple[str, str]:
    """The species of a data set, and how it is known: by its genes, which the atlas must not contradict."""
    told = sorted({SPECIES.get(species, species) for species in said.values} - {""})
    if len(told) > 1:
        raise ValueError(
            f"data set {name!r} holds cells of {' and '.join(told)}: make a data set of each, from files of "
            "their own"
        )
    by_genes = False
    for file, source, _ in read:
        if file.modality != "rna":
            continue
        found = how.genes.detect(source.feature_names, source.symbols)
        if found.verdict == "mixed":
            raise ValueError(
                f"{file.url}: {found.reason}: make a file of each species, and a data set of each"
            )
        by_ids = Genes().detect(source.feature_names, source.symbols).verdict == "sure"
        if found.verdict == "sure" and told and not by_ids and told[0] not in how.genes.tables:
            continue  # a species that has no table may look like one that has
        if found.verdict == "sure" and told and told != [found.species]:
            raise ValueError(
                f"{file.where}: the species of data set {name!r} is said to be {told[0]}, but the genes in "
                f"{file.url} are of {found.species}: {found.reason}"
            )
        if found.verdict == "sure":
            told, by_genes = [found.species], True
    return "".join(told), "genes" if by_genes else "atlas" if told else ""


def _expand(row: File, recipe: Recipe) -> list[File]:
    """The row, once for each modality it stands for."""
    if row.modality:
        return [row]
    modalities = [m.name for m in recipe.modalities]
    with opened(row.url) as root, naming(row.url):
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


def _values(source: Source, setting: str) -> Texts | ValueError:
    """What `setting`, a column or =VALUE or "", says of each cell; an error to raise if nobody has it."""
    if not setting or setting.startswith("="):
        return Texts.full(len(source.cell_names), setting[1:])
    try:
        return Texts.of(source.obs([setting])[setting])
    except ValueError as error:
        return error


def _merge(
    field: str, parts: Sequence["_Read"], values: Sequence[Texts | ValueError], cells: pd.Index
) -> Texts:
    """One value a cell out of what all files say of it [cells].

    A column has to be in one file at least of those whose rows name it.
    """
    empty = Texts.full(1, "")
    words, codes = common([empty, *(v if isinstance(v, Texts) else empty for v in values)])
    merged = np.zeros(len(cells), codes[0].dtype)  # 0 is "", which sorts first
    setter = np.full(len(cells), -1)
    seen = {
        getattr(p.file, field) for p, v in zip(parts, values, strict=True) if not isinstance(v, ValueError)
    }
    for number, (part, texts) in enumerate(zip(parts, values, strict=True)):
        if isinstance(texts, ValueError):
            if getattr(part.file, field) not in seen:
                raise ValueError(f"{part.file.where}: {field}: {texts}")
            continue
        value = codes[number + 1][texts.codes]
        old = merged[part.cells]
        odd = np.flatnonzero((old != 0) & (value != 0) & (old != value))
        if len(odd):
            at = odd[0]
            other = parts[setter[part.cells[at]]].file
            raise ValueError(
                f"{len(odd):,} cells have another {field} in {part.file.url} than in {other.url}, such as "
                f"{cells[part.cells[at]]}: {words[value[at]]!r} and {words[old[at]]!r}. "
                f"Leave {field} empty in the row of one of the files."
            )
        fresh = (old == 0) & (value != 0)
        merged[part.cells[fresh]] = value[fresh]
        setter[part.cells[fresh]] = number
    return Texts.coded(merged, words)


def _check_cells(name: str, parts: Sequence["_Read"], cells: pd.Index) -> None:
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
