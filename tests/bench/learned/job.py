"""One process of `tests.bench.learning`: `python -m tests.bench.learned.job FILE`.

FILE is JSON: what to do (`kind`), the simulation, the folder of the stores, the recipe, and where the
figures go. What has been done before is not done again.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SECONDS = 20.0
"""Between two lines that say how far a stage is."""


CONTROL = "control"
"""The stage that is no part of a method, but there to compare with."""


def method(spent: Mapping[str, float]) -> float:
    """CPU-seconds of all stages that make the teacher and the student."""
    return sum(seconds for name, seconds in spent.items() if name != CONTROL)


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
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(spent))
            os.replace(part, self.path)

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


def trained(job: Mapping[str, Any], material: Any) -> dict[str, Any]:
    """Train a run, measure it."""
    from cellray.train.recipe import from_json
    from cellray.train.run import Run
    from tests.bench.learned.measures import Bench, measured

    run = Run(from_json(job["recipe"]))
    run.claim()
    assert (run.test == material.test).all()
    spent = Cost(Path(job["recipe"]["run"]) / "cpu.json", job["label"]).chain(run)
    begun = time.process_time()
    figures = measured(run, Bench(material), stage_1=job["stage_1"])
    say(
        f"{job['label']}: {sum(spent.values()):.0f} CPU-s of training, measured in "
        f"{time.process_time() - begun:.0f}"
    )
    return {"figures": figures, "cpu": spent, "losses": losses_of(run)}


def calibrated(job: Mapping[str, Any], material: Any) -> dict[str, Any]:
    """CPU-seconds that `method` would take of the recipe `whole`, by a few steps of each of its stages.

    `seconds` grow with its epochs, `fixed` does not: the teacher's vectors of all cells.
    """
    from cellray.train.chain import outlook
    from cellray.train.recipe import from_json
    from cellray.train.run import Run

    run = Run(from_json(job["recipe"]))
    run.claim()
    spent = Cost(Path(job["recipe"]["run"]) / "cpu.json", job["label"]).chain(run)
    wanted = replace(from_json(job["whole"]), run=job["recipe"]["run"])
    whole = {stage.name: stage.cells for stage in outlook(Run(wanted))}
    tried = {stage.name: stage.cells for stage in outlook(run)}
    seconds = sum(spent[name] * whole[name] / cells for name, cells in tried.items() if name != CONTROL)
    say(f"{job['label']}: {method(spent):.0f} CPU-s; the whole would take {seconds:.0f}")
    return {"seconds": seconds, "fixed": spent.get("teacher", 0.0), "cpu": spent}


def compared(job: Mapping[str, Any], material: Any) -> dict[str, Any]:
    """Baselines and ceilings."""
    from tests.bench.learned.measures import Bench, ceilings, simple

    begun, bench = time.process_time(), Bench(material)
    figures = simple(bench) | ceilings(bench)
    say(f"{job['label']}: {time.process_time() - begun:.0f} CPU-s")
    return {"figures": figures}


KINDS = {"train": trained, "calibrate": calibrated, "compare": compared}
"""What a job may be; besides `write`, which makes what the others read."""


def _end_with(parent: int) -> None:
    """End when the bench does, however it does: what was trained by then is in checkpoints."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    import torch

    from cellray.data.split import held_out
    from cellray.data.store import Store
    from cellray.data.truth import Simulation
    from tests.bench.learned.material import Material, write

    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    simulation, folder = Simulation(**job["simulation"]), Path(job["material"])
    if job["kind"] == "write":
        found = write(folder, simulation)
    else:
        store = Store(str(folder / "true"))
        test, _ = held_out(store.cells)
        found = KINDS[job["kind"]](job, Material(simulation, store, test))
    target = Path(job["figures"])
    part = target.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(part, target)


if __name__ == "__main__":
    main()
