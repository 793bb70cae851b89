"""The formats that cells come in: HDF5 files and zarr folders, and the data frames AnnData keeps in them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from fsspec.implementations.local import LocalFileSystem

from cellray.data import storage
from cellray.data.faults import retried
from cellray.data.guard import check_folder, check_hdf5, check_url, check_whole, item, whole

DAMAGE = (OSError, LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError)
"""What libraries raise, beside ValueError, over a file whose descriptions of its content are damaged."""


class Counts(Protocol):
    """A matrix of counts, [cells, features], as a `Source` reads it."""

    by_column: bool
    chunk_rows: int

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def stored(self) -> int: ...

    def rows(self, start: int, stop: int, check: Callable[..., np.ndarray]) -> sp.csr_matrix: ...


class Foreign(ABC):
    """What is open of a format that a library of its own reads, out of which it makes the source itself."""

    @property
    @abstractmethod
    def keys(self) -> list[str]:
        """Modalities as the file names them; none where it holds one that has no name."""

    @abstractmethod
    def source(self, modality: str, layer: str, names: str) -> Any:
        """The `Source` that `open_source` is asked for."""


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """The root group of an HDF5 file or zarr folder, or another root (`Foreign`), guarded.

    ValueError says what is there instead.
    """
    check_url(url)
    fs, path = storage.locate(url)
    if not storage.exists(url):
        raise ValueError(f"{url} does not exist")
    with ExitStack() as stack:
        if retried(url, lambda: fs.isdir(path)):
            if isinstance(fs, LocalFileSystem):
                with naming(url):
                    check_folder(path)
            if any(storage.exists(storage.join(url, name)) for name in ("__group", "__tiledb_group.tdb")):
                # It builds on this module; and most never need it.
                from cellray.data import soma

                yield stack.enter_context(soma.opened(url, path))
                return
            yield _zarr(url)
            return
        if path.endswith(".zip"):
            raise ValueError(f"{url} is a zip archive: unpack it to a .zarr folder first")
        local = isinstance(fs, LocalFileSystem)
        file: Any = path
        if not local:
            file = stack.enter_context(storage.open_blocks(url))
        try:
            root = h5py.File(file, "r")
        except OSError as error:
            head = bytes(retried(url, lambda: fs.cat_file(path, start=0, end=512)))
            raise _no_hdf5(url, head, str(error)) from None
        stack.enter_context(root)
        with naming(url):
            check_hdf5(root)
        yield root


def _zarr(url: str) -> Any:
    more = storage.options(url) if "://" in url else {}
    try:
        return zarr.open_group(url, mode="r", storage_options=more or None)
    except (ValueError, *DAMAGE) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"{url} is a folder but no zarr group: {said}") from None


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
    return ValueError(
        f"{url} {why}. An .h5ad, .h5mu or .zarr of AnnData or MuData is needed, or an .h5 of 10x Genomics."
    )


@contextmanager
def naming(url: str) -> Iterator[None]:
    """Errors of the file format become a ValueError that names the file."""
    try:
        yield
    except ValueError as error:
        raise error if url in str(error) else ValueError(f"{url}: {error}") from None
    except DAMAGE as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{url} cannot be read: {said}. It is damaged or incomplete; fetch it again."
        ) from error


def has(group: Any, path: str) -> bool:
    """Whether `item` would find `path`."""
    for name in path.split("/"):
        if isinstance(group, h5py.Dataset | zarr.Array) or name not in group:
            return False
        group = item(group, name)
    return True


def rows_in(frame: Any) -> int:
    """Rows of a stored data frame, without reading their names."""
    node = item(frame, _index(frame))
    if isinstance(node, h5py.Group | zarr.Group):
        node = item(node, "codes" if "codes" in node else "values")
    if not isinstance(node, h5py.Dataset | zarr.Array) or len(node.shape) != 1:
        raise ValueError(f"{frame.name} has no row names; the file is damaged")
    return int(node.shape[0])


def row_names(frame: Any) -> np.ndarray:
    """Row names of a stored data frame."""
    return column(frame, _index(frame))


def _index(frame: Any) -> str:
    return str(frame.attrs.get("_index", "_index"))


def column(frame: Any, name: str) -> np.ndarray:
    """A column of a stored data frame as text, "" for missing values."""
    node = item(frame, name)
    if not isinstance(node, h5py.Group | zarr.Group):
        # AnnData before 0.8 wrote what a column's numbers stand for elsewhere.
        other = node.attrs.get("categories")
        return text(_values(node)) if other is None else decoded(_values(node), _values(frame[other]))
    if "codes" in node:
        return decoded(_values(item(node, "codes")), _values(item(node, "categories")))
    values, missing = _values(item(node, "values")), _values(item(node, "mask"))
    if missing.dtype != bool or missing.shape != values.shape:
        raise ValueError(f"{node.name} has {len(values):,} values but a mask that does not fit them")
    return np.where(missing, "", text(values))


def decoded(codes: np.ndarray, categories: np.ndarray) -> np.ndarray:
    """The category of each code as text, "" for -1, which is none."""
    if codes.dtype.kind not in "iu" or (
        codes.size and not -1 <= int(codes.min()) <= int(codes.max()) < len(categories)
    ):
        raise ValueError(f"a column has codes that are not among its {len(categories):,} categories")
    return np.append(text(categories), "")[codes]


def _values(array: Any) -> np.ndarray:
    """All of a list; text as Python's own."""
    if not isinstance(array, h5py.Dataset | zarr.Array) or len(array.shape) != 1:
        raise ValueError(f"{getattr(array, 'name', array)} is no list, as a column is")
    if isinstance(array, h5py.Dataset) and h5py.check_string_dtype(array.dtype):
        check_whole(array)
        return np.asarray(array.asstr()[...], object)
    values = whole(array)
    if values.dtype.kind in "biuf":
        return values
    return np.array([v.decode() if isinstance(v, bytes) else str(v) for v in values.tolist()], object)


def column_names(frame: Any) -> list[str]:
    """Columns of a stored data frame."""
    return [str(name) for name in frame.attrs.get("column-order", [])]


def text(values: np.ndarray) -> np.ndarray:
    """Values as text, "" for missing ones, object."""
    series = pd.Series(values)
    return np.where(series.isna(), "", series.astype(str).to_numpy(dtype=object))
