"""Who drives a run: one process at a time, on a disk or an object store. No Ray.

RUN/drivers/000001.json, 000002.json, …     the highest number drives, or was the last that did

A driver writes the next number, which exactly one can, and goes on writing a count into its file. Who
comes later watches that count: if it moves, the driver lives and the run is refused; if it stands still
for EXPIRY, the driver is dead and the next number is taken. No clocks are compared. On the same machine
a driver that was killed is known at once by its process.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cellray.data import storage
from cellray.train.ending import Stopped

BEAT = 3.0
"""Seconds between two signs of life."""
EXPIRY = 30.0
"""Seconds without a sign of life after which a driver counts as dead; ten beats."""
PATIENCE = 3.0
"""Seconds that a driver which ends waits, at the most, until its last word is written."""

Facts = dict[str, Any]


@contextmanager
def held(
    run: str, say: Callable[[str], None], *, stop: threading.Event, lost: threading.Event
) -> Iterator[None]:
    """Drive the run at the URL `run` while the body runs. ValueError if somebody else does.

    If the last driver died without a word this waits up to EXPIRY, and `say` hears of it; Stopped if
    `stop` is set meanwhile. `lost` is set if another takes the run, as one may when this process could
    not write for EXPIRY.
    """
    folder = storage.join(run, "drivers")
    number, facts = _take(folder, run, say, stop)
    over = threading.Event()
    thread = threading.Thread(
        target=_beat, args=(folder, number, facts, over, lost), name="lease", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(PATIENCE)


def _take(folder: str, run: str, say: Callable[[str], None], stop: threading.Event) -> tuple[int, Facts]:
    """The number under which this process drives from now on, and what its file says."""
    mine = {**_identity(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", "beat": 0}
    while True:
        found = _numbers(folder)
        newest = found[-1] if found else 0
        if found:
            _await_end(folder, newest, run, say, stop)
        number = newest + 1
        if not storage.write_once(_path(folder, number), json.dumps(mine).encode()):
            continue  # another was quicker, and is looked at now
        if _numbers(folder)[-1] > number:
            # This process slept through another's time, whose number is gone. Theirs is the later one.
            continue
        for old in found:
            storage.remove_file(_path(folder, old))
        return number, mine


def _await_end(folder: str, number: int, run: str, say: Callable[[str], None], stop: threading.Event) -> None:
    """Return when the driver of that number has ended. ValueError as soon as it shows that it lives."""
    first = _read(folder, number)
    if _ended(first):
        return
    if not _same_machine(first):
        say(f"{run} was being trained by {_name(first)}; waiting up to {EXPIRY:.0f} s to see if it still is")
        until = time.monotonic() + EXPIRY
        while time.monotonic() < until:
            if stop.wait(BEAT / 3):
                raise Stopped
            now = _read(folder, number)
            if _ended(now):
                return
            if now != first:
                break
        else:
            return
    raise ValueError(
        f"{run} is being trained by {_name(first)}. Wait for it to end, or end it there with "
        f"`kill {first.get('pid')}`, after which it saves and leaves; or give this run a folder of its "
        "own with run=…"
    )


def _ended(facts: Facts) -> bool:
    """Whether a driver is known to have ended: it said so, or its process on this machine is gone."""
    if facts.get("released"):
        return True
    return _same_machine(facts) and facts.get("started") != _started(int(facts.get("pid", 0)))


def _same_machine(facts: Facts) -> bool:
    """Whether the process ids of a driver mean the same here."""
    return bool(facts.get("machine")) and facts["machine"] == _machine()


def _name(facts: Facts) -> str:
    who = f"process {facts.get('pid', '?')} on {facts.get('host', '?')}"
    return f"{who}, since {facts.get('since', '?')}"


def _identity() -> Facts:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "machine": _machine(), "started": _started(pid)}


def _machine() -> str:
    """This start of this system, and this namespace of process ids; "" where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When the process began, in the system's own ticks; "" if there is none. Ids are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _beat(folder: str, number: int, facts: Facts, over: threading.Event, lost: threading.Event) -> None:
    """Show that this process lives until `over`, then that it has ended; set `lost` when another drives.

    The last word is said here too: were it said elsewhere, a sign of life that a slow store is still
    writing could come after it.
    """
    while not over.wait(BEAT):
        facts["beat"] += 1
        with suppress(OSError):  # a store that fails now is asked again; nobody else can write to it either
            if _numbers(folder)[-1:] != [number]:
                lost.set()
                return
            _write(folder, number, facts)
    with suppress(OSError):  # then its silence says it
        _write(folder, number, {**facts, "released": True})


def _path(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:06d}.json")


def _write(folder: str, number: int, facts: Facts) -> None:
    storage.write_bytes(_path(folder, number), json.dumps(facts).encode())


def _read(folder: str, number: int) -> Facts:
    """What a driver wrote; {"released": True} if a later one has done away with it."""
    try:
        facts: Facts = json.loads(storage.read_bytes(_path(folder, number)))
    except FileNotFoundError:
        return {"released": True}
    return facts


def _numbers(folder: str) -> list[int]:
    """Numbers of all drivers that are known, rising."""
    return [int(name[:6]) for name in storage.names(folder) if re.fullmatch(r"\d{6}\.json", name)]
