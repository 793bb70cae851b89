"""What the three stages learn on simulated cells whose truth is known, beside what simple models do.

python -m tests.bench.learning [--quick] [--seeds N] [--processes N]

One atlas, held-out donors; for every seed three runs of the whole chain: ours, ours with ATAC and protein
shuffled between cells of the same type, data set and donor, and the published design with as much CPU time.
A run is a process of its own with one thread, without Ray. What has been trained and measured is kept, so
that a bench cut short goes on. Prints a table, writes runs/bench/learning.json with losses and all figures.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.harness.jobs import code, ends, hashed, once

if TYPE_CHECKING:
    from cellray.train.recipe import Recipe

OURS, REFERENCE = "pipelines.recipes.demo:recipe", "pipelines.recipes.reference:recipe"
FULL: Mapping[str, Any] = {}
"""Of the simulation, other than by default."""
QUICK: Mapping[str, Any] = {"cells": 600, "genes": 150, "peaks": 200, "proteins": 12, "types": 4}
SETTINGS: Mapping[str, Any] = {
    "workers": 1,
    "track": (),
    "score.targets": "",
    "atlas": "",
    "unimodal.epochs": 12.0,
}
"""Of every recipe, other than the demo's: after 4 epochs stage 1 knows little more than a gene's mean."""
QUICKLY: Mapping[str, Any] = {
    "unimodal.epochs": 0.5,
    "joint.epochs": 0.5,
    "distil.epochs": 1.0,
    "network.width": 32,
}
MEASURING = ("tests/bench/learned", "platform/cellray/tasks", "platform/cellray/embedder.py")
TRAINING = ("platform/cellray/data", "platform/cellray/model", "platform/cellray/train")
"""What decides the figures of a trained run, and what the run comes to."""
TRIED = 2.0
"""Batches of the scarcest modality in the try-out of the reference."""
ENOUGH = 0.95
"""Share of our CPU time that the reference has to have."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.learning", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a small atlas and few steps, under a minute")
    parser.add_argument("--seeds", type=int, help="training seeds [3; quick 1]")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time [%(default)s]")
    parser.add_argument("--out", default="runs/bench", help="results and runs [%(default)s]")
    found = parser.parse_args()
    found.seeds = found.seeds or (1 if found.quick else 3)
    return found


def main() -> int:
    options = arguments()
    from cellray.data.truth import Simulation
    from tests.bench.harness.report import Report, Row
    from tests.bench.learned.job import method
    from tests.bench.learned.rows import Results, rows

    simulation = Simulation(**(QUICK if options.quick else FULL))
    folder = Path(options.out).absolute()
    about = f"{simulation.cells:,} cells and a few steps a stage, too few to learn from"
    report = Report(folder / "learning.json", quick=about if options.quick else "")
    runs = Runs(
        folder / ("learning-quick" if options.quick else "learning"), asdict(simulation), options.quick
    )
    runs.prepare()
    done = trained(runs, options.seeds, options.processes)
    figures = {name: [one["figures"] for one in found] for name, found in done.items()}
    cpu = {name: [method(one["cpu"]) for one in done[name]] for name in DESIGNS}
    report.beside = {
        "simulation": asdict(simulation),
        "baselines": figures["others"][0],
        "settings": {name: runs.about(name) for name in DESIGNS if done[name]},
        "seeds": {
            name: [{k: one[k] for k in ("figures", "cpu", "losses")} for one in done[name]]
            for name in DESIGNS
        },
    }
    results = Results(**figures | {"others": figures["others"][0]}, why_not=runs.why_not, cpu=cpu)
    for row in rows(results):
        report.add(row)
    for name in DESIGNS:
        for stage, first, last in ends(done[name]):
            report.add(
                Row(what=f"loss of {stage}, {name}", value=last, unit="", note=f"{first:.4g} at first")
            )
    print(f"written: {report.path}")
    return 0


DESIGNS = ("ours", "shuffled", "reference")


def trained(runs: "Runs", seeds: int, processes: int) -> dict[str, list[dict[str, Any]]]:
    """What every run came to, design by design, the seeds in order; and the baselines.

    All of one seed comes before the next. The reference has what ours of the first seed took, the control
    of neither counted: it is no part of the method.
    """
    from tests.bench.learned.job import method

    with ThreadPoolExecutor(processes) as pool:
        try:
            first = pool.submit(runs.train, "ours", 0)
            others = pool.submit(runs.compare)
            known = pool.submit(lambda: runs.stretch(method(first.result()["cpu"])))

            def reference(seed: int) -> dict[str, Any] | None:
                return runs.train("reference", seed) if known.result() else None

            found: dict[str, list[Future[Any]]] = {name: [] for name in DESIGNS}
            for seed in range(seeds):
                found["ours"].append(pool.submit(runs.train, "ours", seed) if seed else first)
                found["shuffled"].append(pool.submit(runs.train, "shuffled", seed))
                found["reference"].append(pool.submit(reference, seed))
            done = {name: [one.result() for one in futures] for name, futures in found.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: [one for one in some if one] for name, some in done.items()} | {"others": [others.result()]}


