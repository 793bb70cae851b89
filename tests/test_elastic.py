"""Training goes on with another number of workers after a kill: no batch is lost, doubled or changed.

1, 2, 4, 3 and again 1 worker processes go over one plan. All but the last are killed at a random step,
and those that follow begin after the last step that every one of them had finished, as they would
from a checkpoint. What they were handed is compared with the feed of one worker that was never disturbed.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from cellray.data.store import Store
from cellray.train.feed import Feed
from tests import elastic_worker, stores
from tests.elastic_worker import Line, lines

WORLDS = (1, 2, 4, 3, 1)
LIMIT = 60.0
"""Seconds that a phase may take: it takes a fraction of one."""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A store of 400 cells of three modalities in 8 record batches."""
    folder = str(tmp_path_factory.mktemp("elastic") / "store")
    stores.write(folder, shard=50)
    return folder


@pytest.fixture(scope="module")
def forker(root):
    """A process that forks workers; it ends with the tests, and with it they do."""
    path = os.pathsep.join([str(root), str(root / "platform")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # Arrow's allocator has a thread of its own otherwise.
    environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    command = [sys.executable, "-W", "error", "-m", "tests.elastic_worker"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
    ) as process:
        yield process
    assert process.returncode == 0


def ask(forker, order):
    forker.stdin.write(json.dumps(order) + "\n")
    forker.stdin.flush()
    return json.loads(forker.stdout.readline())


def await_lines(path, wanted):
    """Wait until a worker has written that many whole lines."""
    until = time.monotonic() + LIMIT
    while wanted and not (path.exists() and path.read_bytes().count(b"\n") >= wanted):
        assert time.monotonic() < until, f"{path} has no {wanted} lines after {LIMIT} s"
        time.sleep(0.0005)


def alone(store, seed, weighted):
    """What one undisturbed worker gets: a list of cells a step."""
    plan = elastic_worker.plan(store, seed, weighted)
    with Feed(store, plan, first=0, rank=0, world=1) as feed:
        shares = list(feed)
    assert [share.step for share in shares] == list(range(plan.steps))
    return [elastic_worker.cells(share.batch) for share in shares]


def finished(files):
    """The steps that every worker finished, in order, each as the lines of all workers."""
    return list(zip(*map(lines, files), strict=False))


def joined(group):
    """Step and cells of a global batch, by falling length: of w workers, r has each w-th from r on."""
    ranks, world = [line.rank for line in group], len(group)
    if ranks != list(range(world)) or {line.world for line in group} != {world}:
        raise ValueError(f"it is of the workers {ranks} of {group[0].world}")
    if len({line.step for line in group}) > 1:
        raise ValueError(f"its workers were at the steps {[line.step for line in group]}")
    whole = [""] * sum(len(line.cells) for line in group)
    for line in group:
        # A ValueError too, where a share is too small or too large.
        whole[line.rank :: world] = line.cells
    return group[0].step, whole


def faults(record, wanted, lost=()):
    """How the steps of a record differ from the batches of an undisturbed worker, in words.

    The lines `lost` belong to steps that not all workers finished: they may be missing, but not wrong.
    """
    told, found = [], []
    for place, group in enumerate(record):
        try:
            found.append(joined(group))
        except ValueError as error:
            told.append(f"number {place} is no batch: {error}")
    steps = [step for step, _ in found]
    times = Counter(steps)
    told += [f"step {step} is missing" for step in range(len(wanted)) if step not in times]
    told += [f"step {step} came {count} times" for step, count in times.items() if count > 1]
    told += [f"step {step} is not in the plan" for step in times if step >= len(wanted)]
    told += [f"step {a} came before step {b}" for a, b in itertools.pairwise(steps) if a > b]
    for step, whole in found:
        if step < len(wanted) and whole != wanted[step]:
            what = "another order of cells" if sorted(whole) == sorted(wanted[step]) else "other cells"
            told.append(f"step {step} has {what}: {whole}, not {wanted[step]}")
    for line in lost:
        if line.step >= len(wanted) or line.cells != wanted[line.step][line.rank :: line.world]:
            told.append(f"worker {line.rank} of {line.world} got a wrong share of step {line.step}")
    return told


def trial(forker, url, folder, seed):
    """The steps of all phases, what they should be, the lines that were lost, and counts of what happened."""
    rng = random.Random(seed)
    order = {"store": url, "seed": seed, "weighted": bool(seed % 2)}
    wanted = alone(Store(url), seed, order["weighted"])
    record: list[tuple[Line, ...]] = []
    lost: list[Line] = []
    seen: Counter[str] = Counter()
    for phase, world in enumerate(WORLDS):
        left = len(wanted) - len(record)
        files = [folder / f"{seed}-{phase}-{rank}" for rank in range(world)]
        pauses = [rng.choice([0.001, 0.002, 0.004]) for _ in files]
        order |= {"first": len(record), "files": list(map(str, files)), "pauses": pauses}
        workers = ask(forker, order)
        last = phase == len(WORLDS) - 1
        try:
            # A kill before the first step is one of them.
            reached = left if last else rng.randrange(max(1, 2 * left // (len(WORLDS) - phase)))
            await_lines(rng.choice(files), reached)
        except BaseException:
            last = False
            raise
        finally:
            for worker in [] if last else rng.sample(workers, world):
                os.kill(worker, signal.SIGKILL)
            ended = ask(forker, "reap")
        # A quick one may have come to the end of the plan before it was killed.
        assert set(ended) <= ({0} if last else {0, -signal.SIGKILL}), ended
        mine = finished(files)
        record += mine
        lost += [line for file in files for line in lines(file)[len(mine) :]]
        seen["killed"] += ended.count(-signal.SIGKILL)
        seen[f"steps by {world} in phase {phase + 1}"] += len(mine)
        seen["torn lines"] += sum(file.read_bytes()[-1:] not in b"\n" for file in files if file.exists())
        seen["kills before a first step"] += not mine
    seen["shares done again"] = len(lost)
    return record, wanted, lost, seen


def run_trials(forker, url, folder, seeds):
    """What happened in the trials with those seeds; odd ones are weighted. Fails with seeds and faults."""
    seen: Counter[str] = Counter()
    bad = {}
    for seed in seeds:
        try:
            record, wanted, lost, counts = trial(forker, url, folder, seed)
        except BaseException as error:
            error.add_note(f"in the trial with seed {seed}")
            raise
        if told := faults(record, wanted, lost):
            bad[seed] = told[:3]
        seen += counts
    print(f"\n{len(seeds) - len(bad)} of {len(seeds)} trials had the batches of one worker; {dict(seen)}")
    assert not bad, f"{len(bad)} of {len(seeds)} trials differ; the first differences by seed: {bad}"
    return seen


def test_workers_that_are_killed_and_change_in_number_get_the_same_batches(forker, url, tmp_path):
    seen = run_trials(forker, url, tmp_path, range(3))
    assert seen["killed"] > 15


@pytest.mark.slow
def test_a_hundred_trials_of_killed_workers_get_the_same_batches(forker, url, tmp_path):
    """Takes about 70 seconds of CPU."""
    seen = run_trials(forker, url, tmp_path, range(1000, 1100))
    assert seen["killed"] > 700
    # The kills came in the middle of things, and every phase had a part of the work.
    assert min(seen.values()) > 10


@pytest.mark.parametrize("weighted", [False, True])
def test_an_undisturbed_worker_gets_the_batches_of_the_plan(url, weighted):
    store = Store(url)
    plan = elastic_worker.plan(store, 7, weighted)
    direct = [elastic_worker.cells(store.read(plan.share(step, 0, 1))) for step in range(plan.steps)]
    assert alone(store, 7, weighted) == direct
    rows = [[int(cell.partition(":")[0]) for cell in batch] for batch in direct]
    assert all(sorted(rows[step]) == sorted(plan.rows(step)) for step in range(plan.steps))
    often = Counter(itertools.chain(*rows))
    assert (max(often.values()) > 3) == weighted


def test_the_hash_of_a_cell_sees_every_token_and_count(url):
    batch = Store(url).read(np.arange(20))
    before = elastic_worker.cells(batch)
    for name, counts in batch.counts.items():
        for part in ("ids", "counts", "total"):
            changed = getattr(counts, part).copy()
            changed[0] ^= 1
            other = replace(batch, counts=batch.counts | {name: replace(counts, **{part: changed})})
            assert sum(a != b for a, b in zip(before, elastic_worker.cells(other), strict=True)) == 1
    assert elastic_worker.cells(replace(batch, present=batch.present ^ 1)) != before


def replaced(record, place, *shares):
    """A record with other cells for the workers at `place`."""
    group = [line._replace(cells=cells) for line, cells in zip(record[place], shares, strict=True)]
    return [*record[:place], tuple(group), *record[place + 1 :]]


def test_every_fault_of_a_record_is_found(forker, url, tmp_path):
    record, wanted, lost, _ = trial(forker, url, tmp_path, 0)
    assert not faults(record, wanted, lost)
    a = next(i for i, group in enumerate(record) if len(group) == 2)
    one, two = record[a]
    row, _, digest = one.cells[0].partition(":")
    changed = f"{row}:{digest[::-1]}"
    assert changed != one.cells[0]
    b = a + 1
    swapped = [*record[:a], record[b], record[a], *record[b + 1 :]]
    doctored = {
        f"step {b} came before step {a}": swapped,
        f"step {a} is missing": record[:a] + record[b:],
        f"step {a} came 2 times": record[:b] + record[a:],
        f"step {len(wanted) - 1} is missing": record[:-1],
        f"step {len(wanted)} is not in the plan": [*record, (record[-1][0]._replace(step=len(wanted)),)],
        f"step {a} has another order of cells": replaced(record, a, one.cells[::-1], two.cells),
        f"step {a} has other cells": replaced(record, a, [changed, *one.cells[1:]], two.cells),
        f"number {a} is no batch: attempt to assign": replaced(record, a, one.cells[:-2], two.cells),
        f"number {a} is no batch: it is of the workers [1, 0]": [*record[:a], (two, one), *record[b:]],
        f"number {a} is no batch: it is of the workers [0]": [*record[:a], (one,), *record[b:]],
        f"number {a} is no batch: its workers were at": [
            *record[:a],
            (one, two._replace(step=b)),
            *record[b:],
        ],
    }
    for fault, doctor in doctored.items():
        assert any(told.startswith(fault) for told in faults(doctor, wanted)), fault
    told = f"worker 1 of 2 got a wrong share of step {a}"
    assert faults(record, wanted, [one, two._replace(cells=one.cells)]) == [told]
    # Two steps whose cells were exchanged, and not their numbers; and two workers' within a step.
    other = [line._replace(step=a) for line in record[b]], [line._replace(step=b) for line in record[a]]
    exchanged = [*record[:a], *map(tuple, other), *record[b + 1 :]]
    assert len(faults(exchanged, wanted)) == 2
    if len(one.cells) == len(two.cells):
        assert faults(replaced(record, a, two.cells, one.cells), wanted)


def test_a_torn_last_line_is_no_step(tmp_path):
    file = tmp_path / "worker"
    whole = [Line(step, 0, 1, [f"{step}:00"]) for step in range(2)]
    text = "".join(json.dumps(line) + "\n" for line in whole)
    for kept in range(len(text) + 1):
        file.write_text(text[:kept])
        assert lines(file) == whole[: text[:kept].count("\n")]
    assert lines(tmp_path / "never begun") == []
