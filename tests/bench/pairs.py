"""What the student learns from real pairs: SNARE-seq and CITE-seq, several training seeds, beside baselines.

python -m tests.bench.pairs [--only snareseq pbmc] [--seeds N] [--processes N] [--quick] [--set key=value …]

Every fifth cell by its name's md5 is held out. A run is a process of its own with one thread, without Ray;
what has been ingested, trained and measured is kept, so that a bench cut short goes on. Probes and baselines
are fitted to all training cells, baselines three times with other random numbers. Prints a table, writes
runs/bench/pairs.json with losses, settings and all figures.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.harness.jobs import code, hashed, once, process, say
from tests.bench.harness.rounds import ROOT
from tests.bench.paired.material import ALL, Pairs, subset

if TYPE_CHECKING:
    from cellray.train.recipe import Recipe

RECIPE = "pipelines.recipes.small:recipe"
SETTINGS: Mapping[str, str] = {"qc.mads": "0", "split.by": "cell", "split.fraction": "0.2", "workers": "1"}
"""Of every data set, beside its own: the cells and the split of the published baselines."""
QUICKLY: Mapping[str, str] = {
    "unimodal.epochs": "0.3",
    "joint.epochs": "0.3",
    "distil.epochs": "0.5",
    "network.width": "32",
    "network.layers": "1",
    "student.hidden": "32",
    "score.seeds": "1",
    "score.bootstrap": "50",
    "score.features": "150",
}
JOB = "tests.bench.paired.job"
READING = ("platform/cellray/data",)
TRAINING = (*READING, "platform/cellray/model", "platform/cellray/train")
MEASURING = (
    "platform/cellray/tasks",
    "platform/cellray/embedder.py",
    "pipelines/score.py",
    "tests/bench/paired/job.py",
)
"""What decides a store, a trained run, and what a run comes to."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.pairs", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ALL), default=list(ALL), help="data sets [all]")
    parser.add_argument("--seeds", type=int, help="training seeds [3; quick 1]")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="few cells and few steps, under a minute")
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data"), help="[%(default)s]")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value", dest="changes")
    parser.add_argument("--out", default="runs/bench", help="results and runs [%(default)s]")
    found = parser.parse_args(argv)
    found.seeds = found.seeds or (1 if found.quick else 3)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    from cellray.train.recipe import settings
    from tests.bench.harness.report import Report
    from tests.bench.paired.rows import not_run

    folder, data = Path(options.out).absolute(), Path(options.data).absolute()
    changes = settings(options.changes)
    about = "every so manyth cell and a few steps a stage: the figures mean nothing"
    report = Report(folder / "pairs.json", quick=about if options.quick else "")
    report.beside = {"settings": {}, "seeds": {}, "baselines": {}, "ingest": {}}
    with tempfile.TemporaryDirectory() as few:
        there: list[Runs] = []
        for name in options.only:
            pairs = ALL[name]
            if missing := pairs.missing(data):
                for row in not_run(pairs, f"{missing[0]} is not there, --data names the folder"):
                    report.add(row)
                continue
            if options.quick:
                subset(pairs, data, Path(few))
            place = folder / ("pairs-quick" if options.quick else "pairs")
            own = {**(QUICKLY if options.quick else {}), **changes}
            there.append(Runs(pairs, Path(few) if options.quick else data, place, own))
        for runs in there:
            runs.ingest()
        measure(there, options.seeds, options.processes, report)
    print(f"written: {report.path}")
    return 0


def measure(there: Sequence["Runs"], seeds: int, processes: int, report: Any) -> None:
    """Train and score every data set in turn, and add their rows as they come."""
    from tests.bench.paired.rows import Table, brief

    with ThreadPoolExecutor(processes) as pool:
        try:
            begun = [
                (pool.submit(runs.first), [pool.submit(runs.train, s) for s in range(1, seeds)])
                for runs in there
            ]
            for runs, (first, others) in zip(there, begun, strict=True):
                done, baselines = first.result()
                every = [done, *(one.result() for one in others)]
                report.beside["settings"][runs.pairs.name] = runs.about()
                report.beside["seeds"][runs.pairs.name] = [brief(one) for one in every]
                report.beside["baselines"][runs.pairs.name] = brief(baselines)
                report.beside["ingest"][runs.pairs.name] = runs.ingested
                for row in Table(runs.pairs, every, baselines).rows():
                    report.add(row)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@dataclass
