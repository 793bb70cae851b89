"""Ingests one after another, and what each cost.

python -m tests.bench.drivers.ingest CPUS ATLAS STORE [ATLAS STORE …]
"""

import json
import os
import shutil
import sys
import threading
import time
from typing import Any

from cellray import cluster
from tests.bench.harness.serve import MARK, marked, memory, tree_cpu


class Peak(threading.Thread):
    """The largest resident memory of any one process of ours, looked at twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.largest: dict[str, float] = {}

    def run(self) -> None:
        while not self.over.wait(0.5):
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


def ingested(atlas: str, store: str) -> dict[str, Any]:
    """Cost and result of one ingest. CPU time is that of all processes of this Ray."""
    from cellray.data import storage
    from cellray.data.ingest import ingest
    from cellray.train.recipe import Recipe

    shutil.rmtree(store, ignore_errors=True)
    watch = Peak()
    watch.start()
    cpu, start = tree_cpu(os.environ[MARK]), time.perf_counter()
    report = ingest(Recipe(atlas=atlas), store)
    wall, cpu = time.perf_counter() - start, tree_cpu(os.environ[MARK]) - cpu
    watch.over.set()
    watch.join()
    manifest = storage.sha256(storage.read_bytes(storage.join(store, "store.json")))
    return {
        "wall": wall,
        "cpu": cpu,
        "cells": report["cells_kept"],
        "sha256": manifest,
        "peak": watch.largest,
    }


def main() -> None:
    cpus, *pairs = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cluster.prepare("local")
    with cluster.connect("local", cpus=int(cpus), object_store_bytes=256 << 20):
        for atlas, store in zip(pairs[::2], pairs[1::2], strict=True):
            answers.write(json.dumps(ingested(atlas, store)) + "\n")
    answers.close()


if __name__ == "__main__":
    main()
