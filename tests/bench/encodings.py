"""Encodings, context and masks of stage 1 on equal footing, on simulated cells.

python -m tests.bench.encodings [--quick] [--cells N] [--seeds N] [--epochs N]

Each variant trains stage 1 of the demo recipe on the same batches, with as many steps. All are then asked
the same of the same held-out cells: single tokens hidden, absent features beside them. Detection is the
AUROC over all places asked for; by frequency, that of the number of training cells that have the feature.
The error of hidden values is a share of that of each gene's mean value in the training cells. The probe is
a logistic regression from the summary of a whole cell to its type. A figure is the median over the seeds.
Prints a table, writes runs/bench/encodings.json.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from cellray.data.truth import Simulation
    from cellray.train.run import Run
    from cellray.train.stages import Unimodal

FREQUENCY = "detection by frequency"
FIGURES = {
    "detection": "AUROC",
    FREQUENCY: "AUROC",
    "error": "of the mean's",
    "probe": "accuracy",
    "cpu": "CPU-s",
}
"""What is measured, and its unit."""
ASKED = 1_000
"""A key of the held-out questions that no step of training has."""
HIDDEN = 0.25
"""Share of the tokens of a held-out cell that is hidden."""


@dataclass(frozen=True)
class Variant:
    """One way to train an encoder."""

    name: str
    modality: str
    settings: Mapping[str, str]


def variants(programmes: str) -> list[Variant]:
    """Untrained, then as the recipe has it, then what stands against that, for each modality."""
    hides = {"unimodal.mask_by": "programme", "unimodal.programmes": programmes}
    return [
        Variant("untrained", "rna", {"unimodal.epochs": "0"}),
        Variant("value", "rna", {}),
        Variant("bins", "rna", {"network.encoding": "bins"}),
        Variant("rank", "rna", {"network.encoding": "rank"}),
        Variant("value, told the assay", "rna", {"network.context_of": "assay"}),
        Variant("value, programmes hidden", "rna", hides),
        Variant("peaks, untrained", "atac", {"unimodal.epochs": "0"}),
        Variant("peaks", "atac", {}),
        Variant("peaks, regions hidden", "atac", {"unimodal.mask_by": "region", "unimodal.region": "8"}),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.encodings", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="one seed, few cells, under a minute")
    parser.add_argument("--cells", type=int, help="simulated cells [6,000; quick 1,000]")
    parser.add_argument("--seeds", type=int, help="seeds of the weights and the masks [3; quick 1]")
    parser.add_argument("--epochs", type=float, help="passes over the training cells [8; quick 1]")
    parser.add_argument("--out", default="runs/bench", help="results [%(default)s]")
    found = parser.parse_args()
    found.cells = found.cells or (1_000 if found.quick else 6_000)
    found.seeds = found.seeds or (1 if found.quick else 3)
    found.epochs = found.epochs or (1.0 if found.quick else 8.0)
    return found


def main() -> int:
    options = arguments()
    import torch

    from cellray.data.truth import Simulation, gene_programmes
    from tests.bench.harness.report import Report, Row

    torch.set_num_threads(1)
    about = f"{options.cells:,} cells, {options.epochs:g} epochs, {options.seeds} seeds"
    report = Report(Path(options.out).absolute() / "encodings.json", quick=about if options.quick else "")
    print(about)
    with tempfile.TemporaryDirectory(prefix="cellray-encodings-") as scratch:
        simulation = Simulation(cells=options.cells)
        path = Path(scratch) / "programmes.gmt"
        sets = gene_programmes(simulation).items()
        path.write_text("".join("\t".join([name, "", *genes]) + "\n" for name, genes in sets))
        write(scratch, simulation)
        for variant in variants(str(path))[1:3]:  # what is compiled or made ready is no cost of the first
            measured(variant, scratch, options.seeds, 0.05)
        for variant in variants(str(path)):
            found: dict[str, list[float]] = {}
            for seed in range(options.seeds):
                for name, value in measured(variant, scratch, seed, options.epochs).items():
                    found.setdefault(name, []).append(value)
            for name, values in found.items():
                unit = FIGURES[name]
                what = f"{variant.name}: {name}"
                note = f"{options.seeds} seeds, {min(values):.3g} to {max(values):.3g}"
                report.add(Row(what=what, value=statistics.median(values), unit=unit, note=note))
    print(f"written: {report.path}")
    return 0


def write(folder: str, simulation: "Simulation") -> None:
    """The store, with the assay of every cell."""
    from cellray.data.truth import cells_of
    from tests import stores

    assays = cells_of(simulation, 0, simulation.cells).assay.astype(str).tolist()
    stores.write(f"{folder}/store", simulation, shard=2_048, assay=assays)


def measured(variant: Variant, folder: str, seed: int, epochs: float) -> dict[str, float]:
    """Figures of one variant and seed, by the names of FIGURES."""
    from cellray.train.recipe import load, override
    from cellray.train.run import Run

    changes = {"run": f"{folder}/{variant.name}-{seed}", "store": f"{folder}/store", "seed": seed}
    changes |= {"unimodal.epochs": epochs, "precision": "fp32"}
    run = Run(override(load("pipelines.recipes.demo:recipe"), {**changes, **variant.settings}))
    began = time.process_time()
    stage = trained(run, variant.modality)
    seconds = time.process_time() - began
    found = {**asked(run, stage), "probe": probe(run, stage), "cpu": seconds}
    wanted = set(FIGURES) - {FREQUENCY} if run.recipe.unimodal.epochs else {FREQUENCY, "probe"}
    return {name: value for name, value in found.items() if name in wanted}


def trained(run: "Run", modality: str) -> "Unimodal":
    """Stage 1 of one modality, trained as `run_stage` does, without checkpoints."""
    from cellray.train.feed import Feed
    from cellray.train.fit import adamw, learning_rate, plan_of, step
    from cellray.train.stages import Unimodal

    recipe, teacher = run.recipe, run.teacher().train()
    stage = Unimodal(
        recipe.unimodal,
        teacher,
        run.tokenizer,
        modality,
        seed=recipe.seed,
        device="cpu",
        contexts=run.contexts,
    )
    parameters, optimizer = adamw(stage.trained(), recipe.optim)
    plan = plan_of(run.store, recipe, ~run.test, stage.needs(), stage.reads(), stage.epochs)
    with Feed(run.store, plan, first=0, rank=0, world=1) as feed:
        for share in feed:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe.optim, share.step, plan.steps)
            step(stage, share, parameters, optimizer, recipe.optim.clip)
    teacher.eval()
    return stage


def cells_with(run: "Run", modality: str) -> "tuple[np.ndarray, np.ndarray]":
    """Rows of the training and of the held-out cells that have a modality."""
    import numpy as np

    bit = list(run.tokenizer.vocabularies).index(modality)
    has = (run.store.cells["present"].to_numpy() >> bit) & 1 == 1
    return np.flatnonzero(has & ~run.test), np.flatnonzero(has & run.test)


def asked(run: "Run", stage: "Unimodal") -> dict[str, float]:
    """Detection at hidden and absent places of held-out cells, and the error of values that are hidden."""
    import numpy as np
    import torch
    from sklearn.metrics import roc_auc_score

    from cellray.data import encodings
    from cellray.train.batches import masked_tokens

    name, teacher, size = stage.modality.name, stage.teacher, len(stage.vocabulary)
    train, test = cells_with(run, name)
    counts = run.store.read(test).counts[name]
    tokens, at, truth = masked_tokens(
        counts,
        test,
        stage.modality,
        size,
        mask=(HIDDEN, HIDDEN),
        zeros=HIDDEN,
        keys=(ASKED,),
        encoding=teacher.encoding,
    )
    if run.contexts is not None:
        tokens = replace(tokens, about=run.contexts.of(test))
    encoder, heads = teacher.encoder(name), teacher.heads[name]
    with torch.inference_mode():
        value, detected = heads(encoder(tokens, heads.withheld).states[at])
    there = truth.numpy() > 0
    known = run.store.read(train).counts[name]
    often = np.bincount(known.ids, minlength=size)
    found = {
        "detection": float(roc_auc_score(there, detected.numpy())),
        FREQUENCY: float(roc_auc_score(there, often[tokens.ids[at].numpy()])),
    }
    if value is not None:
        sums = np.bincount(known.ids, encodings.values(known, stage.modality.scale), size)
        means = sums / np.maximum(often, 1)
        wanted = truth.numpy()[there].astype(np.float64)
        said = (value * encoder.unit).numpy()[there]
        of_mean = np.square(means[tokens.ids[at].numpy()[there]] - wanted).sum()
        found["error"] = float(np.square(said - wanted).sum() / of_mean)
    return found


def probe(run: "Run", stage: "Unimodal") -> float:
    """Share of the held-out cells whose type a logistic regression on the summary finds."""
    import numpy as np

    from cellray.tasks.baselines import linear_probe

    train, test = cells_with(run, stage.modality.name)
    labels, codes = np.unique(run.store.cells["label"].to_pylist(), return_inverse=True)
    known, held = summaries(run, stage, train), summaries(run, stage, test)
    chance = linear_probe(known, codes[train], held, len(labels))
    return float((chance.argmax(axis=1) == codes[test]).mean())


def summaries(run: "Run", stage: "Unimodal", rows: "np.ndarray") -> "np.ndarray":
    """Summaries of whole cells, [cells, width]."""
    import numpy as np
    import torch

    from cellray.train.batches import plain_tokens

    name, found = stage.modality.name, []
    for some in np.array_split(rows, -(-len(rows) // 256)):
        counts = run.store.read(some).counts[name]
        tokens = plain_tokens(counts, stage.modality, encoding=stage.teacher.encoding)
        if run.contexts is not None:
            tokens = replace(tokens, about=run.contexts.of(some))
        with torch.inference_mode():
            found.append(stage.teacher.encoder(name)(tokens).summary.numpy())
    return np.concatenate(found)


if __name__ == "__main__":
    sys.exit(main())
