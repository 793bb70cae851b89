"""The inside of a driver: deliver cells when told to, and say what it cost.

Runs in environments that have nothing but the standard library and one competitor.
A driver says {"ready": …}, then answers each line of commands with one line of JSON:
`round SECONDS [CELLS]` delivers for so long and so many, `quality BATCHES` tells where the cells of
some batches come from, `memory` the peak of resident memory so far. It ends where they end.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

MARK = "CELLRAY_BENCH_MARK"
"""Environment variable that a driver and all its descendants carry, whoever their parent becomes."""

Delivery = tuple[int, int, Any]
"""Cells and tokens of a batch, and what `origins` needs to tell the source rows of its cells."""


def serve(
    deliveries: Callable[[], Iterator[Delivery]],
    *,
    window: int = 1,
    first: int = 1,
    origins: Callable[[Any], Iterable[int]] | None = None,
    whole: bool = False,
    about: str = "",
    commands: TextIO | None = None,
    answers: TextIO | None = None,
) -> None:
    """Answer commands until there are no more.

    `deliveries` starts one pass over the data; passes follow each other without end. A round ends
    where a multiple of `window` batches was delivered: what a loader decodes at a time, so that it is
    paid for in the round that uses it. `first` batches, which open files and compile, come before all
    rounds. `whole` counts the CPU time of all descendants too.
    """
    commands = commands or sys.stdin
    answers = answers or os.fdopen(os.dup(1), "w")
    if answers.fileno() != 1:
        os.dup2(2, 1)  # what a library prints is no answer
    endless = _endless(deliveries)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    for _ in range(first):
        next(endless)
    answer(ready=about)
    for line in commands:
        name, _, value = line.strip().partition(" ")
        if name == "round":
            seconds, _, least = value.partition(" ")
            answer(**_round(endless, float(seconds), int(least or 0), window, whole))
        elif name == "quality":
            assert origins is not None
            batches = [next(endless)[2] for _ in range(int(value))]
            answer(origins=[[int(row) for row in origins(batch)] for batch in batches])
        elif name == "memory":
            answer(**memory())
        else:
            raise ValueError(f"unknown command {line!r}")


def _endless(deliveries: Callable[[], Iterator[Delivery]]) -> Iterator[Delivery]:
    while True:
        yield from deliveries()


def _round(
    stream: Iterator[Delivery], seconds: float, least: int, window: int, whole: bool
) -> dict[str, float]:
    settle()
    mark = os.environ[MARK]
    cells = tokens = batches = 0
    cpu, tree, start = own_cpu(), tree_cpu(mark), time.perf_counter()
    while time.perf_counter() - start < seconds or cells < least or batches % window:
        found, more, _ = next(stream)
        cells, tokens, batches = cells + found, tokens + more, batches + 1
    wall = time.perf_counter() - start
    settle()
    cpu, tree = own_cpu() - cpu, tree_cpu(mark) - tree
    cpu = tree if whole else cpu
    return {"cells": cells, "tokens": tokens, "batches": batches, "wall": wall, "cpu": cpu, "tree": tree}


def settle(limit: float = 2.0) -> None:
    """Wait until threads that read ahead have nothing left to do, `limit` seconds at the most.

    Read-ahead that a round leaves behind is the next one's gift; waiting at both ends evens it out.
    """
    end = time.monotonic() + limit
    while time.monotonic() < end:
        before = own_cpu()
        time.sleep(0.05)
        if own_cpu() - before < 0.005:
            return


def own_cpu() -> float:
    """CPU-seconds of this process, all its threads, and the children it waited for."""
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def tree_cpu(mark: str) -> float:
    """CPU-seconds of all living processes that carry `mark`, and of their children that ended."""
    tick = os.sysconf("SC_CLK_TCK")
    found = 0
    for folder in marked(mark):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found += sum(int(field) for field in fields[11:15])
    return found / tick


def marked(mark: str) -> list[Path]:
    """/proc folders of the living processes that carry `mark`."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder)
        except OSError:
            continue
    return found


def memory(folder: str = "/proc/self") -> dict[str, float]:
    """Peak of resident memory, pages of mapped files included, and what is anonymous of it now; in MB."""
    status = dict(
        line.split(":", 1) for line in Path(folder, "status").read_text().splitlines() if ":" in line
    )
    kib = {key: int(status[name].split()[0]) for key, name in _STATUS.items()}
    return {key: value * 1024 / 1e6 for key, value in kib.items()}


_STATUS = {"peak": "VmHWM", "anonymous": "RssAnon"}
