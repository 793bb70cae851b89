"""Workers that write down what their feed hands them, step by step, until they are killed.

`python -m tests.elastic_worker` forks them: it has imported everything and compiled what is compiled,
so a worker lives within milliseconds of its order. It has no thread, of which a fork would take the
locks along and not the thread. Neither Ray nor torch is imported.

Orders are lines of JSON on standard input, one a phase; to each it answers with the ids of the workers.
The order "reap" is answered, when all of them have ended, with how they did; when there are no more
orders it kills those that are left.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cellray.data.copying import copy_pieces
from cellray.data.store import Batch, Store
from cellray.train.feed import Feed, Plan


class Line(NamedTuple):
    """What one worker got for one step."""

    step: int
    rank: int
    world: int
    cells: list[str]
    """Row and hash of the content of every cell, in the order of the share."""


def plan(store: Store, seed: int, weighted: bool) -> Plan:
    """Some 60 steps over 400 cells, in windows of one or two record batches, that end within an epoch.

    Weighted, a fifth of the cells have no weight and the rest weights of all sizes.
    """
    rng = np.random.default_rng(seed)
    weights = None
    if weighted:
        weights = rng.lognormal(sigma=1.0, size=len(store)) * (rng.random(len(store)) < 0.8)
    return Plan(
        starts=store.starts,
        lengths=np.sum([store.lengths(name) for name in store.names], axis=0),
        eligible=rng.random(len(store)) < 0.9,
        seed=seed,
        epochs=2.5,
        tokens=1 << 40,
        cells=16,
        window=1 + seed % 2,
        weights=weights,
    )


def cells(batch: Batch) -> list[str]:
    """Row and hash of the content of every cell of a batch: its modalities, tokens, counts and totals."""
    found = []
    for i, row in enumerate(batch.rows.tolist()):
        digest = hashlib.blake2b(int(batch.present[i]).to_bytes(4, "little"), digest_size=8)
        for name, counts in sorted(batch.counts.items()):
            mine = slice(counts.offsets[i], counts.offsets[i + 1])
            for part in (counts.ids[mine], counts.counts[mine], counts.total[i : i + 1]):
                # As one type: which of them is narrow enough says nothing about the cell.
                digest.update(f"{name}:{len(part)}:".encode() + part.astype(np.int64).tobytes())
        found.append(f"{row}:{digest.hexdigest()}")
    return found


def work(order: dict[str, Any], rank: int) -> None:
    """Write a line a step to the worker's file, to the end of the plan."""
    world, pause = len(order["files"]), order["pauses"][rank]
    rng = np.random.default_rng([order["seed"], order["first"], rank])
    store = Store(order["store"])
    found = plan(store, order["seed"], order["weighted"])
    with (
        Path(order["files"][rank]).open("w") as file,
        Feed(store, found, first=order["first"], rank=rank, world=world) as feed,
    ):
        # As in a training, nobody is far into the steps before the last one is there.
        while not all(map(os.path.exists, order["files"])):
            time.sleep(0.001)
        for share in feed:
            line = json.dumps(Line(share.step, rank, world, cells(share.batch))) + "\n"
            # In two writes, with time for a kill between them, which leaves a torn line. The pauses
            # stand for the step of a training: the threads that read ahead are found idle as well.
            for half in (line[: len(line) // 2], line[len(line) // 2 :]):
                time.sleep(pause / 2 * rng.exponential())
                file.write(half)
                file.flush()


def lines(path: Path) -> list[Line]:
    """What a worker wrote down, without a last line that was torn by a kill."""
    text = path.read_text() if path.exists() else ""
    return [Line(*json.loads(line)) for line in text.split("\n")[:-1]]


def fork(order: dict[str, Any], rank: int) -> int:
    """The id of a new process that is worker `rank`."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        work(order, rank)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        # Not by an exception: the copy of the loop below would go on with the orders.
        os._exit(status)


def main() -> None:
    one = np.zeros(1, np.int64)
    copy_pieces(one, one, one, np.array([one.ctypes.data]))
    assert not {"ray", "torch"} & sys.modules.keys()
    alive: list[int] = []
    try:
        # Not `for line in sys.stdin`, which reads ahead.
        while line := sys.stdin.readline():
            order = json.loads(line)
            if order == "reap":
                answer = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in alive]
                alive = []
            else:
                threads = Path("/proc/self/task")
                assert threading.active_count() == 1
                assert not threads.is_dir() or len(list(threads.iterdir())) == 1
                answer = alive = [fork(order, rank) for rank in range(len(order["files"]))]
            print(json.dumps(answer), flush=True)
    finally:
        for process in alive:
            os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main()
