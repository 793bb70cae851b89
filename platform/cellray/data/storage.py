"""Files at any fsspec URL: read, write whole, write once, over connections that fail.

Requests are tried again in two places. The S3 client repeats a single request (5xx, throttling,
reset or stalled connection), for all that use the file systems of `locate`. Around it, the calls
of this module repeat themselves as a whole, with jitter and up to a deadline: for what the clients
do not repeat, such as bodies that are too short. Bytes that are wrong but as many as they should be
are found by their hash alone: `read_verified`.
"""

import contextlib
import errno
import functools
import hashlib
import io
import os
import posixpath
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from cellray.data import faults
from cellray.data.faults import retried

STALL = 15
"""Seconds without a byte after which a connection to S3 is given up."""
ATTEMPTS = 7
"""How often the S3 client sends one request. At 30 % errors, 2 of 10,000 requests fail that often."""
SLOWEST = 100_000
"""Bytes a second that a slow but sound connection carries; calls with many bytes get more time."""
PIECE = 16 << 20
"""Bytes of an object that are read with one request."""
SINGLE = 1 << 30
"""Objects up to this many bytes are written to S3 with one request: it leaves no parts if it fails."""
PART = 64 << 20
"""Bytes of a part of larger ones."""
WRONG = 4
"""How often bytes with another hash than they should have are read."""


