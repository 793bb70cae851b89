"""A Ray that ingests on command, and what each ingest cost.

python -m tests.bench.drivers.ingest CPUS

A command is a line of JSON, {"atlas", "store", "tasks", "settings"}: `tasks` at a time, no more than CPUS,
and what the recipe's `ingest` has other than by default.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cellray import cluster
from tests.bench.harness.serve import MARK, marked, memory, tree_cpu


class Peak(threading.Thread):
    """The largest resident memory of any one process of ours from now on, looked at twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.largest: dict[str, float] = {}
        for folder in marked(os.environ[MARK]):
            try:
                (folder / "clear_refs").write_text("5")  # what was the peak before is none of ours
            except OSError:
                continue

    def run(self) -> None:
        while not self.over.wait(0.5):
            self.look()

    def look(self) -> None:
        for folder in marked(os.environ[MARK]):
            try:
                name = "driver" if folder.name == str(os.getpid()) else _name(str(folder))
                peak = memory(str(folder))["peak"]
            except (OSError, KeyError):
                continue  # it ended while we looked
            self.largest[name] = max(peak, self.largest.get(name, 0.0))


def _name(folder: str) -> str:
    with open(f"{folder}/cmdline", "rb") as file:
        words = file.read().replace(b"\0", b" ").decode(errors="replace")
    return "worker" if words.startswith("ray::") or "default_worker" in words else "ray"


@contextmanager
def only(tasks: int, cpus: int) -> Iterator[None]:
    """`tasks` logical CPUs of this Ray, which has `cpus`: the others are taken as long as the body runs."""
    import ray

    if tasks == cpus:
        yield
        return
    taken = ray.util.placement_group([{"CPU": 1}] * (cpus - tasks))
    ray.get(taken.ready())
    try:
        yield
    finally:
        ray.util.remove_placement_group(taken)


def ingested(atlas: str, store: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Cost and result of one ingest. CPU time is that of all processes of this Ray."""
    from cellray.data import storage
    from cellray.data.ingest import ingest
    from cellray.train.recipe import Ingest, Recipe

    shutil.rmtree(store, ignore_errors=True)
    watch = Peak()
    watch.start()
    cpu, start = tree_cpu(os.environ[MARK]), time.perf_counter()
    report = ingest(Recipe(atlas=atlas, ingest=Ingest(**settings)), store)
    wall, cpu = time.perf_counter() - start, tree_cpu(os.environ[MARK]) - cpu
    watch.over.set()
    watch.join()
    watch.look()
    manifest = storage.read_bytes(storage.join(store, "store.json"))
    return {
        "wall": wall,
        "cpu": cpu,
        "cells": report["cells_kept"],
        "sha256": storage.sha256(manifest),
        "shards": len(json.loads(manifest)["shards"]),
        "peak": watch.largest,
    }


def main() -> None:
    cpus = int(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    cluster.prepare("local")
    with cluster.connect("local", cpus=cpus, object_store_bytes=256 << 20):
        answer({"ready": f"Ray with {cpus} logical CPUs"})
        for line in sys.stdin:
            command = json.loads(line)
            with only(command["tasks"], cpus):
                answer(ingested(command["atlas"], command["store"], command["settings"]))
    answers.close()


if __name__ == "__main__":
    main()
