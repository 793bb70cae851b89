"""Calls done in parallel by Ray Data, each of which may fail, or end its process, alone."""

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from cellray import heap

Call = Callable[[], None]
ENDED = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
"""What Ray says of a process that did not return."""


def execute(calls: Sequence[Call]) -> Iterator[tuple[int, str]]:
    """Do `calls` in parallel; the index and the error of each, "" if there is none, as they get done.

    An error is the message of a ValueError, or says that the process ended: a call that took it
    down, by its memory or by a crash of a C library, is tried again alone. Other exceptions are
    raised as they are.
    """
    done = set()
    for index, error in _run(list(enumerate(calls)), tolerant=True):
        done.add(index)
        yield index, error
    for index in sorted(set(range(len(calls))) - done):
        try:
            yield from _run([(index, calls[index])], tolerant=False)
        except ENDED as error:
            yield index, f"the process that read it ended twice: {' '.join(str(error).split())[:300]}"


def _run(calls: Sequence[tuple[int, Call]], *, tolerant: bool) -> Iterator[tuple[int, str]]:
    """What comes back of `calls`; if `tolerant`, nothing comes of those that raise, or end their process."""
    if not calls:
        return
    hush()
    context = DataContext.get_current()
    before = context.max_errored_blocks
    logging.getLogger("ray.data").setLevel(logging.CRITICAL if tolerant else logging.ERROR)
    context.max_errored_blocks = -1 if tolerant else 0
    try:
        # Ray Data tries a task whose process ended again without end. The only way to say otherwise is
        # deprecated; the parameters that are to come instead do not have it yet.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            dataset = ray.data.read_datasource(
                Tasks(calls), override_num_blocks=len(calls), ray_remote_args={"max_retries": 1}
            )
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from zip(table["index"].to_pylist(), table["error"].to_pylist(), strict=True)
    finally:
        context.max_errored_blocks = before


class Tasks(Datasource):
    """Calls as a Ray Data source: one read task each, which gives its index and what went wrong, or ""."""

    def __init__(self, calls: Sequence[tuple[int, Call]]) -> None:
        super().__init__()
        self.calls = calls

    def estimate_inmemory_data_size(self) -> int:
        return 64 * len(self.calls)

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        about = BlockMetadata(num_rows=1, size_bytes=64, exec_stats=None)
        return [
            ReadTask(functools.partial(_outcome, i, call), about, per_task_row_limit=per_task_row_limit)
            for i, call in self.calls
        ]


def _outcome(index: int, call: Call) -> list[pa.Table]:
    """One row: `index`, and the message of the ValueError that `call` raised.

    As a value, because Ray would wrap an error that is raised in its own words.
    """
    heap.keep()
    error = ""
    try:
        call()
    except ValueError as found:
        error = str(found)
    return [pa.table({"index": [index], "error": [error]})]


def bound(work: Callable[..., None], *arguments: Any) -> Call:
    """`work(*arguments)` as a call; references to objects of Ray are fetched where it runs.

    An argument `(reference, index)` is an item of a list that was put.
    """
    return functools.partial(_fetch, work, arguments)


def _fetch(work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    found = []
    for argument in arguments:
        if isinstance(argument, tuple) and argument and isinstance(argument[0], ray.ObjectRef):
            found.append(ray.get(argument[0])[argument[1]])
        else:
            found.append(ray.get(argument) if isinstance(argument, ray.ObjectRef) else argument)
    work(*found)


def hush() -> None:
    """Keep Ray Data, in this process, from drawing bars of its own and from telling of its plans."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
