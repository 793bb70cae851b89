"""A folder with pieces of remote files, kept for when they are read again, up to a limit."""

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cellray.data.shards import NAME

SPARE = 0.9
"""Share of the limit that is left in use when room is made, so that it is made rarely."""
ABANDONED = 3600.0
"""Seconds after which a half-written file is taken for one of a process that died."""


class Cache:
    """Pieces of files by key, in `folder`, together at most `limit` bytes; the ones unused longest go first.

    Any number of processes may share the folder. A piece appears whole; one that is gone or damaged
    is fetched again. Nothing is lost with the folder: it may be deleted at any time.
    """

    def __init__(self, folder: str, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"a cache of {limit:,} bytes holds nothing: give the bytes it may take")
        self.folder, self.limit = Path(folder).expanduser().absolute(), limit
        self.hits = self.misses = 0
        """Pieces that were here, and those that were fetched."""

    def get(self, key: str, fetch: Callable[[], bytes], good: Callable[[bytes], bool]) -> bytes:
        """The piece `key`, from here or by `fetch`. What `fetch` gives is kept if it is `good`.

        `key` names the content and is a plain file name. What `fetch` gives comes back, good or not.
        """
        path = self._path(key)
        data = _read(path)
        if data is not None and good(data):
            self.hits += 1
            _touch(path)
            return data
        self.misses += 1
        data = fetch()
        if good(data) and len(data) <= self.limit:
            self._keep(path, data)
        return data

    def size(self) -> int:
        """Bytes of all files in the folder."""
        return sum(size for _, _, size in self._files())

    def _path(self, key: str) -> Path:
        assert NAME.fullmatch(key), key
        return self.folder / key[:2] / key

    def _keep(self, path: Path, data: bytes) -> None:
        """Place a piece, after room was made for it. A full disk keeps nothing, and is no error."""
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as total:
                there = _size(path)
                self._make_room(total, len(data) - there)
                # Counted before it is there: who is killed in between leaves too high a number, and
                # then room is made too early, which counts anew.
                total.set(total.bytes + len(data) - there)
                part.write_bytes(data)
                os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def _make_room(self, total: "_Total", more: int) -> None:
        if total.bytes + more <= self.limit:
            return
        files = sorted(self._files())
        held = sum(size for _, _, size in files)
        for used, path, size in files:
            if held + more <= self.limit * SPARE or held <= 0:
                break
            if path.suffix == ".part" and time.time() - used < ABANDONED:
                continue
            path.unlink(missing_ok=True)
            held -= size
        total.set(held)

    def _files(self) -> Iterator[tuple[float, Path, int]]:
        """Time of last use, path and size of every piece."""
        for folder in self.folder.glob("??"):
            for path in folder.iterdir():
                try:
                    about = path.stat()
                except FileNotFoundError:
                    continue
                yield about.st_mtime, path, about.st_size

    @contextmanager
    def _locked(self) -> Iterator["_Total"]:
        """The bytes in the folder, as all processes agree; only one of them has it at a time."""
        file = os.open(self.folder / "total", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = os.pread(file, 32, 0)
            yield _Total(file, int(text) if text.strip().isdigit() else self.size())
        finally:
            os.close(file)


class _Total:
    """A number of bytes, and the file that holds it."""

    def __init__(self, file: int, found: int) -> None:
        self.bytes, self._file = found, file

    def set(self, number: int) -> None:
        self.bytes = number
        os.pwrite(self._file, f"{number:<31}\n".encode(), 0)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _touch(path: Path) -> None:
    """Note that a piece was used; it may have gone since."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return
