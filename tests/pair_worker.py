"""`python -m tests.pair_worker FOLDER RANK WORLD`: one of some workers that train over gloo, without Ray.

They do everything that tests/test_workers.py asks for in one go, as starting them takes longer than that.
What they come to is in FOLDER/NAME.safetensors. The same functions do it with one worker, in any process.
"""

import contextlib
import dataclasses
import math
import shutil
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from cellray.train import sharding, workers
from cellray.train.feed import Feed, Share
from cellray.train.fit import adamw, plan_of, run_stage, step
from cellray.train.recipe import Optim
from cellray.train.skips import Skips
from tests import stores
from tests.chains import Killed
from tests.test_stages import stage

STAGES = ("rna", "joint", "distil")
EPOCHS = 2.0
"""Of the stage that is killed, some ten steps."""
AT = 6
"""The step before which it is."""
RATES = Optim(lr=1e-3, spike=0.0)


FEW = {"unimodal.queries": 16, "joint.queries": 16, "distil.queries": 16}
"""So few features asked for that decoders are updated by rows."""
READ = 120
"""Tokens read in a step, as it is said, by which encoders of genes and peaks are updated by rows too."""


@contextlib.contextmanager
def prepared(run, name, shared, *, rowwise=False):
    """A stage as `run_stage` prepares it, and what it trains; afterwards all of it is plain again."""
    work, root = stage(run, name)
    root.train().requires_grad_(False)
    for module in work.trained():
        module.requires_grad_(True)
    shares = sharding.Shares(root, "cpu") if shared else None
    needed = {"asked": work.asked, "read": READ} if rowwise else {}
    parameters, optimizer = adamw(work.trained(), RATES, **needed)
    assert bool(optimizer.tables) == rowwise
    yield work, root, parameters, optimizer
    optimizer.settle()
    if shares:
        shares.undo()


def five(folder, name, shared=False, *, rowwise=False, **changes):
    """Weights after five steps of a stage, and the losses and norms of each."""
    run, said = stores.run(folder, **changes), []
    with prepared(run, name, shared, rowwise=rowwise) as (work, root, parameters, optimizer):
        plan = plan_of(run.store, run.recipe, ~run.test, work.needs(), work.reads(), 1.0)
        with Feed(run.store, plan, first=0, rank=workers.rank(), world=workers.world()) as feed:
            for share in feed:
                said.append(step(work, share, parameters, optimizer, 1.0))
                if share.step == 4:
                    break
    return result(root, said)


def lacking(folder, shared=False, *, rowwise=False):
    """As `five`, where at some steps one worker's cells, or those of all, lack some modalities."""
    run, said = stores.run(folder), []
    present = run.store.cells["present"].to_numpy()
    every, rna, no_protein = (np.flatnonzero(found) for found in (present == 7, present == 1, present < 4))
    halves = [
        (every[:15], every[15:30]),
        (every[30:40], rna[:15]),  # the second worker has nothing but RNA
        (rna[15:30], every[40:50]),
        (no_protein[:20], no_protein[20:40]),  # nobody has protein
        (every[50:55], every[55:60]),
    ]
    assert all(len(half) >= 5 for pair in halves for half in pair)
    with prepared(run, "joint", shared, rowwise=rowwise) as (work, root, parameters, optimizer):
        for number, pair in enumerate(halves):
            rows = pair[workers.rank()] if workers.world() > 1 else np.concatenate(pair)
            share = Share(number, len(rows), 0, run.store.read(rows))
            said.append(step(work, share, parameters, optimizer, 1.0))
    return result(root, said)


def skipping(folder, at=2):
    """As `five`, by rows, but for the step `at`, which is not taken."""
    run = stores.run(folder, **FEW)
    with prepared(run, "joint", False, rowwise=True) as (work, root, parameters, optimizer):
        losses, skips = work.losses, Skips(1, 0.0)

        def spoilt(batch, number):
            found = losses(batch, number)
            if number == at:
                return {
                    name: dataclasses.replace(loss, sum=loss.sum * math.nan) for name, loss in found.items()
                }
            return found

        work.losses = spoilt
        plan = plan_of(run.store, run.recipe, ~run.test, work.needs(), work.reads(), 1.0)
        with Feed(run.store, plan, first=0, rank=workers.rank(), world=workers.world()) as feed:
            for share in feed:
                step(work, share, parameters, optimizer, 1.0, skips)
                if share.step == 4:
                    break
        assert skips.skipped == 1
    return {name: value.clone() for name, value in root.state_dict().items()}


