"""Drivers: one process for each competitor, measured in turns so that all meet the same weather."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.bench.harness.serve import MARK

ROOT = Path(__file__).resolve().parents[3]
"""The root of the repository."""

ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"),
    "1",
)


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

    It runs on one core, the last of those allowed here, and with one thread in every library that
    can be told so; what threads remain are counted by their CPU time.
    """

    name: str
    module: str
    arguments: Sequence[str] = ()
    python: str = sys.executable
    rounds: list[Measured] = field(default_factory=list)
    about: str = ""

    def __enter__(self) -> "Driver":
        self.mark = uuid.uuid4().hex
        code = [*_one_core(), self.python, "-m", self.module, *self.arguments]
        path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": path, MARK: self.mark}
        self.process = subprocess.Popen(
            code,
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self.about = self._answer()["ready"]
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        """A driver ends where its commands do."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def ask(self, command: str) -> dict[str, Any]:
        """The answer to one command."""
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
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


def started(drivers: Sequence[Driver]) -> ExitStack:
    """All of `drivers`, running, for the body of a `with`."""
    with ExitStack() as stack:
        for driver in drivers:
            stack.enter_context(driver)
        return stack.pop_all()


def _one_core() -> list[str]:
    return ["taskset", "-c", str(max(os.sched_getaffinity(0)))]