@dataclass
class Runs:
    """Runs below one folder, each trained and measured once for the settings and the code there are."""

    folder: Path
    simulation: Mapping[str, Any]
    quick: bool
    factor: float = 1.0
    """By which the epochs of the reference are stretched."""
    why_not: str = ""
    """Why there is no reference."""

    def prepare(self) -> None:
        """Write the stores if they are not there, in a process of its own."""
        self._once(self.material / "written.json", {"kind": "write", "label": "stores"})

    @cached_property
    def material(self) -> Path:
        """The folder of the stores."""
        return self.folder / f"stores-{hashed(self.simulation, code(TRAINING[:1]))}"

    def recipe(self, design: str, seed: int) -> "Recipe":
        """Of one run, without its folder."""
        from cellray.train.recipe import load, override

        found = override(load(REFERENCE if design == "reference" else OURS), {**SETTINGS, "seed": seed})
        if self.quick:
            found = override(found, QUICKLY)
        store = self.material / ("shuffled" if design == "shuffled" else "true")
        found = replace(found, store=str(store))
        return stretched(found, self.factor) if design == "reference" else found

    def about(self, design: str) -> dict[str, Any]:
        """The settings of a design, as JSON."""
        from cellray.train.recipe import to_json

        return to_json(self.recipe(design, 0))

    def train(self, design: str, seed: int) -> dict[str, Any]:
        """Figures, losses and CPU-seconds of a run."""
        recipe = self.recipe(design, seed)
        job = {"kind": "train", "label": f"{design}, seed {seed}", "stage_1": design == "ours"}
        return self._run(f"{design}-{seed}", recipe, job)

    def compare(self) -> dict[str, Any]:
        """Figures of the baselines, and ceilings."""
        return self._once(
            self.material / f"others-{code(MEASURING)}.json", {"kind": "compare", "label": "baselines"}
        )

    def stretch(self, budget: float) -> bool:
        """Give the reference as many epochs as cost `budget` CPU-seconds, by a try-out of every stage,
        and if the first run shows that it was given less, by that run.

        False where there is no such recipe.
        """
        from tests.bench.learned.job import method

        try:
            whole = self.recipe("reference", 0)
        except ValueError as error:
            self.why_not = str(error)
            return False
        scarce = min(self.simulation["cells"] / 4, 5000.0)
        tiny = TRIED * whole.feed.cells / scarce
        from cellray.train.recipe import override, to_json

        changes = {f"{stage}.epochs": tiny for stage in ("unimodal", "joint", "distil")}
        job = {"kind": "calibrate", "label": "reference, try-out", "whole": to_json(whole)}
        found = self._run("tried", override(whole, changes), job)
        self.factor = round(max(budget - found["fixed"], 0.1 * budget) / found["seconds"], 4)
        spent = method(self.train("reference", 0)["cpu"])
        if spent < ENOUGH * budget and not self.quick:
            self.factor = round(self.factor * budget / spent, 4)
        return True

    def _run(self, name: str, recipe: "Recipe", job: Mapping[str, Any]) -> dict[str, Any]:
        """What a run came to. Runs of that name by other code are removed."""
        from cellray.train.recipe import to_json

        settings, own = hashed(to_json(recipe)), code(TRAINING)
        for old in self.folder.glob(f"{name}-*"):
            if not old.name.endswith(own):
                shutil.rmtree(old)
        folder = self.folder / f"{name}-{settings}-{own}"
        recipe = replace(recipe, run=str(folder))
        return self._once(folder / f"figures-{code(MEASURING)}.json", {**job, "recipe": to_json(recipe)})

    def _once(self, figures: Path, job: Mapping[str, Any]) -> dict[str, Any]:
        """What the process of a job leaves in `figures`, which is kept."""
        whole = {**job, "simulation": self.simulation, "material": str(self.material)}
        return once("tests.bench.learned.job", figures, whole)


def stretched(recipe: "Recipe", factor: float) -> "Recipe":
    """The same with `factor` times the epochs in every stage."""
    from cellray.train.recipe import override

    parts = {name: getattr(recipe, name).epochs for name in ("unimodal", "joint", "distil")}
    return override(recipe, {f"{name}.epochs": epochs * factor for name, epochs in parts.items()})


if __name__ == "__main__":
    sys.exit(main())
