"""Crashes and full disks at every call that writes, one after the other.

Within `crashing`, the calls of this process that write are counted: opening a file to write, each
write, fsync, replace, rename, link, mkdir, unlink and rmdir, and each request that changes a bucket.
At a given one the process "dies": Crash is raised, there and by every such call after it, so that
no `finally` tidies up what a killed process would leave behind. What was written before stays.
"""

import builtins
import contextlib
import errno
import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import fsspec.asyn
import pytest
import s3fs

from cellray.data import storage
from cellray.train.recipe import Recipe

FILES = ("replace", "rename", "link", "symlink", "mkdir", "unlink", "remove", "rmdir", "truncate")
REQUESTS = (
    "put_object",
    "copy_object",
    "delete_object",
    "delete_objects",
    "create_multipart_upload",
    "upload_part",
    "complete_multipart_upload",
    "abort_multipart_upload",
)
FILLING = ("open", "write", "replace", "rename", "link", "symlink", "mkdir")
"""Calls that need room on the disk."""


class Crash(BaseException):
    """The process is dead."""


class Cut(Exception):
    """Crash, in the thread of a client, which takes care of exceptions alone."""


@dataclass
class Calls:
    """The calls that write, as they come, and at which of them what happens."""

    root: str
    """Calls on files elsewhere are not counted."""
    at: int | None = None
    """Number of the call that fails, from 1."""
    torn: bool = False
    """Whether it fails in the middle: half of the bytes are written, a request is done but not answered."""
    full: bool = False
    """Whether it fails, as all later ones that need room, since the disk is full; the process lives."""
    names: list[str] = field(default_factory=list)
    tearable: list[int] = field(default_factory=list)
    dead: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, name: str, *, tearable: bool = False) -> bool:
        """Count a call. True: do half of it, then call `end`. Raises if it is not to be done."""
        with self.lock:
            if self.dead:
                raise Crash
            if self.full and name not in FILLING:
                return False
            self.names.append(name)
            number = len(self.names)
            if tearable:
                self.tearable.append(number)
            if self.at is None or number < self.at or (number > self.at and not self.full):
                return False
            if tearable and self.torn:
                return True
        return self.end()

    def end(self) -> bool:
        """The process dies, or the disk is full."""
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.dead = True
        raise Crash

    def inside(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(self.root)


class File:
    """A file that is written to, without a buffer: what was written is there after a crash."""

    def __init__(self, file: Any, calls: Calls) -> None:
        self._file, self._calls = file, calls

    def write(self, data: Any) -> int:
        torn = self._calls.begin("write", tearable=True)
        done = int(self._file.write(data[: len(data) // 2] if torn else data))
        self._file.flush()
        if torn:
            self._calls.end()
        return done

    def writelines(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def crashing(root: str, at: int | None = None, *, torn: bool = False, full: bool = False) -> Iterator[Calls]:
    """Counts the calls that write below the folder `root` or to buckets; number `at` of them fails."""
    calls = Calls(os.path.abspath(root), at, torn, full)
    with pytest.MonkeyPatch.context() as patch:
        _patch_files(patch, calls)
        _patch_requests(patch, calls)
        yield calls


def _patch_files(patch: pytest.MonkeyPatch, calls: Calls) -> None:
    real_open, real_write = builtins.open, os.write

    def opened(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        if not set(mode) & set("wax+") or not calls.inside(file):
            return real_open(file, mode, *args, **more)
        calls.begin("open")
        return File(real_open(file, mode, *args, **more), calls)

    def fsync(fd: Any) -> None:
        # Not done: what the kernel has, a killed process does not lose.
        calls.begin("fsync")

    def write(fd: int, data: Any) -> int:
        # Pipes, sockets and terminals are no files that outlive the process.
        if not calls.inside(os.path.realpath(f"/proc/self/fd/{fd}")):
            return real_write(fd, data)
        torn = calls.begin("write", tearable=True)
        done = real_write(fd, bytes(data)[: len(data) // 2] if torn else data)
        if torn:
            calls.end()
        return done

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(path: Any, *args: Any, **more: Any) -> Any:
            if "dir_fd" in more or calls.inside(path):
                calls.begin(name)
            return real(path, *args, **more)

        return call

    patch.setattr(builtins, "open", opened)
    patch.setattr(io, "open", opened)
    patch.setattr(os, "fsync", fsync)
    patch.setattr(os, "write", write)
    for name in FILES:
        patch.setattr(os, name, counted(name))


def _patch_requests(patch: pytest.MonkeyPatch, calls: Calls) -> None:
    real_call, real_sync = s3fs.S3FileSystem._call_s3, fsspec.asyn.sync

    async def call_s3(self: Any, method: str, *args: Any, **more: Any) -> Any:
        try:
            torn = method in REQUESTS and calls.begin(method, tearable=True)
        except Crash:
            raise Cut from None
        answer = await real_call(self, method, *args, **more)
        if torn:
            with contextlib.suppress(Crash):
                calls.end()
            raise Cut
        return answer

    def sync(*args: Any, **more: Any) -> Any:
        try:
            return real_sync(*args, **more)
        except Cut:
            raise Crash from None

    patch.setattr(s3fs.S3FileSystem, "_call_s3", call_s3)
    patch.setattr(fsspec.asyn, "sync", sync)


def enumerate_crashes(
    root: str,
    places: Iterator[str],
    action: Callable[[str], Any],
    check: Callable[[str], Any],
    *,
    torn: bool = False,
    full: bool = False,
    every: int = 1,
    first: int = 1,
) -> int:
    """How many crash points of `action(place)` were tried: all, or each `every`th from the `first`.

    At each, with a fresh place: the action crashes (or finds the disk `full`), `check(place)` holds,
    and the action, done again, leaves the same files as one that was never disturbed. Files that a
    killed writer left behind and no reader looks for do not count: *.part.
    """
    action(next(places))  # what is done once in a process is no point to crash at
    place = next(places)
    with crashing(root, full=full) as calls:
        action(place)
    want, last = content(place), len(calls.names)
    assert want, "the action writes nothing"
    points = [k for k in range(first, last + 1, every) if not torn or k in calls.tearable]
    for k in points:
        place = next(places)
        with crashing(root, k, torn=torn, full=full) as calls:
            if full:
                with pytest.raises((OSError, ValueError), match=r"(?i)no space left"):
                    action(place)
            else:
                with pytest.raises(Crash):
                    action(place)
        where = f"{'torn' if torn else 'before'} call {k} of {last}, {calls.names[k - 1]}"
        try:
            check(place)
            action(place)
        except Exception as error:
            error.add_note(f"after a crash {where}")
            raise
        found = content(place)
        assert found.keys() == want.keys(), where
        assert found == want, where
        remove(place)
    return len(points)


def content(url: str) -> dict[str, bytes]:
    """Every file below `url` with what is in it, without *.part."""
    fs, path = storage.locate(url)
    found = fs.find(path) if fs.exists(path) else []
    names = [name for name in found if not name.endswith(".part")]
    return {name[len(path) :].lstrip("/"): fs.cat_file(name) for name in names}


def remove(url: str) -> None:
    fs, path = storage.locate(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def ingest_in_process(recipe: Recipe, store: str) -> dict[str, Any]:
    """The report of an ingest that is done in this process: no Ray, and no processes that read files."""
    from cellray.data.ingest import ingest

    with without_ray():
        return ingest(recipe, store)


@contextmanager
def without_ray() -> Iterator[None]:
    """`cellray.data.ingest` calls the functions that it calls elsewhere, in this process and in order."""
    from cellray.data import ingest, plan, work

    @dataclass(frozen=True)
    class Held:
        value: Any

    def execute(calls: Any) -> Iterator[tuple[int, str]]:
        for index, call in enumerate(calls):
            error = ""
            try:
                call()
            except ValueError as found:
                error = str(found)
            yield index, error

    def isolated_map(function: Callable[..., Any], tasks: Iterable[Any], **_: Any) -> list[Any]:
        found: list[Any] = []
        for task in tasks:
            try:
                found.append(function(*task))
            except ValueError as error:
                found.append(error)
        return found

    here = SimpleNamespace(put=Held, get=lambda held: held.value, ObjectRef=Held)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "execute", execute)
        patch.setattr(plan, "isolated_map", isolated_map)
        for module in (ingest, work):
            patch.setattr(module, "ray", here)
        yield
