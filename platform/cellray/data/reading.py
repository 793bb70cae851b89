"""Cells out of .h5ad, .h5mu, zarr, 10x Genomics .h5 and SOMA at any URL: names, raw counts by row ranges.

Nothing is loaded whole but names, when they are asked for. What a file may hold is in `guard`.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from cellray.data import formats, tenx
from cellray.data.counts import check_counts, counts_of
from cellray.data.formats import column, column_names, has, naming, opened, row_names, rows_in
from cellray.data.guard import item
from cellray.data.matrices import KEPT, Dense, canonical, matrix_of
from cellray.data.modalities import PEAK

SYMBOLS = ("symbol", "gene_symbol", "gene_symbols", "feature_name", "gene_name")
"""var columns that may hold a second name of a feature."""
IDS = ("ensembl_id", "feature_id", "gene_id", "gene_ids", *SYMBOLS)
"""var columns that may hold the ids where var_names are mere row numbers."""
ALIASES = {"gex": "rna", "gene": "rna", "prot": "protein", "adt": "protein", "peaks": "atac"}
"""What modalities of MuData files are called elsewhere."""
CELLXGENE = ("assay_ontology_term_id", "cell_type_ontology_term_id")
"""obs columns by which a file of the CELLxGENE schema is known."""


@contextmanager
def open_source(url: str, *, modality: str = "", layer: str = "", names: str = "") -> Iterator["Source"]:
    """The cells of one modality in the file at `url`, to be read while the `with` lasts.

    `modality` picks one of a MuData file, by its key or a usual alias of it, one kind of features of
    a 10x Genomics file, or a measurement of a TileDB-SOMA experiment, and may stay "" if there is only
    one. `layer` is "" for X, "raw" for raw.X, else a layer; `soma` tells what these are there. `names`
    is the var column of the feature ids, "" for var_names; where the column is empty, var_names stand in.

    ValueError, naming the file and what was found in it: missing, truncated, hostile or another
    format, modality, layer or column that does not exist, cell names that repeat, counts that are none.
    """
    with opened(url) as root:
        with naming(url):
            if isinstance(root, formats.Foreign):
                source: Source = root.source(modality, layer, names)
            elif tenx.holds(root):
                source = _TenX(url, root, modality, layer, names)
            else:
                node, shared = _modality(root, url, modality)
                source = _AnnData(url, node, shared, layer, names)
        yield source


class Source(ABC):
    """One modality of one file. Made by `open_source`."""

    shape: tuple[int, int]
    """Cells and features."""
    by_column: bool
    """Stored by columns (CSC): `rows` reads the whole file, once up to KEPT counts, else each time."""
    layer: str = ""
    """Which counts these are, as `open_source` was told."""
    where: str
    """File and key of the counts, as messages name them."""
    obs_columns: tuple[str, ...] = ()
    """Names of what is known of each cell."""
    has_raw: bool = False
    """Whether there are counts in raw.X."""
    genomes: tuple[str, ...] = ()
    """Genomes of the features as the file names them, in order; none if it does not say."""

    def __init__(self, url: str, matrix: formats.Counts) -> None:
        self.url = url
        self._matrix = matrix
        self.shape = matrix.shape
        self.by_column = matrix.by_column

    @property
    def stored(self) -> int:
        """Numbers stored: non-zeros of a sparse matrix, all of a dense one."""
        return self._matrix.stored

    @cached_property
    def cell_names(self) -> np.ndarray:
        """Names of the cells, str [cells], each once. ValueError for those that repeat."""
        with naming(self.url):
            names = self._cell_names()
            if len(names) != self.shape[0]:
                raise ValueError(
                    f"{self.where} has {self.shape[0]:,} rows, but there are {len(names):,} cell names"
                )
        _refuse_repeats(self.url, names)
        return names

    @property
    def feature_names(self) -> np.ndarray:
        """Ids of the features as the file spells them, str [features]; they may repeat."""
        return self._names[0]

    @property
    def symbols(self) -> np.ndarray:
        """A second name of each feature, "" where there is none, str [features]."""
        return self._names[1]

    @cached_property
    def _names(self) -> tuple[np.ndarray, np.ndarray]:
        with naming(self.url):
            ids, symbols = self._feature_names()
            if len(ids) != self.shape[1] or len(symbols) != self.shape[1]:
                raise ValueError(
                    f"{self.where} has {self.shape[1]:,} columns, but there are {len(ids):,} feature names"
                )
        return ids, symbols

    @property
    def cellxgene(self) -> bool:
        """Whether the file follows the CELLxGENE schema."""
        return set(CELLXGENE) <= set(self.obs_columns)

    @property
    def looks_like_peaks(self) -> bool:
        """Whether most feature names are genomic intervals."""
        some = self.feature_names[:1000]
        return bool(len(some)) and sum(PEAK.match(name) is not None for name in some) > len(some) / 2

    def obs(self, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of obs as text, str [cells] each, "" for missing values.

        In a MuData file a column of the modality comes before one of the whole file.
        """
        with naming(self.url):
            found = {name: self._column(name) for name in columns}
            for name, values in found.items():
                if len(values) != self.shape[0]:
                    said = f"{len(values):,} values, not {self.shape[0]:,}"
                    raise ValueError(f"column {name!r} of obs has {said}: the file is damaged")
        return found

    def step(self, rows: int) -> int:
        """How many rows to read at a time where about `rows` are wanted.

        All, or many, if `by_column`. Chunks of the file are decoded whole for any row of them, so no
        fewer than are in one, and of a dense matrix a multiple of that.
        """
        if self.by_column:
            return max(rows, self.shape[0] * KEPT // max(1, self.stored))
        least = self._matrix.chunk_rows
        return max(rows // least * least, least) if isinstance(self._matrix, Dense) else max(rows, least)

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Raw counts of cells start … stop - 1, uint32 [stop - start, features].

        Sorted within a row, duplicates summed, no zeros stored. Sums of uint32 are to be taken in 64
        bits: those of a scipy matrix and of numpy are. Memory goes with the range alone, but for files
        stored by columns (`by_column`).
        ValueError if they are no raw counts, or the sparse arrays contradict each other.
        """
        with naming(self.url):
            return canonical(self._rows(start, stop))

    def _rows(self, start: int, stop: int) -> sp.csr_matrix:
        return self._matrix.rows(start, stop, self._checked)

    def _checked(self, data: np.ndarray, starts: np.ndarray | None) -> np.ndarray:
        """`data` as uint32 if it is raw counts; else ValueError with where counts may be instead."""
        try:
            return counts_of(data, self.where, starts)
        except ValueError as error:
            others = self._others()
            if not others:
                raise
            spelled = " or ".join(f"layer={place}" if place else "layer= (X)" for place in others)
            raise ValueError(f"{error} In this file {spelled} holds whole numbers.") from None

    def _others(self) -> list[str]:
        """Other places of the file that hold whole numbers."""
        return []

    @abstractmethod
    def _cell_names(self) -> np.ndarray:
        """Names of the cells as they are stored, str [cells]."""

    @abstractmethod
    def _feature_names(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and second names of the features as they are stored, str [features] each."""

    def _column(self, name: str) -> np.ndarray:
        raise ValueError(f"{self.url}: obs has no column {name!r}; {offer(name, self.obs_columns)}")


class _AnnData(Source):
    """An AnnData, or one of a MuData."""

    def __init__(self, url: str, node: Any, shared: Any, layer: str, names: str) -> None:
        self._node, self._shared, self._ids = node, shared, names
        self.layer = layer
        self.where = f"{url}: {_key(layer)}"
        if not has(node, _key(layer)):
            raise ValueError(
                f"{url}: there are no counts in {_key(layer)}. It has "
                f"{self._places() or 'no counts at all'}; say which with layer=."
            )
        super().__init__(url, matrix_of(item(node, _key(layer))))
        self._var = item(node, "raw/var" if layer == "raw" else "var")
        if names and names not in column_names(self._var):
            raise ValueError(f"{url}: var has no column {names!r}; {offer(names, column_names(self._var))}")
        own = column_names(item(node, "obs"))
        extra = [] if shared is None else column_names(shared)
        self.obs_columns = (*own, *(name for name in extra if name not in own))
        expected = rows_in(item(node, "obs")), rows_in(self._var)
        if self.shape != expected:
            raise ValueError(
                f"{self.where} has the shape {self.shape}, but there are {expected[0]:,} cell names "
                f"and {expected[1]:,} feature names: the file is damaged"
            )

    @property
    def has_raw(self) -> bool:  # type: ignore[override]
        return has(self._node, "raw/X")

    @property
    def genomes(self) -> tuple[str, ...]:  # type: ignore[override]
        if "genome" not in column_names(self._var):
            return ()
        with naming(self.url):
            return tuple(name for name in dict.fromkeys(column(self._var, "genome").tolist()) if name)

    def _cell_names(self) -> np.ndarray:
        return row_names(item(self._node, "obs"))

    def _feature_names(self) -> tuple[np.ndarray, np.ndarray]:
        var = self._var
        return features_of(self.url, row_names(var), column_names(var), partial(column, var), self._ids)

    def _candidates(self) -> list[str]:
        layers = sorted(item(self._node, "layers").keys()) if "layers" in self._node else []
        return ["", *(["raw"] if self.has_raw else []), *layers]

    def _places(self) -> str:
        found = [name for name in self._candidates() if name or has(self._node, "X")]
        return ", ".join({"": "X", "raw": "raw.X"}.get(name, f"layer {name!r}") for name in found)

    def _others(self) -> list[str]:
        return [place for place in self._candidates() if place != self.layer and self._whole(place)]

    def _whole(self, layer: str) -> bool:
        """Whether the first numbers of another place pass as counts."""
        try:
            check_counts(matrix_of(item(self._node, _key(layer))).some(), "")
        except ValueError:
            return False
        return True

    def _column(self, name: str) -> np.ndarray:
        obs = item(self._node, "obs")
        if name in column_names(obs):
            return column(obs, name)
        if self._shared is not None and name in column_names(self._shared):
            values = column(self._shared, name)
            places = pd.Index(row_names(self._shared)).get_indexer(pd.Index(self.cell_names))
            return np.where(places >= 0, values[places], "")
        return super()._column(name)


class _TenX(Source):
    """One kind of features of a 10x Genomics matrix."""

    def __init__(self, url: str, root: Any, modality: str, layer: str, names: str) -> None:
        if layer:
            raise ValueError(f"{url} is a 10x Genomics matrix, which has no layers: leave layer= empty")
        self._file = tenx.Matrix(root)
        self.where = f"{url}: {self._file.key}"
        self._picked = self._file.pick(known(modality) if modality else "")
        if names not in ("", *self._file.columns):
            raise ValueError(f"{url} has no feature names {names!r}; {offer(names, self._file.columns)}")
        self._ids = names
        super().__init__(url, self._file.counts)
        self.shape = (self.shape[0], int(self._picked.sum()))
        self.genomes = self._file.genomes(self._picked)

    def _cell_names(self) -> np.ndarray:
        return self._file.barcodes()

    def _feature_names(self) -> tuple[np.ndarray, np.ndarray]:
        return self._file.names(self._picked, self._ids)

    def _rows(self, start: int, stop: int) -> sp.csr_matrix:
        counts = super()._rows(start, stop)
        return counts if self._picked.all() else tenx.some_columns(counts, self._picked)


def _key(layer: str) -> str:
    """Where in an AnnData the counts of `layer` are."""
    return {"": "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")


def modality_keys(root: Any) -> list[str]:
    """Modalities of a MuData or 10x Genomics file or an experiment, as it names them; none for an AnnData."""
    if isinstance(root, formats.Foreign):
        return root.keys
    if tenx.holds(root):
        return tenx.Matrix(root).kinds
    return sorted(item(root, "mod").keys()) if "mod" in root and "X" not in root else []


def _modality(root: Any, url: str, modality: str) -> tuple[Any, Any]:
    """The AnnData group of `modality`, and the obs of all modalities together if there is one."""
    keys = modality_keys(root)
    if not keys:
        _expect_anndata(root, url)
        return root, None
    node = item(root, f"mod/{one_of(url, keys, modality)}")
    _expect_anndata(node, url)
    return node, item(root, "obs") if "obs" in root else None


def one_of(url: str, keys: Sequence[str], modality: str) -> str:
    """The one of `keys` that `modality` means, "" being the only one."""
    named = {known(key): key for key in keys} | {key: key for key in keys}
    if modality == "" and len(keys) == 1:
        return keys[0]
    if known(modality) not in named:
        asked = f"no modality {modality!r}" if modality else "several modalities, and none was named"
        raise ValueError(f"{url} has {asked}: it holds {', '.join(keys)}. Name one of them as modality=.")
    return named.get(modality) or named[known(modality)]


def known(key: str) -> str:
    """The usual name of a modality that a MuData file calls `key`."""
    return ALIASES.get(key.lower(), key.lower())


def _expect_anndata(node: Any, url: str) -> None:
    if "obs" in node and "var" in node:
        if isinstance(node["obs"], h5py.Dataset):
            raise ValueError(
                f"{url} was written by AnnData older than 0.7: read and write it with a recent one"
            )
        return
    found = ", ".join(sorted(node.keys())[:8]) or "nothing"
    hint = ""
    if "matrix" in node and not isinstance(node["matrix"], h5py.Dataset | zarr.Array):
        hint = " It looks like 10x Genomics output without its matrix/features: it is damaged."
    elif "molecule_info" in url or "umi" in node:
        hint = " It looks like molecules of 10x Genomics: give filtered_feature_bc_matrix.h5."
    elif "row_attrs" in node:
        hint = " It looks like a loom file: read it with anndata.io.read_loom and write an .h5ad."
    raise ValueError(f"{url} is no AnnData: it has no obs and var but {found}.{hint}")


def features_of(
    url: str, own: np.ndarray, columns: Sequence[str], column: Callable[[str], np.ndarray], names: str
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and second names of the features, out of var: `own`, its row names, and `columns`, read by name."""
    if not names and len(own) and all(name.isdigit() for name in own):
        names = next((c for c in IDS if c in columns), "")
        if not names:
            raise ValueError(
                f"{url}: var_names are mere numbers such as {own[0]!r}. Say which column holds the ids "
                f"with names=; var has {', '.join(columns) or 'no columns'}."
            )
    ids = own
    if names:
        ids = column(names)
        ids = np.where(ids == "", own, ids)
    second = next((c for c in SYMBOLS if c in columns and c != names), "")
    symbols = column(second) if second else own
    return ids, np.where(symbols == ids, "", symbols)


def _refuse_repeats(url: str, names: np.ndarray) -> None:
    twice = pd.Series(names)[pd.Series(names).duplicated()].unique()
    if len(twice):
        raise ValueError(
            f"{url}: {len(twice):,} cell names occur more than once, such as "
            f"{', '.join(map(repr, twice[:3]))}. Make them unique, e.g. by adding the batch to the barcode."
        )


def offer(name: str, names: Sequence[str]) -> str:
    """What there is instead of `name`, for a message."""
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"it has {', '.join(names) or 'none'}.{hint}"