def options(url: str) -> dict[str, Any]:
    """What fsspec is told about the file system of `url`: pass it on as `storage_options`.

    Listings are not cached: other processes write beside us. S3 requests are repeated, and stalled
    ones given up; fsspec's configuration (`FSSPEC_S3`, or its files) goes before ours, as do
    `AWS_MAX_ATTEMPTS` and `AWS_RETRY_MODE`.
    """
    found: dict[str, Any] = {"use_listings_cache": False}
    protocol = url.partition("://")[0]
    if protocol in ("s3", "s3a"):
        # Of botocore's modes, "legacy" alone repeats a 429 without an error code, and it has no
        # quota: that of "standard" runs out when a third of all requests fail for long.
        retries = {"mode": "legacy", "total_max_attempts": ATTEMPTS}
        ours: dict[str, Any] = {"connect_timeout": STALL, "read_timeout": STALL, "retries": retries}
        if {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
            del ours["retries"]
        for name in ("s3", "s3a"):
            ours |= fsspec.config.conf.get(name, {}).get("config_kwargs", {})
        found["config_kwargs"] = ours
    return found


def locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `url` and the path in it. Local paths come back absolute.

    Credentials come from the environment, as each fsspec backend documents.
    """
    return fsspec.core.url_to_fs(url, **options(url))


def join(url: str, *parts: str) -> str:
    """`url` with path parts below it, for local paths and URLs alike."""
    return posixpath.join(url.rstrip("/"), *parts)


def absolute(url: str) -> str:
    """`url` such that it means the same in another working directory."""
    return url if "://" in url else str(Path(url).expanduser().absolute())


def exists(url: str) -> bool:
    """Whether there is a file or folder at `url`. A server that cannot be reached is an error, not a no."""
    fs, path = locate(url)
    if isinstance(fs, LocalFileSystem):
        return bool(fs.exists(path))
    try:
        retried(url, lambda: fs.info(path, **_patience(fs, 0)))
    except FileNotFoundError:
        return False
    return True


def names(url: str) -> list[str]:
    """Names of what is in the folder at `url`, sorted; none where there is no folder."""
    fs, path = locate(url)
    try:
        found = _tried(url, fs, lambda: fs.ls(path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in found)


def remove_file(url: str) -> None:
    """Delete the file at `url`, if there is one."""
    fs, path = locate(url)
    with contextlib.suppress(FileNotFoundError):
        _tried(url, fs, lambda: fs.rm_file(path))


def remove_folder(url: str) -> None:
    """Delete the folder at `url` and all that is in it, if there is one."""
    fs, path = locate(url)
    with contextlib.suppress(FileNotFoundError):
        _tried(url, fs, lambda: fs.rm(path, recursive=True))


def _tried(url: str, fs: fsspec.AbstractFileSystem, call: Callable[[], Any]) -> Any:
    """`call`, which a server that fails is asked again; a local disk is not, and its errors stand."""
    return call() if isinstance(fs, LocalFileSystem) else retried(url, call)


def read_bytes(url: str) -> bytes:
    """The whole file. FileNotFoundError if there is none; ConnectionError if it could not be had.

    Never fewer bytes than the file has. An object of more than PIECE bytes that is replaced while
    it is read may come back mixed: check its hash.
    """
    fs, path = locate(url)
    if isinstance(fs, LocalFileSystem):
        return bytes(fs.cat_file(path))
    size = retried(url, lambda: _size(fs, path))
    return retried(url, lambda: _whole(fs, path)) if size <= PIECE else _in_pieces(url, size)


def read_verified(url: str, sha256: str) -> bytes:
    """The whole file, whose content has this `sha256`.

    A body with other bytes is read again, a few times. ValueError then names both hashes.
    """
    local = isinstance(locate(url)[0], LocalFileSystem)
    found = ""
    for number in range(1 if local else WRONG):
        if number:
            faults.pause(number)
        data = read_bytes(url)
        found = hashlib.sha256(data).hexdigest()
        if found == sha256:
            return data
    raise ValueError(
        f"{url} has sha256 {found[:16]}…, it should be {sha256[:16]}…: "
        "the file was changed or is incomplete. Restore it or make it anew."
    )


def open_blocks(url: str, block: int = 4 << 20) -> BinaryIO:
    """The file, open for reading. A remote one is read by blocks of `block` bytes, of which 32 are kept.

    Every block is repeated like a whole file and is never too short, which HDF5 would not notice.
    """
    fs, path = locate(url)
    if isinstance(fs, LocalFileSystem):
        return open(path, "rb")
    return cast(BinaryIO, _Blocks(url, block))


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file; a reader sees the old one, the new one, never a part."""
    fs, path = locate(url)
    if not isinstance(fs, LocalFileSystem):
        retried(url, lambda: _put(fs, path, data))
        return
    with _part(path, data) as part:
        os.replace(part, path)
    _sync_folder(path)


def write_once(url: str, data: bytes) -> bool:
    """Write a whole file unless one is there already: True if this call wrote it.

    Of several writers exactly one wins. Local files use a hard link, object stores their
    conditional PUT. If the reply to it is lost, what is there is compared with what was sent.
    ValueError for an object store without conditional PUTs.
    """
    fs, path = locate(url)
    if not isinstance(fs, LocalFileSystem):
        return _create(url, data)
    try:
        with _part(path, data) as part:
            os.link(part, path)
    except FileExistsError:
        return False
    _sync_folder(path)
    return True


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _patience(fs: fsspec.AbstractFileSystem, size: int) -> dict[str, float]:
    """The keyword that ends a call which transfers `size` bytes, however many bytes trickle in."""
    return {"timeout": faults.DEADLINE + size / SLOWEST} if isinstance(fs, AsyncFileSystem) else {}


def _size(fs: fsspec.AbstractFileSystem, path: str) -> int:
    return int(fs.info(path, **_patience(fs, 0))["size"] or 0)


def _whole(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    """All bytes of an object, with one request. OSError if some are missing."""
    size = _size(fs, path)
    # Asked for without a range: only then does the answer carry a checksum, which botocore checks.
    # A single stream, as s3fs would look up the size once more to find out whether to use several.
    more = {"max_concurrency": 1} if _is_s3(fs) else {}
    data = bytes(fs.cat_file(path, **more, **_patience(fs, size)))
    _enough(data, size)
    return data


def _in_pieces(url: str, size: int) -> bytes:
    """The `size` bytes of an object, several requests at a time; those that failed are done again."""
    fs, path = locate(url)
    held: dict[int, bytes] = {}

    def fetch() -> None:
        starts = [start for start in range(0, size, PIECE) if start not in held]
        stops = [min(start + PIECE, size) for start in starts]
        pieces = fs.cat_ranges([path] * len(starts), starts, stops, **_patience(fs, size))
        failed = None
        for start, stop, piece in zip(starts, stops, pieces, strict=True):
            if isinstance(piece, Exception):
                failed = piece
            elif len(piece) == stop - start:
                held[start] = bytes(piece)
        if failed is not None:
            raise failed
        _enough(b"".join(held.values()), size)

    retried(url, fetch)
    return b"".join(data for _, data in sorted(held.items()))


def _enough(data: bytes, size: int) -> None:
    if len(data) < size:
        raise OSError(errno.EIO, f"{len(data):,} of {size:,} bytes came")


def _is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    return "s3" in fs.protocol


def _put(fs: fsspec.AbstractFileSystem, path: str, data: bytes, **more: Any) -> None:
    """Write an object. One that is not whole is never seen: object stores show it at its end."""
    if _is_s3(fs):
        more["chunksize"] = SINGLE if len(data) <= SINGLE else PART
    if not _is_s3(fs) or len(data) <= SINGLE:
        # Several parts are not interrupted: s3fs removes them after an error, but not then.
        more |= _patience(fs, len(data))
    fs.pipe_file(path, data, **more)


def _create(url: str, data: bytes) -> bool:
    """`write_once` for object stores."""
    fs, path = locate(url)
    # Tells our object from one with the same bytes, if the reply that it was written got lost.
    mark = uuid.uuid4().hex
    more = {"Metadata": {"writer": mark}} if _is_s3(fs) else {}
    try:
        retried(url, lambda: _put_new(url, data, more))
    except FileExistsError:
        return retried(url, lambda: _is_ours(fs, path, data, mark))
    _check_conditional(url, data, more)
    return True


def _put_new(url: str, data: bytes, more: dict[str, Any]) -> None:
    """Write an object that is not there. FileExistsError if it is."""
    fs, path = locate(url)
    try:
        _put(fs, path, data, mode="create", **more)
    except OSError as error:
        status, code = faults.answer(error)
        if status == 412 or code in ("PreconditionFailed", "412"):
            raise FileExistsError(errno.EEXIST, "there already", path) from error
        if status == 501 or code == "NotImplemented":
            raise _unconditional(url, "does not implement") from error
        raise


def _is_ours(fs: fsspec.AbstractFileSystem, path: str, data: bytes, mark: str) -> bool:
    """Whether what is there is what this call wrote: by its mark where there is one, else by its bytes."""
    try:
        if _is_s3(fs):
            return bool(fs.metadata(path, **_patience(fs, 0)).get("writer") == mark)
        return _whole(fs, path) == data
    except FileNotFoundError:
        return False  # it was there a moment ago


_conditional: set[tuple[str, str]] = set()
"""File systems and buckets that have been seen to refuse a second PUT of the same name."""


def _check_conditional(url: str, data: bytes, more: dict[str, Any]) -> None:
    """ValueError if the store takes a second conditional PUT too; asked once for each bucket.

    Some servers ignore the condition, and then every writer would win.
    """
    fs, path = locate(url)
    key = (str(fs._fs_token), path.lstrip("/").partition("/")[0])
    if key in _conditional:
        return
    try:
        retried(url, lambda: _put_new(url, data, more))
    except FileExistsError:
        _conditional.add(key)
        return
    raise _unconditional(url, "ignores")


def _unconditional(url: str, does: str) -> ValueError:
    return ValueError(
        f"{url}: this object store {does} conditional writes (PUT with If-None-Match), so two runs that "
        "write here at the same time could not tell who was first. Use a store that has them, "
        "such as AWS S3 or Google Cloud Storage, or a folder of a shared file system."
    )


class _Blocks(io.RawIOBase):
    """A remote file, read by blocks that are whole."""

    def __init__(self, url: str, block: int) -> None:
        self._url, self._block, self._at = url, block, 0
        self._fs, self._path = locate(url)
        about = retried(url, lambda: self._fs.info(self._path, **_patience(self._fs, 0)))
        self._size = int(about["size"])
        self._held = functools.lru_cache(maxsize=32)(self._fetch)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and self._at < self._size:
            number, start = divmod(self._at, self._block)
            piece = self._held(number)[start : start + len(view) - done]
            view[done : done + len(piece)] = piece
            done += len(piece)
            self._at += len(piece)
        return done

    def _fetch(self, number: int) -> bytes:
        start = number * self._block
        stop = min(start + self._block, self._size)

        def call() -> bytes:
            data = bytes(
                self._fs.cat_file(self._path, start=start, end=stop, **_patience(self._fs, stop - start))
            )
            _enough(data, stop - start)
            return data

        return retried(self._url, call)


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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = f"{error.strerror}: {len(data):,} bytes are needed. Make room and run this again"
        raise OSError(error.errno, why, path) from error
    finally:
        Path(part).unlink(missing_ok=True)


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
