"""Runs trained by a bench: each in a process of its own, with one thread, without Ray, and kept.

A bench calls `once`, which starts `python -m MODULE FILE`; that module calls `answer`. FILE is JSON.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.harness.rounds import ONE_THREAD, ROOT

SECONDS = 20.0
"""Between two lines that say how far a stage is."""


def once(module: str, figures: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """What the process of a job leaves in `figures`, which is kept."""
    if not figures.exists():
        figures.parent.mkdir(parents=True, exist_ok=True)
        file = figures.with_suffix(".job")
        file.write_text(json.dumps({**job, "figures": str(figures)}))
        process([sys.executable, "-m", module, str(file)])
    found: dict[str, Any] = json.loads(figures.read_text())
    return found


def process(command: Sequence[str]) -> None:
    """Run it with one thread. RuntimeError if it fails; it has said why."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": path}
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}, see what it printed")


def code(places: Sequence[str]) -> str:
    """Of the Python files there, eight characters."""
    digest = hashlib.sha256()
    for place in places:
        path = ROOT / place
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def hashed(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def answer(work: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Do the job that the command line names, and leave what comes of it where the job says."""
    import torch

    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    _replace(Path(job["figures"]), json.dumps(work(job), indent=1) + "\n")


def end_with(parent: int) -> None:
    """End when the bench does, however it does: what was trained by then is in checkpoints."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


@dataclass(frozen=True)
class Cost:
    """CPU-seconds of the stages of a chain, kept in a file so that a chain that was cut short adds up."""

    path: Path
    label: str

    def chain(self, run: Any) -> dict[str, float]:
        """Train what is not trained yet; CPU-seconds of every stage, all threads."""
        from cellray.train.chain import chain

        spent: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}
        since, told = time.process_time(), time.monotonic()
        worked: set[str] = set()

        def hear(event: Mapping[str, Any]) -> None:
            nonlocal since, told
            name, now = event["stage"], time.process_time()
            if "warning" in event:
                say(f"{self.label}, {name}: {event['warning']}")
            if "loss" in event.get("losses", {}) and time.monotonic() - told > SECONDS:
                told = time.monotonic()
                loss = event["losses"]["loss"]
                say(f"{self.label}, {name}: step {event['step']} of {event['steps']}, loss {loss:.3f}")
            if "finished" not in event:
                worked.add(name)
            if name in worked or name not in spent:  # else it was finished before, and is only loaded
                spent[name] = spent.get(name, 0.0) + now - since
            since = now
            _replace(self.path, json.dumps(spent))

        chain(run, hear)
        return spent


def say(text: str) -> None:
    print(f"… {text}", file=sys.stderr, flush=True)


def losses_of(run: Any) -> dict[str, dict[str, Any]]:
    """Stage -> parts of the loss at the first step, and as the mean over the last tenth of the rows."""
    from cellray.train import checkpoint

    found = {}
    for name in run.chain():
        facts = checkpoint.committed(run.path("stages", name))
        assert facts is not None
        rows = [
            {k: v for k, v in row.items() if k not in ("step", "gradient_norm")} for row in facts["curve"]
        ]
        end = rows[-max(1, len(rows) // 10) :]
        last = {key: sum(row[key] for row in end) / len(end) for key in rows[-1]}
        about = {key: facts[key] for key in ("steps", "cells", "tokens", "parameters")}
        found[name] = {**about, "first": rows[0], "last": last}
    return found


def ends(seeds: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """Stage, loss at its first step and at its end: means over the seeds."""
    stages = list(seeds[0]["losses"]) if seeds else []
    return [
        (
            stage,
            sum(one["losses"][stage]["first"]["loss"] for one in seeds) / len(seeds),
            sum(one["losses"][stage]["last"]["loss"] for one in seeds) / len(seeds),
        )
        for stage in stages
    ]


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
