"""What a file may hold before anything of it is used: no way out of it, nothing it cannot have stored.

An HDF5 file is walked whole when it is opened; of a zarr folder each array is looked at before it is
read. What remains are errors in the libraries that decode it: see `isolation`.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr

OBJECTS = 100_000
"""Groups and datasets of one file."""
DEPTH = 24
"""Groups within groups."""
FLOOR = 256 << 20
"""Bytes that a file of any size may declare."""
RATIO = 1_100
"""Bytes declared for each byte of the file. gzip packs zeros 1,032 : 1 at best."""
LARGEST_CHUNK = 1 << 30
"""Bytes of a chunk, which is decoded whole whatever is read of it."""
WHOLE = 4 << 30
"""Bytes of an array that is read whole: names, columns, starts of rows."""
UNREAD = re.compile(r"/(mod/[^/]+/)?(raw/)?(uns|obsm|varm|obsp|varp)(/|$)")
"""What is never read of an AnnData: its links are looked at, its arrays may be anything."""
SOMA = "is the address of a TileDB-SOMA experiment in a catalogue: give its folder, a path or an s3:// URL"
FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}
"""Filters of HDF5 that come with the library."""
PLUGINS = {32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32015: "zstd", 32026: "blosc2"}
"""Filters in use that are read only where a plugin was installed."""
CODECS = {
    "bytes", "blosc", "gzip", "zlib", "zstd", "lz4", "lzma", "bz2", "shuffle", "delta", "crc32", "crc32c",
    "adler32", "fletcher32", "transpose", "sharding_indexed", "vlen-utf8", "vlen-bytes", "packbits",
}  # fmt: skip
"""Codecs of zarr that only decode. Others run code (pickle) or are not needed for AnnData."""


def check_url(url: str) -> None:
    """ValueError for a URL that says to gather a file out of others, or of a format that is not read."""
    for part in url.split("::"):
        if part.partition("://")[0] in ("soma", "tiledb"):
            raise ValueError(f"{url} {SOMA}")
        if part.partition("://")[0] in ("reference", "kerchunk"):
            raise ValueError(f"{url} takes its content from other files (a reference store), not followed")


def check_name(name: str) -> None:
    """ValueError for a name that could lead out of the group it is looked up in."""
    if name in ("", ".", "..") or "\0" in name or "\\" in name:
        raise ValueError(f"a part of the file is named {name!r}, which is not followed")


def check_hdf5(root: h5py.File) -> None:
    """Nothing, if the file keeps what it holds within itself. No value is read.

    ValueError, naming the place: a link that is no hard link, values in another file, a filter that is
    not built in, a type that is no number or text, more declared than can be stored, too many objects.
    """
    limit = max(FLOOR, RATIO * root.id.get_filesize())
    declared = 0
    for path, dataset in _datasets(root):
        creation = dataset.get_create_plist()
        layout = creation.get_layout()
        if creation.get_external_count() or layout == h5py.h5d.VIRTUAL:
            raise ValueError(f"{path} takes its values from another file, which is not followed")
        if UNREAD.match(path):
            continue
        _check_type(path, dataset.get_type())
        _check_filters(path, creation)
        declared += _bytes(dataset.shape, dataset.get_type().get_size())
        if declared > limit:
            raise ValueError(
                f"with {path} it declares {declared:,} bytes, more than a file of "
                f"{root.id.get_filesize():,} bytes can hold: it is damaged or hostile"
            )
        if layout == h5py.h5d.CHUNKED:
            _check_chunk(path, _bytes(creation.get_chunk(), dataset.get_type().get_size()))


def _datasets(root: h5py.File) -> Iterator[tuple[str, h5py.h5d.DatasetID]]:
    """Path and dataset of all there are, each once however often it is linked."""
    seen = {h5py.h5o.get_info(root.id).addr}
    todo: list[tuple[str, int, h5py.h5g.GroupID]] = [("", 0, h5py.h5g.open(root.id, b"/"))]
    while todo:
        path, depth, group = todo.pop()
        names: list[bytes] = []
        group.links.iterate(names.append)
        if depth > DEPTH or len(seen) + len(names) > OBJECTS:
            raise ValueError(f"{path or '/'} makes more than {OBJECTS:,} parts, or {DEPTH} within each other")
        for name in names:
            place = f"{path}/{name.decode(errors='replace')}"
            if group.links.get_info(name).type != h5py.h5l.TYPE_HARD:
                raise ValueError(f"{place} is a link out of its place, which is not followed")
            node = h5py.h5o.open(group, name)
            address = h5py.h5o.get_info(node).addr
            if address in seen:
                continue
            seen.add(address)
            if isinstance(node, h5py.h5g.GroupID):
                todo.append((place, depth + 1, node))
            elif isinstance(node, h5py.h5d.DatasetID):
                yield place, node


def _check_type(path: str, kind: h5py.h5t.TypeID) -> None:
    """ValueError unless values are numbers of a usual layout, text, or records of these."""
    if isinstance(kind, h5py.h5t.TypeStringID):
        return
    if isinstance(kind, h5py.h5t.TypeEnumID):
        _check_type(path, kind.get_super())
        return
    if isinstance(kind, h5py.h5t.TypeCompoundID):
        for number in range(kind.get_nmembers()):
            _check_type(path, kind.get_member_type(number))
        return
    if isinstance(kind, h5py.h5t.TypeIntegerID | h5py.h5t.TypeFloatID):
        # A damaged description of a type makes other numbers out of the same bytes.
        if h5py.h5t.py_create(kind.dtype).equal(kind):
            return
        raise ValueError(f"{path} holds numbers of an unusual layout: it is damaged or hostile")
    raise ValueError(f"{path} holds values of a type ({type(kind).__name__}) that no AnnData needs")


def _check_filters(path: str, creation: Any) -> None:
    codes = [creation.get_filter(number)[0] for number in range(creation.get_nfilters())]
    for code in codes:
        if code in FILTERS or (code in PLUGINS and h5py.h5z.filter_avail(code)):
            continue
        hint = "import its plugin (hdf5plugin) or " if code in PLUGINS else ""
        name = PLUGINS.get(code, f"number {code}")
        raise ValueError(f"{path} is packed with the filter {name}: {hint}write the file with gzip")
    if len(set(codes)) < len(codes):
        raise ValueError(f"{path} is packed by the same filter more than once: it is damaged or hostile")


def _check_chunk(path: str, size: int) -> None:
    if size > LARGEST_CHUNK:
        raise ValueError(f"{path} has chunks of {size:,} bytes: write it with chunks below {LARGEST_CHUNK:,}")


def _bytes(shape: tuple[int, ...] | None, size: int) -> int:
    """Bytes of an array, of any size: sides are no C integers here."""
    found = size
    for side in shape or ():
        found *= int(side)
    return found


def check_chunks(array: Any, first: int, last: int) -> None:
    """Nothing, if all chunks with values first … last - 1 of a list are there, none larger than declared.

    Of HDF5 only: a chunk that was never written reads as zeros, one that is packed too large unpacks to
    more than there is memory for. A zarr folder leaves out chunks that hold nothing but its fill value.
    """
    if not isinstance(array, h5py.Dataset) or not array.chunks or first >= last:
        return
    size = array.chunks[0]
    most = 2 * size * array.dtype.itemsize + 4096
    for begin in range(first - first % size, last, size):
        # Looked up as reading does it; it raises where there is none.
        stored = len(array.id.read_direct_chunk((begin,))[1])
        if stored > most:
            raise ValueError(f"{array.name} has a chunk of {stored:,} bytes: it is damaged or hostile")


def check_folder(path: str) -> None:
    """ValueError for a link in a local zarr folder that leads out of it."""
    top = Path(path).resolve()
    for folder, folders, files in os.walk(top):
        for name in [*folders, *files]:
            entry = os.path.join(folder, name)
            if os.path.islink(entry) and not Path(entry).resolve().is_relative_to(top):
                raise ValueError(f"{entry} is a link out of the folder, which is not followed")


def check_zarr(array: zarr.Array) -> None:
    """Nothing, if an array of a zarr folder can be read: codecs that only decode, chunks of a sane size."""
    about = array.metadata
    path = f"/{array.path}"
    if about.zarr_format == 2:
        codecs = [codec.get_config() for codec in (*(about.filters or ()), about.compressor) if codec]
        names = [str(codec["id"]) for codec in codecs]
    else:
        names = list(_codec_names(codec.to_dict() for codec in about.codecs))
        if getattr(about, "storage_transformers", ()):
            raise ValueError(f"{path} takes its values from elsewhere (a storage transformer)")
    for name in names:
        if name not in CODECS:
            raise ValueError(f"{path} is packed with the codec {name!r}: write it with zstd, gzip or blosc")
    size = max(array.dtype.itemsize, 1)
    if array.dtype.kind not in "biufSUOT":
        raise ValueError(f"{path} holds values of type {array.dtype}, which no AnnData needs")
    if min(array.shape, default=0) < 0 or min(array.chunks, default=1) < 1:
        raise ValueError(f"{path} has the shape {array.shape} in chunks of {array.chunks}")
    _check_chunk(path, _bytes(array.chunks, size))
    if array.shards is not None:
        inner = [-(-a // b) for a, b in zip(array.shards, array.chunks, strict=True)]
        # Each chunk of a shard takes 16 bytes of its index, which is read whole.
        _check_chunk(path, _bytes(tuple(inner), 16))


def _codec_names(codecs: Any) -> Iterator[str]:
    for codec in codecs:
        yield str(codec["name"])
        inside = codec.get("configuration") or {}
        for part in ("codecs", "index_codecs"):
            yield from _codec_names(inside.get(part) or ())


def item(group: Any, path: str) -> Any:
    """`group[path]` of a file that is guarded: an HDF5 file was walked, arrays of zarr are checked here.

    ValueError where there is no such part, or it lies elsewhere.
    """
    for name in path.split("/"):
        check_name(name)
        if not isinstance(group, h5py.Group | zarr.Group):
            raise ValueError(f"there is no {path}; the file is incomplete")
        if name not in group:
            raise ValueError(f"there is no {path}; the file is incomplete")
        group = group[name]
        if isinstance(group, zarr.Array):
            check_zarr(group)
    return group


def check_whole(array: Any) -> None:
    """ValueError for an array too large to be read whole, or that was not written whole."""
    size = _bytes(array.shape, max(array.dtype.itemsize, 1))
    if size > WHOLE:
        raise ValueError(f"{array.name} declares {size:,} bytes, more than names or columns take")
    if len(array.shape) == 1:
        check_chunks(array, 0, array.shape[0])


def whole(array: Any) -> np.ndarray:
    """All of an array that is small, or as long as there are cells."""
    check_whole(array)
    return np.asarray(array[...])
