"""Files at any fsspec URL: read, write whole, write once."""

import hashlib
import os
import posixpath
import uuid
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


def locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `url` and the path in it. Local paths come back absolute.

    Credentials come from the environment, as each fsspec backend documents.
    """
    return fsspec.core.url_to_fs(url)


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
    part = _write_part(path, data)
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
    part = _write_part(path, data)
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(part)
    _sync_folder(path)
    return True


def _write_part(path: str, data: bytes) -> str:
    """A synced file beside `path`, under a name that no reader looks for."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}.{uuid.uuid4().hex}.part"
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return part


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
