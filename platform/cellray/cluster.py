"""Connect to Ray safely, and take this code along.

Ray's control plane runs whatever it is sent, so whoever reaches it owns the machine. A cluster started
here listens on the loopback address alone; one at an address is spoken to with a token or not at all.
"""

import fcntl
import importlib.util
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import cellray

APPLICATIONS = ("pipelines", "tune", "serve")
"""Packages beside the library that workers need too, where they can be imported."""

LOCAL = {
    # Named for other systems, yet on every system the only switch that makes Ray listen on 127.0.0.1 alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
}
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


_started: list[str] = []
"""Folder of the cluster that `connect` has started, while it is there."""


def prepare(address: str | None = None) -> None:
    """Set the environment that `connect` needs. Ray reads it once, when it is first imported.

    `connect` does it too; call this first where something imports Ray before `connect` is called.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if _remote(address):
        return
    if "ray" in sys.modules and any(os.environ.get(name) != value for name, value in LOCAL.items()):
        raise RuntimeError(
            "Ray was imported before cellray.cluster.prepare() was called, so it would listen on every "
            "network interface. Call cellray.cluster.prepare() first, then import ray."
        )
    os.environ.update(LOCAL)
    os.environ.setdefault("RAY_enable_metrics_collection", "0")  # half the time of a start
    if not _has_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def exposed() -> bool:
    """Whether a Ray that this process started by other means than `connect` would listen to the network."""
    return not _remote(None) and any(os.environ.get(name) != value for name, value in LOCAL.items())


def own() -> bool:
    """Whether Ray was started by `connect` on this machine: no node will ever join it."""
    return bool(_started)


@contextmanager
def connect(
    address: str | None = None,
    *,
    cpus: int | None = None,
    threads: int = 1,
    object_store_bytes: int = 512 << 20,
    worker_output: bool = False,
) -> Iterator[None]:
    """Ray for the body of a `with`; inside another `connect`, the same one.

    Without an address (nor `RAY_ADDRESS`), or with "local", a cluster is started on this machine, reached
    from this machine only, and ended with all its files. It has `cpus` logical CPUs; by default as many
    as there are, at least 4, so that two training workers and what drives them fit on two cores.

    Else an address is `host:port` of a cluster's head; `RAY_AUTH_MODE=token` and a token are demanded.

    Workers use this library and the application folders beside it, whatever is installed where they run:
    on this machine from here, so that what is compiled once stays compiled, elsewhere they are sent. They
    have `threads` CPU threads for each process unless a task sets its own.

    ValueError for an address without a token, of another form, or where nothing answers.
    """
    remote = _remote(address)
    if remote:
        _check(remote)
    prepare(address)
    import ray

    if ray.is_initialized():
        yield
        return
    env = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} | QUIET
    if remote:
        runtime_env: dict[str, Any] = {
            "py_modules": [str(package) for package in packages()],
            "env_vars": env,
        }
    else:
        paths = [*(str(package.parent) for package in packages()), os.environ.get("PYTHONPATH", "")]
        runtime_env = {"env_vars": env | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths)))}}
    with nullcontext() if remote else scratch(_short_folder()) as folder:
        try:
            if folder is None:
                _join(remote, runtime_env, worker_output)
            else:
                ray.init(
                    address="local",
                    num_cpus=cpus or max(4, os.cpu_count() or 1),
                    include_dashboard=False,
                    object_store_memory=object_store_bytes,
                    log_to_driver=worker_output,
                    logging_level=logging.ERROR,
                    runtime_env=runtime_env,
                    _temp_dir=folder,
                )
                _started.append(folder)
            yield
        finally:
            ray.shutdown(wait_for_processes=True)
            _started.clear()


@contextmanager
def scratch(parent: str | None = None) -> Iterator[str]:
    """A temporary folder, removed in the end; what killed processes have left beside it is removed now.

    It lies in `parent`, by default where temporary files go. Whoever has one holds a lock in it, which ends
    with the process however that ends.
    """
    parent = parent or tempfile.gettempdir()
    for mark in Path(parent).glob("cellray-*/alive"):
        # An OSError: its owner lives, has just removed it, or is another user.
        with suppress(OSError):
            if mark.parent.lstat().st_uid == os.getuid():
                with mark.open() as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(mark.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="cellray-", dir=parent))
    try:
        with (folder / "begun").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            (folder / "begun").rename(folder / "alive")  # others see it when it is locked, not before
            yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def packages() -> list[Path]:
    """Folders of the packages that workers use: the library, and the applications found here."""
    specs = [importlib.util.find_spec(name) for name in APPLICATIONS]
    origins = [spec.origin for spec in specs if spec is not None and spec.origin is not None]
    return [Path(origin).parent for origin in [cellray.__file__, *origins]]


def _remote(address: str | None) -> str:
    """host:port of the cluster to join, "" where one is to be started here."""
    named = address or os.environ.get("RAY_ADDRESS", "")
    return "" if named == "local" else named


def _join(address: str, runtime_env: dict[str, Any], worker_output: bool) -> None:
    import ray

    try:
        ray.init(
            address=address,
            log_to_driver=worker_output,
            logging_level=logging.ERROR,
            runtime_env=runtime_env,
        )
    except ConnectionError as error:
        # Ray says the same of a wrong token as of a cluster that is gone.
        raise ValueError(
            f"Ray at {address} answers but lets nobody in: its token may be another than the one in "
            "RAY_AUTH_TOKEN here, or it may be no Ray head (the port is 6379 by default)."
        ) from error


def _check(address: str) -> None:
    """ValueError unless `address` is one that may be connected to, and something listens there."""
    match = re.fullmatch(r"([^/\s]+):(\d+)", address)
    if not match:
        raise ValueError(
            f"Ray address {address!r} is not host:port. Name the head of the cluster, as in 10.0.0.5:6379; "
            "from outside of the cluster submit the command as a job (`ray job submit`, or a RayJob)."
        )
    if os.environ.get("RAY_AUTH_MODE") != "token" or not _has_token():
        raise ValueError(
            f"Ray at {address} would be spoken to without a token, and an open Ray runs anybody's code. "
            "Start it with RAY_AUTH_MODE=token, then set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here too."
        )
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=5).close()
    except OSError as error:
        raise ValueError(
            f"nothing answers at Ray address {address} ({error}). Is the cluster up, and this its head?"
        ) from None


def _has_token() -> bool:
    """Whether Ray will find a token: in the environment, else in a file."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return (Path(named) if named else Path.home() / ".ray" / "auth_token").is_file()


def _short_folder() -> str | None:
    """Where Ray's sockets may live: their paths may have 107 bytes, and Ray's own part takes 80."""
    return None if len(tempfile.gettempdir()) <= 12 else "/tmp"
