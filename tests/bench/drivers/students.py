"""Steps of stage 3, of its control and of stage 1 over peaks; the student beside the teacher's RNA path.

python -m tests.bench.drivers.students WAY STORE RUN PRECISION [key=value …]

distil, control    steps of the stage, through the feed, the teacher's vectors in memory
peaks, whole       steps of stage 1 of ATAC, through the feed, its tables updated by rows, or whole
student, teacher   embeddings of cells whose tokens are in memory, from RNA alone
"""

import json
import sys
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from cellray import heap
from cellray.data.store import Store
from cellray.train.batches import plain_tokens, present
from cellray.train.feed import Feed
from cellray.train.fit import adamw, plan_of, step
from cellray.train.run import Run
from cellray.train.stages import Control, Distil, Stage, Unimodal, View
from cellray.train.targets import TeacherVectors
from tests.bench.drivers.genes import precision
from tests.bench.drivers.training import recipe
from tests.bench.harness.serve import Delivery, serve

CELLS = 256
"""Cells embedded at a time."""


def vectors(store: Store, width: int) -> TeacherVectors:
    """Of a teacher that says anything: what it costs to learn from them does not depend on it."""
    random = np.random.default_rng(0)
    names = store.names

    def column(size: int) -> pa.Array:
        flat = pa.array(random.standard_normal(len(store) * size, np.float32))
        return pa.FixedSizeListArray.from_arrays(flat, size)

    cell_ids = store.cells["cell_id"].combine_chunks()
    columns = {
        "cell_id": cell_ids,
        "present": store.cells["present"],
        "joint": column(width),
        "summaries": column(width * len(names)),
    }
    about = json.dumps({"width": width, "modalities": names})
    return TeacherVectors(pa.table(columns).replace_schema_metadata({"cellray": about}), cell_ids)


def staged(run: Run, way: str) -> tuple[Stage, nn.Module]:
    """The stage, and the module that holds what it trains."""
    setting, seed = run.recipe, run.recipe.seed
    if way in ("peaks", "whole"):
        teacher = run.teacher()
        return Unimodal(setting.unimodal, teacher, run.tokenizer, "atac", seed=seed, device="cpu"), teacher
    student = run.student()
    view = View(setting.distil, student, run.tokenizer, seed=seed, device="cpu")
    if way == "control":
        return Control(view), student
    return Distil(view, vectors(run.store, setting.network.width)), student


def trained(run: Run, way: str) -> Iterator[Delivery]:
    """Steps of an epoch of a stage, and of the next ones; the network goes on."""
    setting = run.recipe
    stage, root = staged(run, way)
    root.train().requires_grad_(False)
    for module in stage.trained():
        module.requires_grad_(True)
    needed = {} if way == "whole" else {"asked": stage.asked, "read": setting.feed.tokens}
    parameters, optimizer = adamw(stage.trained(), setting.optim, **needed)
    plan = plan_of(run.store, setting, ~run.test, stage.needs(), stage.reads(), 1.0)
    while True:
        with Feed(run.store, plan, first=0, rank=0, world=1) as feed:
            for share in feed:
                step(stage, share, parameters, optimizer, setting.optim.clip)
                yield share.cells, share.tokens, None


def embedded(run: Run, way: str) -> Iterator[Delivery]:
    """The same cells, over and over."""
    batch = run.store.read(np.arange(min(CELLS, len(run.store))))
    counts, rna = batch.counts["rna"], run.tokenizer.vocabularies["rna"].modality
    tokens = plain_tokens(counts, rna)
    student, teacher = run.student().eval(), run.teacher().eval()
    shown = torch.from_numpy(present(batch, len(teacher.names)) & (np.array(teacher.names) == "rna"))
    words = run.tokenizer.vocabularies
    every = {name: plain_tokens(c, words[name].modality) for name, c in batch.counts.items()}
    while True:
        with torch.inference_mode():
            if way == "student":
                student(tokens.ids, tokens.values, tokens.offsets[:-1], tokens.depth)
            else:
                teacher(every, shown)
        yield len(counts), len(counts.ids), None


def main() -> None:
    way, store, folder, name, *words = sys.argv[1:]
    heap.keep()  # as workers do
    torch.set_num_threads(1)
    run = Run(recipe(store, folder, words))
    with precision(name):
        found = (embedded if way in ("student", "teacher") else trained)(run, way)
        serve(lambda: found, first=4, about=name)


if __name__ == "__main__":
    main()
