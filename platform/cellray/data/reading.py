"""Cells out of .h5ad, .h5mu and zarr files at any URL: names at once, raw counts by row ranges.

Nothing is loaded whole but names and, of sparse counts, one number a cell. Links out of a file
are not followed.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from cellray.data.counts import check_counts
from cellray.data.formats import (
    Dense,
    Sparse,
    column,
    column_names,
    has,
    item,
    matrix_of,
    naming,
    opened,
    row_names,
)
from cellray.data.modalities import PEAK

SYMBOLS = ("symbol", "gene_symbol", "gene_symbols", "feature_name", "gene_name")
"""var columns that may hold a second name of a feature."""
IDS = ("ensembl_id", "feature_id", "gene_id", "gene_ids", *SYMBOLS)
"""var columns that may hold the ids where var_names are mere row numbers."""
ALIASES = {"gex": "rna", "gene": "rna", "prot": "protein", "adt": "protein", "peaks": "atac"}
"""What modalities of MuData files are called elsewhere."""
CELLXGENE = ("assay_ontology_term_id", "cell_type_ontology_term_id")
"""obs columns by which a file of the CELLxGENE schema is known."""
KEPT = 32_000_000
"""Counts of a file stored by columns (CSC) up to which they are turned to rows once and kept."""
CHUNK = 8_000_000
"""Counts read at a time from a file stored by columns, and values at a time from a dense one."""


@contextmanager
def open_source(url: str, *, modality: str = "", layer: str = "", names: str = "") -> Iterator["Source"]:
    """The cells of one modality in the file at `url`, to be read while the `with` lasts.

    `modality` picks one of a MuData file, by its key or a usual alias of it, and may stay "" if
    the file has only one. `layer` is "" for X, "raw" for raw.X, else a layer. `names` is the var
    column of the feature ids, "" for var_names; where the column is empty, var_names stand in.

    ValueError, naming the file and what was found in it: missing, truncated or another format,
    modality, layer or column that does not exist, cell names that repeat, counts that are none.
    """
    with opened(url) as root:
        with naming(url):
            node, shared = _modality(root, url, modality)
            source = Source(url, node, shared, layer, names)
        yield source


class Source:
    """One modality of one file. Made by `open_source`."""

    cell_names: np.ndarray
    """Names of the cells, str [cells], each once."""
    feature_names: np.ndarray
    """Ids of the features as the file spells them, str [features]; they may repeat."""
    symbols: np.ndarray
    """A second name of each feature, "" where there is none, str [features]."""
    by_column: bool
    """Stored by columns (CSC): `rows` reads the whole file, once up to KEPT counts, else each time."""
    stored: int
    """Numbers stored: non-zeros of a sparse matrix, all of a dense one."""

    def __init__(self, url: str, node: Any, shared: Any, layer: str, names: str) -> None:
        self.url = url
        self._node, self._shared = node, shared
        self.cell_names = row_names(item(node, "obs"))
        _refuse_repeats(url, self.cell_names)
        self.layer = layer
        if not has(node, _key(layer)):
            raise ValueError(
                f"{url}: there are no counts in {_key(layer)}. It has "
                f"{self._places() or 'no counts at all'}; say which with layer=."
            )
        self._matrix = matrix_of(item(node, _key(layer)))
        var = item(node, "raw/var" if layer == "raw" else "var")
        self.feature_names, self.symbols = _features(url, var, names)
        self._check_shape()
        self.by_column = isinstance(self._matrix, Sparse) and self._matrix.by_column
        self.stored = self._matrix.stored
        self._kept: sp.csr_matrix | None = None

    @property
    def where(self) -> str:
        """File and key of the counts, as messages name them."""
        return f"{self.url}: {_key(self.layer)}"

    @property
    def obs_columns(self) -> list[str]:
        """Names of what is known of each cell."""
        own = column_names(item(self._node, "obs"))
        shared = [] if self._shared is None else column_names(self._shared)
        return own + [name for name in shared if name not in own]

    @property
    def cellxgene(self) -> bool:
        """Whether the file follows the CELLxGENE schema."""
        return set(CELLXGENE) <= set(self.obs_columns)

    @property
    def has_raw(self) -> bool:
        return has(self._node, "raw/X")

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
            return {name: self._column(name) for name in columns}

    def step(self, rows: int) -> int:
        """How many rows to read at a time where about `rows` are wanted: all, or many, if `by_column`."""
        return max(rows, len(self.cell_names) * KEPT // max(1, self.stored)) if self.by_column else rows

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Raw counts of cells start … stop - 1, int64 [stop - start, features].

        Sorted within a row, duplicates summed, no zeros stored. Memory goes with the range alone,
        but for files stored by columns (`by_column`).
        ValueError if they are no raw counts, or the sparse arrays contradict each other.
        """
        with naming(self.url):
            counts = self._rows(start, stop)
        counts.sum_duplicates()
        counts.eliminate_zeros()
        return counts

    def _rows(self, start: int, stop: int) -> sp.csr_matrix:
        matrix = self._matrix
        if isinstance(matrix, Dense):
            return self._dense(matrix, start, stop)
        if not matrix.by_column:
            first, last = int(matrix.indptr[start]), int(matrix.indptr[stop])
            data = self._checked(matrix.data[first:last])
            indices = matrix.inner(first, last)
            indptr = matrix.indptr[start : stop + 1] - first
            return sp.csr_matrix((data, indices, indptr), shape=(stop - start, matrix.shape[1]))
        if self._kept is None and matrix.stored <= KEPT:
            self._kept = self._by_column(matrix, 0, matrix.shape[0])
        if self._kept is not None:
            return self._kept[start:stop]
        return self._by_column(matrix, start, stop)

    def _by_column(self, matrix: Sparse, start: int, stop: int) -> sp.csr_matrix:
        """Some rows of a matrix stored by columns: one pass over all of it, a part at a time."""
        parts = []
        begin = 0
        while begin < matrix.shape[1]:
            first = int(matrix.indptr[begin])
            end = int(np.searchsorted(matrix.indptr, first + CHUNK, side="right")) - 1
            end = min(max(end, begin + 1), matrix.shape[1])
            last = int(matrix.indptr[end])
            data = self._checked(matrix.data[first:last])
            rows = matrix.inner(first, last)
            lengths = np.diff(matrix.indptr[begin : end + 1])
            columns = np.repeat(np.arange(begin, end, dtype=np.int32), lengths)
            keep = (rows >= start) & (rows < stop)
            parts.append((rows[keep] - start, columns[keep], data[keep]))
            begin = end
        shape = (stop - start, matrix.shape[1])
        if not parts:
            return sp.csr_matrix(shape, dtype=np.int64)
        within, across, values = (np.concatenate(part) for part in zip(*parts, strict=True))
        return sp.csr_matrix((values, (within, across)), shape=shape)

    def _dense(self, matrix: Dense, start: int, stop: int) -> sp.csr_matrix:
        step = max(1, CHUNK // max(1, matrix.shape[1]))
        parts = [sp.csr_matrix((0, matrix.shape[1]), dtype=np.int64)]
        for first in range(start, stop, step):
            parts.append(
                sp.csr_matrix(self._checked(np.asarray(matrix.array[first : min(first + step, stop)])))
            )
        return sp.vstack(parts, format="csr")

    def _checked(self, data: np.ndarray) -> np.ndarray:
        """`data` as int64 if it is raw counts; else ValueError with where counts may be instead."""
        try:
            check_counts(data, self.where)
        except ValueError as error:
            others = [place for place in self._candidates() if place != self.layer and self._whole(place)]
            if not others:
                raise
            spelled = " or ".join(f"layer={place}" if place else "layer= (X)" for place in others)
            raise ValueError(f"{error} In this file {spelled} holds whole numbers.") from None
        return data.astype(np.int64)

    def _candidates(self) -> list[str]:
        layers = sorted(item(self._node, "layers").keys()) if "layers" in self._node else []
        return ["", *(["raw"] if self.has_raw else []), *layers]

    def _places(self) -> str:
        found = [name for name in self._candidates() if name or has(self._node, "X")]
        return ", ".join({"": "X", "raw": "raw.X"}.get(name, f"layer {name!r}") for name in found)

    def _whole(self, layer: str) -> bool:
        """Whether the first numbers of another place pass as counts."""
        matrix = matrix_of(item(self._node, _key(layer)))
        some = matrix.data[:10_000] if isinstance(matrix, Sparse) else np.asarray(matrix.array[:10])
        try:
            check_counts(some, "")
        except ValueError:
            return False
        return True

    def _check_shape(self) -> None:
        expected = (len(self.cell_names), len(self.feature_names))
        if self._matrix.shape != expected:
            raise ValueError(
                f"{self.where} has the shape {self._matrix.shape}, but there are {expected[0]:,} cell names "
                f"and {expected[1]:,} feature names: the file is damaged"
            )

    def _column(self, name: str) -> np.ndarray:
        obs = item(self._node, "obs")
        if name in column_names(obs):
            return column(obs, name)
        if self._shared is not None and name in column_names(self._shared):
            values = column(self._shared, name)
            places = pd.Index(row_names(self._shared)).get_indexer(pd.Index(self.cell_names))
            return np.where(places >= 0, values[places], "")
        raise ValueError(f"{self.url}: obs has no column {name!r}; {_offer(name, self.obs_columns)}")


def _key(layer: str) -> str:
    """Where in an AnnData the counts of `layer` are."""
    return {"": "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")


def modality_keys(root: Any) -> list[str]:
    """Modalities of a MuData file, as it names them; none for an AnnData."""
    return sorted(item(root, "mod").keys()) if "mod" in root and "X" not in root else []


def _modality(root: Any, url: str, modality: str) -> tuple[Any, Any]:
    """The AnnData group of `modality`, and the obs of all modalities together if there is one."""
    keys = modality_keys(root)
    if not keys:
        _expect_anndata(root, url)
        return root, None
    named = {known(key): key for key in keys} | {key: key for key in keys}
    if modality == "" and len(keys) == 1:
        modality = keys[0]
    if modality not in named:
        asked = f"no modality {modality!r}" if modality else "several modalities, and none was named"
        raise ValueError(f"{url} has {asked}: it holds {', '.join(keys)}. Name one of them as modality=.")
    node = item(root, f"mod/{named[modality]}")
    _expect_anndata(node, url)
    return node, item(root, "obs") if "obs" in root else None


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
        hint = " It looks like 10x Genomics output: read it with scanpy.read_10x_h5 and write an .h5ad."
    elif "row_attrs" in node:
        hint = " It looks like a loom file: read it with anndata.io.read_loom and write an .h5ad."
    raise ValueError(f"{url} is no AnnData: it has no obs and var but {found}.{hint}")


def _features(url: str, var: Any, names: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and second names of the features."""
    own = row_names(var)
    columns = column_names(var)
    if not names and len(own) and all(name.isdigit() for name in own):
        names = next((c for c in IDS if c in columns), "")
        if not names:
            raise ValueError(
                f"{url}: var_names are mere numbers such as {own[0]!r}. Say which column holds the ids "
                f"with names=; var has {', '.join(columns) or 'no columns'}."
            )
    ids = own
    if names:
        if names not in columns:
            raise ValueError(f"{url}: var has no column {names!r}; {_offer(names, columns)}")
        ids = column(var, names)
        ids = np.where(ids == "", own, ids)
    second = next((c for c in SYMBOLS if c in columns and c != names), "")
    symbols = column(var, second) if second else own
    return ids, np.where(symbols == ids, "", symbols)


def _refuse_repeats(url: str, names: np.ndarray) -> None:
    twice = pd.Series(names)[pd.Series(names).duplicated()].unique()
    if len(twice):
        raise ValueError(
            f"{url}: {len(twice):,} cell names occur more than once, such as "
            f"{', '.join(map(repr, twice[:3]))}. Make them unique, e.g. by adding the batch to the barcode."
        )


def _offer(name: str, names: Sequence[str]) -> str:
    """What there is instead of `name`, for a message."""
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"it has {', '.join(names) or 'none'}.{hint}"
