"""The formats that cells come in: HDF5 files and zarr folders, and what AnnData keeps in them.

Links out of a file are not followed.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem
from fsspec.implementations.local import LocalFileSystem

from cellray.data import storage


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """The root group of an HDF5 file or zarr folder. ValueError says what is there instead."""
    fs, path = storage.locate(url)
    if not fs.exists(path):
        raise ValueError(f"{url} does not exist")
    with ExitStack() as stack:
        if fs.isdir(path):
            yield _zarr(url)
            return
        if path.endswith(".zip"):
            raise ValueError(f"{url} is a zip archive: unpack it to a .zarr folder first")
        local = isinstance(fs, LocalFileSystem)
        file: Any = path
        if not local:
            file = stack.enter_context(fs.open(path, "rb", block_size=4 << 20, cache_type="blockcache"))
        try:
            root = h5py.File(file, "r")
        except OSError as error:
            raise _no_hdf5(url, bytes(fs.cat_file(path, 0, 512)), str(error)) from None
        yield stack.enter_context(root)


def _zarr(url: str) -> Any:
    try:
        return zarr.open_group(url, mode="r")
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ValueError(f"{url} is a folder but no zarr group: {error}") from None


def _no_hdf5(url: str, head: bytes, error: str) -> ValueError:
    """Why the file that starts with `head` cannot be opened as HDF5."""
    start = head.lstrip()[:200].lower()
    if head.startswith(b"\x89HDF"):
        why = f"is an HDF5 file that is cut short or damaged ({error}); fetch it again"
    elif not head:
        why = "is empty"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        why = "is a web page (HTML or XML), most likely a login or error page; fetch the file itself"
    elif head.startswith(b"\x1f\x8b"):
        why = "is gzip-compressed; unpack it first"
    elif head.startswith(b"PK"):
        why = "is a zip archive; unpack it first"
    elif b"\0" not in head:
        why = f"is a text file that starts with {head[:40].decode(errors='replace')!r}"
    else:
        why = "is of an unknown format"
    return ValueError(f"{url} {why}. An .h5ad, .h5mu or .zarr of AnnData or MuData is needed.")


@contextmanager
def naming(url: str) -> Iterator[None]:
    """Errors of the file format become a ValueError that names the file."""
    try:
        yield
    except ValueError as error:
        raise error if url in str(error) else ValueError(f"{url}: {error}") from None
    except (OSError, KeyError, RuntimeError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{url} cannot be read: {said}. It is damaged or incomplete; fetch it again."
        ) from error


def item(group: Any, path: str) -> Any:
    """`group[path]`, refusing what lies outside of the file."""
    for name in path.split("/"):
        if isinstance(group, h5py.Group):
            link = group.get(name, getlink=True)
            if link is not None and not isinstance(link, h5py.HardLink):
                raise ValueError(f"{group.name}/{name} is a link out of its place, which is not followed")
        if name not in group:
            raise ValueError(f"there is no {path}; the file is incomplete")
        group = group[name]
        if isinstance(group, h5py.Dataset) and (group.external or group.is_virtual):
            raise ValueError(f"{group.name} takes its values from another file, which is not followed")
    return group


def has(group: Any, path: str) -> bool:
    """Whether `item` would find `path`."""
    for name in path.split("/"):
        if isinstance(group, h5py.Dataset | zarr.Array) or name not in group:
            return False
        group = item(group, name)
    return True


def row_names(frame: Any) -> np.ndarray:
    """Row names of a stored data frame."""
    name = frame.attrs.get("_index", "_index")
    return column(frame, str(name))


def column(frame: Any, name: str) -> np.ndarray:
    """A column of a stored data frame as text, "" for missing values."""
    node = item(frame, name)
    if isinstance(node, h5py.Group):
        for part in node:
            item(node, part)
    return _text(read_elem(node))


def column_names(frame: Any) -> list[str]:
    """Columns of a stored data frame."""
    return [str(name) for name in frame.attrs.get("column-order", [])]


def _text(values: Any) -> np.ndarray:
    """Values as text, "" for missing ones."""
    series = pd.Series(values)
    missing = series.isna().to_numpy()
    if isinstance(series.dtype, pd.CategoricalDtype):
        categories = series.cat.categories.astype(str).to_numpy(dtype=object)
        codes = series.cat.codes.to_numpy()
        filled = categories[codes] if len(categories) else np.full(len(codes), "", object)
    else:
        filled = series.astype(str).to_numpy(dtype=object)
    return np.where(missing, "", filled)


class Dense:
    """A matrix stored whole."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape = tuple(int(n) for n in array.shape)
        self.stored = int(np.prod(self.shape, dtype=np.int64))
        if len(self.shape) != 2:
            raise ValueError(f"counts have {len(self.shape)} dimensions, not cells x features")


class Sparse:
    """A matrix stored by rows (CSR) or by columns (CSC), its arrays checked against each other."""

    def __init__(self, group: Any, by_column: bool, shape: Sequence[int]) -> None:
        self.by_column = by_column
        self.shape = (int(shape[0]), int(shape[1]))
        self.data, self.indices = item(group, "data"), item(group, "indices")
        self.indptr = np.asarray(item(group, "indptr")[:]).astype(np.int64)
        self.stored = int(self.data.shape[0])
        outer, self._inner = (self.shape[1], self.shape[0]) if by_column else self.shape
        if len(self.indptr) != outer + 1:
            raise _lies(f"indptr has {len(self.indptr):,} entries, {outer + 1:,} were expected")
        if self.indptr[0] != 0 or (np.diff(self.indptr) < 0).any():
            raise _lies("indptr does not start at 0 or falls")
        if self.indptr[-1] != self.stored or self.indices.shape[0] != self.stored:
            raise _lies(
                f"indptr ends at {int(self.indptr[-1]):,}, with {self.stored:,} values and "
                f"{int(self.indices.shape[0]):,} indices"
            )

    def inner(self, first: int, last: int) -> np.ndarray:
        """Indices first … last - 1, checked."""
        indices = np.asarray(self.indices[first:last])
        if indices.size and (indices.min() < 0 or indices.max() >= self._inner):
            raise _lies(f"an index lies outside 0 … {self._inner - 1:,}")
        return indices.astype(np.int32 if self._inner < 2**31 else np.int64)


def _lies(what: str) -> ValueError:
    return ValueError(f"the sparse counts contradict themselves: {what}. The file is damaged; fetch it again")


def matrix_of(node: Any) -> Dense | Sparse:
    """The counts stored at `node`, unread."""
    if isinstance(node, h5py.Dataset | zarr.Array):
        return Dense(node)
    kind = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format"))
    shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
    if kind in ("csr_matrix", "csr", "csc_matrix", "csc") and shape is not None:
        return Sparse(node, kind.startswith("csc"), shape)
    raise ValueError(f"counts are stored as {kind!r}; a CSR, CSC or dense matrix is needed")