class Runs:
    """Runs on one data set below one folder, each trained and measured once for these settings and code."""

    pairs: Pairs
    data: Path
    folder: Path
    changes: Mapping[str, str]
    """Settings that were asked for."""

    @cached_property
    def recipe(self) -> "Recipe":
        """Of all runs, without folder and seed."""
        from cellray.train.recipe import load, override

        return override(load(RECIPE), {**SETTINGS, **self.pairs.settings, **self.changes})

    @cached_property
    def store(self) -> Path:
        """The folder of the store."""
        from cellray.train.recipe import to_json

        whole = to_json(self.recipe)
        made_by = [whole[key] for key in ("ingest", "qc", "modalities")]
        key = hashed(made_by, self.pairs.files, self.pairs.content(self.data), code(READING))
        return self.folder / f"store-{self.pairs.name}-{key}"

    @property
    def ingested(self) -> dict[str, Any]:
        """What the ingest said: cells kept, seconds."""
        found: dict[str, Any] = json.loads((self.store / "bench.json").read_text())
        return found

    def ingest(self) -> None:
        """Make the store, if it is not there, as a user would."""
        if (self.store / "bench.json").exists():
            return
        for old in self.folder.glob(f"store-{self.pairs.name}-*"):
            shutil.rmtree(old)
        self.store.mkdir(parents=True)
        table = self.store / "atlas.csv"
        self.pairs.table(self.data, table)
        say(f"{self.pairs.name}: ingest")
        asked = {**SETTINGS, **self.pairs.settings, **self.changes}
        given = [f"{key}={value}" for key, value in asked.items()]
        where = [f"atlas={table}", f"store={self.store / 'store'}", f"run={self.store}"]
        begun = time.monotonic()
        process([sys.executable, "-m", "pipelines.ingest", RECIPE, *given, *where, "--quiet"])
        report = json.loads((self.store / "store" / "ingest.json").read_text())
        facts = {"cells": report["cells_kept"], "of": report["cells_in"], "seconds": time.monotonic() - begun}
        (self.store / "bench.json").write_text(json.dumps(facts))

    def about(self) -> dict[str, Any]:
        """The settings, as JSON."""
        from cellray.train.recipe import to_json

        return to_json(self.run(0))

    def run(self, seed: int) -> "Recipe":
        """The recipe of one run. Runs of that seed by other code are removed, those of other settings not."""
        from cellray.train.recipe import to_json

        store = str(self.store / "store")
        recipe = replace(self.recipe, store=store, seed=seed, track=(), run="")
        by = f"{self.pairs.name}-{seed}-{code(TRAINING)}"
        for old in self.folder.glob(f"{self.pairs.name}-{seed}-*"):
            if not old.name.startswith(by):
                shutil.rmtree(old)
        return replace(recipe, run=str(self.folder / f"{by}-{hashed(to_json(recipe))}"))

    def train(self, seed: int) -> dict[str, Any]:
        """Figures, losses and CPU-seconds of a run."""
        recipe = self.run(seed)
        return self._once("train", recipe, Path(recipe.run) / f"figures-{code(MEASURING)}.json")

    def first(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Those of the first seed, and the figures of the baselines.

        Baselines know the cells alone, and for random weights the shape of the network: no settings
        of training. They are scored on what the first run holds out, which is what all runs do.
        """
        from cellray.train.recipe import to_json

        found, recipe = self.train(0), self.run(0)
        whole = to_json(recipe)
        read = {key: whole[key] for key in ("split", "score", "modalities", "network", "student")}
        name = f"baselines-{hashed(read)}-{code((*TRAINING[:2], *MEASURING))}.json"
        return found, self._once("compare", recipe, self.store / name)

    def _once(self, kind: str, recipe: "Recipe", figures: Path) -> dict[str, Any]:
        from cellray.train.recipe import to_json

        label = f"{self.pairs.name}, " + (f"seed {recipe.seed}" if kind == "train" else "baselines")
        return once(JOB, figures, {"kind": kind, "label": label, "recipe": to_json(recipe)})


if __name__ == "__main__":
    sys.exit(main())