def gathered(tensors):
    """Of each tensor those of all workers, as one more dimension."""
    found = {}
    for name, own in tensors.items():
        parts = [torch.empty_like(own) for _ in range(workers.world())]
        dist.all_gather(parts, own.contiguous())
        found[name] = torch.stack(parts)
    return found


def gradients(rank):
    """Of a worker: few rows of a table, most of another, a matrix and a vector."""
    random = torch.Generator().manual_seed(rank)
    found = [torch.randn(*size, generator=random) for size in ((40, 3), (40, 3), (5, 7), (9,))]
    for table, rows in zip(found, (4, 35), strict=False):
        table[torch.randperm(40, generator=random)[rows:]] = 0
    return found


def summed(rank):
    """What `sum_gradients` makes of those of all workers, and how many of them went by rows."""
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients(rank)]
    for p, g in zip(parameters, gradients(rank), strict=True):
        p.grad = g
    by_rows = len(workers._touched(gradients(rank)[:3]))
    workers.sum_gradients(parameters)
    return {str(i): p.grad for i, p in enumerate(parameters)} | {"by rows": torch.tensor(by_rows)}


def result(root, said):
    numbers = torch.tensor([[row["loss"], row["gradient_norm"]] for row in said])
    assert not any(workers.shared_out(p) for p in root.state_dict().values())
    return {name: value.clone() for name, value in root.state_dict().items()} | {"said": numbers}


def trained(folder, at=None, **changes):
    """Run stage 2 in `folder`, to its end or until a kill before step `at`; the weights and the events."""
    run = stores.run(folder, **({"joint.epochs": EPOCHS, "checkpoint_seconds": 0.0} | changes))
    work, root = stage(run, "joint")
    work.epochs = EPOCHS
    losses = work.losses
    events: list[dict] = []

    def deadly(batch, number):
        if number == at:
            raise Killed
        return losses(batch, number)

    work.losses = deadly
    with contextlib.suppress(Killed):
        run_stage(
            work,
            root,
            run,
            started_from="nothing",
            eligible=~run.test,
            emit=events.append,
            stop=threading.Event(),
        )
        assert not any(workers.shared_out(p) for p in root.state_dict().values())
    return root, events


def main():
    warnings.simplefilter("error")
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    meeting = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, world_size=world, rank=rank)

    def keep(name, tensors):
        if rank == 0:
            save_file(
                {key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors"
            )

    for shared in (False, True):
        how = "shared" if shared else "whole"
        for name in STAGES:
            keep(f"{name}-{how}", five(folder, name, shared))
        keep(f"lacking-{how}", lacking(folder, shared))
    keep("lacking-rowwise", lacking(folder, rowwise=True))
    workers.TABLE = 0
    keep("summed", summed(rank))
    for name in STAGES:
        keep(f"{name}-rows", five(folder, name))
        keep(f"{name}-rowwise", five(folder, name, rowwise=True, **FEW))
    keep("skipping", gathered(skipping(folder)))
    more = {"shard": True, "optim.ema": 0.9}
    keep("undisturbed", trained(folder / "undisturbed", **more)[0].state_dict())
    trained(folder / "left", at=AT, **more)
    dist.barrier()
    if rank == 0:
        shutil.copytree(folder / "left", folder / "killed")
    dist.barrier()
    for name, changes in (("killed", more), ("taken", more), ("by-rows", {"shard": True, **FEW})):
        root, events = trained(folder / name, **changes)
        resumed = [event["resumed"] for event in events if "resumed" in event]
        keep(name, root.state_dict() | {"resumed": torch.tensor(resumed)})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
