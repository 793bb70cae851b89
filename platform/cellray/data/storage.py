"""Files at any fsspec URL: read, write whole, write once."""

import hashlib
import os
import posixpath
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


def locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `url` and the path in it. Local paths come back absolute.

    Credentials come from the environment, as each fsspec backend documents. Listings are not
    cached: other processes write beside us.
    """
    return fsspec.core.url_to_fs(url, use_listings_cache=False)


def join(url: str, *parts: str) -> str:
    """`url` with path parts below it, for local paths and URLs alike."""
    return posixpath.join(url.rstrip("/"), *parts)


def absolute(url: str) -> str:
    """`url` such that it means the same in another working directory."""
    return url if "://" in url else str(Path(url).expanduser().absolute())


def exists(url: str) -> bool:
    fs, path = locate(url)
    return bool(fs.exists(path))


def read_bytes(url: str) -> bytes:
    fs, path = locate(url)
    return bytes(fs.cat_file(path))


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file; a reader sees the old one, the new one, never a part."""
    fs, path = locate(url)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    with _part(path, data) as part:
        os.replace(part, path)
    _sync_folder(path)


def write_once(url: str, data: bytes) -> bool:
    """Write a whole file unless one is there already: True if this call wrote it.

    Of several writers exactly one wins. Local files use a hard link, object stores their
    conditional PUT.
    """
    fs, path = locate(url)
    if not isinstance(fs, LocalFileSystem):
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True
    try:
        with _part(path, data) as part:
            os.link(part, path)
    except FileExistsError:
        return False
    _sync_folder(path)
    return True


@contextmanager
def _part(path: str, data: bytes) -> Iterator[str]:
    """A synced file beside `path`, under a name that no reader looks for; gone in the end."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}.{uuid.uuid4().hex}.part"
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield part
    finally:
        Path(part).unlink(missing_ok=True)


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
