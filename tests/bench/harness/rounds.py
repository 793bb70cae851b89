"""Drivers: one process for each competitor, measured in turns so that all meet the same weather."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.bench.harness.serve import MARK, marked

ROOT = Path(__file__).resolve().parents[3]
"""The root of the repository."""

ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"),
    "1",
)
KEEP = {"RAY_idle_worker_killing_time_threshold_ms": "3600000"}
"""Ray ends workers that were idle for a second, and what they have used would be missing from the sum."""


@dataclass(frozen=True)
class Measured:
    """One round of one driver."""

    cells: int
    tokens: int
    batches: int
    wall: float
    cpu: float
    """CPU-seconds, of the process or, where it is a whole cluster, of all."""
    tree: float
    """CPU-seconds of all processes that the driver brought along, in clock ticks of the system."""

    @property
    def rate(self) -> float:
        """Cells per CPU-second."""
        return self.cells / max(self.cpu, 1e-9)


@dataclass
class Driver:
    """A process that delivers cells on command; `python` is the interpreter of its environment.

    It is measured on one core, the last of those allowed here, and with one thread in every library
    that can be told so; what threads remain are counted by their CPU time.
    """

    name: str
    module: str
    arguments: Sequence[str] = ()
    python: str = sys.executable
    pinned: bool = True
    """Whether it has one core; else all that are allowed here."""
    optional: bool = False
    """Whether the others are measured without it where it does not start; see `failed`."""
    cluster: bool = False
    """Whether it brings a Ray along, which takes longest to start."""
    rounds: list[Measured] = field(default_factory=list)
    about: str = ""
    failed: str = ""
    """Why an optional one did not start."""
    is_ready: bool = False
    process: "subprocess.Popen[str] | None" = None

    def launch(self, core: int | None = None) -> None:
        """Start it and come back at once; `ready` waits. It has `core` to itself until it is ready."""
        self.mark = uuid.uuid4().hex
        where = ["taskset", "-c", str(_measured() if core is None else core)] if self.pinned else []
        path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
        environment = os.environ | ONE_THREAD | KEEP | {"PYTHONPATH": path, MARK: self.mark}
        self.process = subprocess.Popen(
            [*where, self.python, "-m", self.module, *self.arguments],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ready(self) -> None:
        """Wait until it has delivered its first batch. RuntimeError if it ends before."""
        if self.is_ready:
            return
        try:
            self.about = self._answer()["ready"]
            self.is_ready = True
        except RuntimeError as error:
            if not self.optional:
                raise
            self.failed = str(error)
        if self.pinned and self.is_ready:
            move(self.mark, _measured())

    def start(self, core: int) -> None:
        """Launch it, and wait until it is ready."""
        self.launch(core)
        self.ready()

    def __enter__(self) -> "Driver":
        self.launch()
        try:
            self.ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def dismiss(self) -> None:
        """Tell it that there are no more commands; it ends by itself."""
        assert self.process
        assert self.process.stdin
        if not self.process.stdin.closed:
            with suppress(BrokenPipeError):
                self.process.stdin.close()

    def close(self) -> None:
        """Dismiss it and wait for its end."""
        assert self.process
        assert self.process.stdout
        self.dismiss()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def ask(self, command: str) -> dict[str, Any]:
        """The answer to one command."""
        assert self.process
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"its driver ended with status {self.process.wait()}, see what it printed")
        return dict(json.loads(line))

    @property
    def rates(self) -> list[float]:
        """Cells per CPU-second of each round."""
        return [measured.rate for measured in self.rounds]


def in_turns(drivers: Sequence[Driver], *, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Run A B C A B C …, `seconds` each; the rounds are left in the drivers. Peak memory of each driver.

    All are started before the first round and one runs at a time.
    """
    for _ in range(rounds):
        for driver in drivers:
            driver.rounds.append(Measured(**driver.ask(f"round {seconds}")))
    return {driver.name: driver.ask("memory") for driver in drivers}


@contextmanager
def started(drivers: Sequence[Driver]) -> Iterator[None]:
    """All of `drivers`, running, for the body of a `with`.

    They start side by side, each on one core as it will be measured but not all on the same, those
    with a Ray first and no more at a time than there are cores: a Ray that is starved while it starts gives
    up. Those that are optional and do not start have `failed`.
    """
    cores = sorted(os.sched_getaffinity(0), reverse=True)
    order = sorted(drivers, key=lambda driver: not driver.cluster)
    try:
        # One more, as a Ray that starts mostly waits.
        with ThreadPoolExecutor(len(cores) + 1) as pool:
            on = [cores[number % len(cores)] for number in range(len(order))]
            for _ in pool.map(Driver.start, order, on):
                pass
        yield
    finally:
        running = [driver for driver in order if driver.process]
        for driver in running:
            driver.dismiss()
        for driver in running:
            driver.close()


def move(mark: str, core: int) -> None:
    """Leave `core` alone to every thread of every process that carries `mark`."""
    moved: set[str] = set()
    while fresh := {thread.name for folder in marked(mark) for thread in _threads(folder)} - moved:
        for thread in fresh:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), {core})
        moved |= fresh


def _threads(process: Path) -> list[Path]:
    try:
        return list((process / "task").iterdir())
    except OSError:
        return []


def _measured() -> int:
    """The core on which drivers are measured."""
    return max(os.sched_getaffinity(0))
