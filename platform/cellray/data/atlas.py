"""The atlas: a table with a row for every file, or the settings of a single data set.

Columns of the table (CSV): `dataset` and `url` are needed. `modality` may be empty for a MuData
file, all of whose modalities are then read, and for RNA. `label batch donor assay species tissue`
name columns of obs, or give one value for all cells as `=VALUE`. `layer` says where raw counts
are: empty for X, `raw`, or a layer. `names` is the var column of the feature ids, empty for
var_names. `label_from` names the modality from which the labels were made, if they were.
"""

import csv
import difflib
import io
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, fields

from cellray.data import storage
from cellray.data.store import ABOUT
from cellray.train.recipe import DataSet, Recipe

FIELDS = tuple(name for name in ABOUT if name != "dataset")
"""Columns of the table that say what is known of a cell."""
COLUMNS = ("dataset", "modality", "url", *FIELDS, "layer", "names", "label_from")


@dataclass(frozen=True, kw_only=True)
class File:
    """One row of the atlas: a modality of a data set, in a file that may hold others too."""

    dataset: str
    url: str
    given: str
    """The URL as it was written."""
    where: str
    """Which row or setting this is, for messages."""
    modality: str = ""
    label: str = ""
    batch: str = ""
    donor: str = ""
    assay: str = ""
    species: str = ""
    tissue: str = ""
    layer: str = ""
    names: str = ""
    label_from: str = ""


def files(recipe: Recipe) -> list[File]:
    """The files of a recipe's `atlas` or `dataset`, in order. ValueError where they cannot be meant."""
    names = [m.name for m in recipe.modalities]
    single = recipe.dataset != DataSet()
    if recipe.atlas and single:
        raise ValueError(f"both atlas={recipe.atlas} and dataset.… are set: give one of them")
    if not recipe.atlas and not single:
        raise ValueError(
            "there is nothing to read: set atlas=TABLE.csv, or dataset.rna=FILE for one data set"
        )
    return read_atlas(recipe.atlas, names) if recipe.atlas else from_dataset(recipe.dataset, names)


def from_dataset(dataset: DataSet, modalities: Sequence[str]) -> list[File]:
    """The files of a single data set. `modalities` are those the recipe knows.

    `layer` and `names` are those of the RNA or the MuData file; ATAC and protein files of their
    own are read from X, by var_names. A table can say more.
    """
    _check_name(dataset.name, "dataset.name")
    about = {name: getattr(dataset, name) for name in FIELDS}
    place = {"layer": dataset.layer, "names": dataset.names}
    found = []
    for setting in ("rna", "atac", "protein", "multi"):
        url = getattr(dataset, setting)
        if not url:
            continue
        where = f"dataset.{setting}"
        modality = "" if setting == "multi" else setting
        if modality and modality not in modalities:
            raise ValueError(f"{where} is set, but the recipe knows {', '.join(modalities)} only")
        own = about | (place if setting in ("rna", "multi") else {})
        found.append(
            File(
                dataset=dataset.name,
                modality=modality,
                url=storage.absolute(url),
                given=url,
                where=where,
                **own,
            )
        )
    if not found:
        raise ValueError("the data set has no file: set dataset.rna, .atac, .protein or .multi")
    return found


def read_atlas(url: str, modalities: Sequence[str]) -> list[File]:
    """The rows of the table at `url`. File URLs are relative to the folder the table is in.

    ValueError, naming the table and line: columns or modalities that do not exist, a missing
    value, a row that occurs twice, a table that is missing or empty.
    """
    try:
        text = storage.read_bytes(url).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"atlas table {url} does not exist") from None
    except UnicodeDecodeError:
        raise ValueError(
            f"atlas table {url} is no CSV text. For a single file set dataset.rna=FILE instead of atlas."
        ) from None
    reader = csv.reader(io.StringIO(text))
    header = [name.strip() for name in next(reader, [])]
    _check_header(url, header)
    folder = posixpath.dirname(storage.absolute(url))
    found: list[File] = []
    seen: dict[tuple[str, str, str], int] = {}
    for row in reader:
        if not any(cell.strip() for cell in row):
            continue
        where = f"{url} line {reader.line_num}"
        file = _row(
            dict(zip(header, map(str.strip, row), strict=False)), len(row), len(header), folder, where
        )
        if file.modality and file.modality not in modalities:
            raise ValueError(f"{where}: {_unknown('modality', file.modality, modalities)}")
        if file.label_from and file.label_from not in modalities:
            raise ValueError(f"{where}: label_from: {_unknown('modality', file.label_from, modalities)}")
        key = (file.dataset, file.modality, file.url)
        if key in seen:
            raise ValueError(f"{where} repeats line {seen[key]}: {file.dataset} {file.modality} {file.given}")
        seen[key] = reader.line_num
        found.append(file)
    if not found:
        raise ValueError(f"atlas table {url} has no rows; give one a file")
    return found


def _row(values: dict[str, str], size: int, expected: int, folder: str, where: str) -> File:
    if size != expected:
        raise ValueError(f"{where} has {size} values, the header {expected} columns")
    for name in ("dataset", "url"):
        if not values[name]:
            raise ValueError(f"{where} has no {name}")
    _check_name(values["dataset"], f"{where}: dataset")
    given = values.pop("url")
    url = given if "://" in given or given.startswith(("/", "~")) else storage.join(folder, given)
    return File(url=storage.absolute(url), given=given, where=where, **values)


def _check_header(url: str, header: Sequence[str]) -> None:
    if not any(header):
        raise ValueError(f"atlas table {url} is empty; it needs a header with {', '.join(COLUMNS)}")
    for name in header:
        if name not in COLUMNS:
            raise ValueError(f"atlas table {url}: {_unknown('column', name, COLUMNS)}")
    twice = sorted({name for name in header if header.count(name) > 1})
    missing = [name for name in ("dataset", "url") if name not in header]
    if twice or missing:
        what = f"has {', '.join(twice)} twice" if twice else f"has no column {', '.join(missing)}"
        raise ValueError(f"atlas table {url} {what}")


def _check_name(name: str, where: str) -> None:
    if not name or ":" in name or name != name.strip():
        raise ValueError(
            f"{where} is {name!r}: a data set needs a name without ':', which parts it from cells"
        )


def _unknown(kind: str, name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"there is no {kind} {name!r}; there are {', '.join(names)}.{hint}"


assert {f.name for f in fields(File)} == {*COLUMNS, "given", "where"}
