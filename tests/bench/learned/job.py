"""One process of `tests.bench.learning`: `python -m tests.bench.learned.job FILE`.

FILE is JSON: what to do (`kind`), the simulation, the folder of the stores, the recipe, and where the
figures go. What has been done before is not done again.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.harness.jobs import Cost, answer, losses_of, say

CONTROL = "control"
"""The stage that is no part of a method, but there to compare with."""


def method(spent: Mapping[str, float]) -> float:
    """CPU-seconds of all stages that make the teacher and the student."""
    return sum(seconds for name, seconds in spent.items() if name != CONTROL)


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
    from tests.bench.learned.measures import Bench, ceilings, simple, simple_types

    begun, bench = time.process_time(), Bench(material)
    figures = simple(bench) | simple_types(bench) | ceilings(bench)
    say(f"{job['label']}: {time.process_time() - begun:.0f} CPU-s")
    return {"figures": figures}


KINDS = {"train": trained, "calibrate": calibrated, "compare": compared}
"""What a job may be; besides `write`, which makes what the others read."""


def main(job: dict[str, Any]) -> Mapping[str, Any]:
    from cellray.data.split import held_out
    from cellray.data.store import Store
    from cellray.data.truth import Simulation
    from tests.bench.learned.material import Material, write

    simulation, folder = Simulation(**job["simulation"]), Path(job["material"])
    if job["kind"] == "write":
        return write(folder, simulation)
    store = Store(str(folder / "true"))
    test, _ = held_out(store.cells)
    return KINDS[job["kind"]](job, Material(simulation, store, test))


if __name__ == "__main__":
    answer(main)
