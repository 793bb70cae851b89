"""Functions that read files, run in processes of their own: a file that crashes its reader fails alone."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import IO, Any

SECONDS = 900.0
"""Time that one call may take."""
MEMORY = 4 << 30
"""Bytes that a process may take beyond what it has once it has started."""
CODE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from {0} import serve
serve(int(sys.argv[2]))
"""
"""What a process runs. Not multiprocessing's own: that would import the command that was started again."""
BAD = "it is damaged or hostile, fetch it again"

Task = tuple[Any, ...]


def isolated(function: Callable[..., Any], *args: Any, seconds: float = SECONDS, memory: int = MEMORY) -> Any:
    """What `function(*args)` returns, run in another process. ValueError as in `Isolation.map`."""
    (found,) = isolated_map(function, [args], workers=1, seconds=seconds, memory=memory)
    if isinstance(found, ValueError):
        raise found
    return found


def isolated_map(
    function: Callable[..., Any],
    tasks: Sequence[Task],
    *,
    workers: int,
    names: Sequence[str] = (),
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> list[Any]:
    """What `function(*task)` returns for each task, or the ValueError it failed with, in order of the tasks.

    As `Isolation.map`, with processes that live for this call only.
    """
    with Isolation(workers=min(workers, max(len(tasks), 1)), seconds=seconds, memory=memory) as pool:
        return pool.map(function, tasks, names=names)


class Isolation:
    """Some processes that run functions, each kept as long as it does not crash.

    with Isolation(workers=2) as pool:
        results = pool.map(survey, [(url, settings), …])
    """

    def __init__(self, *, workers: int, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        if workers < 1 or seconds <= 0 or memory <= 0:
            raise ValueError(f"workers={workers}, seconds={seconds} and memory={memory} must be above 0")
        self.seconds = seconds
        self.memory = memory
        self._idle: list[_Worker] = []
        self._workers = workers

    def __enter__(self) -> "Isolation":
        return self

    def __exit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop().end()

    def map(
        self, function: Callable[..., Any], tasks: Sequence[Task], *, names: Sequence[str] = ()
    ) -> list[Any]:
        """What `function(*task)` returns for each task, or the ValueError it failed with, in order.

        `function` is one of an importable module, and what goes in and out can be pickled. `names`
        is what each task is called in messages, else its first argument. A ValueError is what the
        function raised itself, or says that its process crashed, took longer than `seconds`, needed more
        than `memory` bytes or ended with another error; the process is then replaced, and the other
        tasks go on. An error of `function` itself is thus told of each task, not raised.
        """
        assert function.__module__ != "__main__", "another process cannot import it"
        named = list(names) or [str(task[0]) if task else function.__name__ for task in tasks]
        found: list[Any] = [None] * len(tasks)
        waiting = list(range(len(tasks)))[::-1]
        busy: dict[_Worker, int] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self._workers:
                    worker = self._idle.pop() if self._idle else _Worker(self.memory)
                    busy[worker] = waiting.pop()
                    worker.start(function, tasks[busy[worker]], self.seconds)
                for worker in _ready(list(busy)):
                    number = busy.pop(worker)
                    found[number], alive = worker.result(named[number], self.seconds)
                    if alive:
                        self._idle.append(worker)
        finally:
            for worker in busy:
                worker.end()
        return found


@dataclass(frozen=True)
class _Failed:
    """That a call failed with a ValueError, or (`memory`) for want of memory."""

    reason: str
    memory: bool = False


class _Worker:
    """A process, seen from the one that started it."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._pipe, theirs = Pipe()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the process
        self._deadline = 0.0
        command = [sys.executable, "-c", CODE.format(__name__), json.dumps(sys.path), str(theirs.fileno())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[theirs.fileno()],
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        theirs.close()

    def start(self, function: Callable[..., Any], task: Task, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        try:
            self._pipe.send((function, task, seconds, self._memory))
        except BrokenPipeError:
            return  # it ended meanwhile, as `result` will tell

    @property
    def pipe(self) -> Connection:
        return self._pipe

    @property
    def left(self) -> float:
        """Seconds until it is out of time."""
        return max(0.0, self._deadline - time.monotonic())

    def result(self, name: str, seconds: float) -> tuple[Any, bool]:
        """What was returned, or a ValueError; and whether the process can be used again."""
        try:
            if not self._pipe.poll():
                self.end()
                late = f"{name}: reading it took longer than {seconds:,.0f} s; it was given up"
                return ValueError(late), False
            found = self._pipe.recv()
        except (EOFError, OSError):
            return ValueError(f"{name}: {self._last_words()}"), False
        if not isinstance(found, _Failed):
            return found, True
        if found.memory:
            # What it could not allocate may be missing anywhere: start anew.
            self.end()
            limit = f"more than {self._memory / 2**30:,.3g} GiB of memory"
            return ValueError(f"{name}: reading it needs {limit}; it is damaged, hostile or too large"), False
        return ValueError(found.reason if name in found.reason else f"{name}: {found.reason}"), True

    def _last_words(self) -> str:
        """How the process ended, and the file with it."""
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self.end()
        if code == -signal.SIGXCPU:
            return "reading it took too much processor time; it was given up"
        if code < 0:
            name = signal.Signals(-code).name
            return f"reading it crashed the reader (signal {-code}, {name}); {BAD}"
        # Notes may follow the line that names an error.
        errors = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b", line)]
        said = (errors or lines or [f"exit code {code}"])[-1][:300]
        return f"reading it failed ({said}); {BAD}"

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._pipe.close()
        self._log.close()


def _ready(workers: list[_Worker]) -> list[_Worker]:
    """Those that have something to tell, or are out of time."""
    told = wait([worker.pipe for worker in workers], timeout=min(worker.left for worker in workers))
    return [worker for worker in workers if worker.pipe in told or not worker.left]


def serve(pipe: int) -> None:
    """The other side: calls of functions until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(pipe)
    limited = False
    while True:
        try:
            # The function's modules are imported here, before memory is limited.
            function, task, seconds, memory = connection.recv()
        except EOFError:
            return
        if not limited:
            _limit(resource.RLIMIT_AS, _used_memory() + memory)
            limited = True
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 1)
        try:
            found = function(*task)
        except ValueError as error:
            found = _Failed(str(error))
        except MemoryError:
            found = _Failed("", memory=True)
        connection.send(found)


def _limit(kind: int, value: int) -> None:
    """Set the soft limit, as far as the hard one allows."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _used_memory() -> int:
    """Bytes of address space in use; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        return 0
