"""One stage as a straight loop: batches in, updates, checkpoints, a committed model out. No Ray."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cellray.data.store import Store
from cellray.train import checkpoint, watchdog, workers
from cellray.train.ending import Stopped
from cellray.train.feed import Feed, Plan, Share
from cellray.train.meters import Gauges, Meter
from cellray.train.recipe import Optim, Recipe
from cellray.train.run import Run
from cellray.train.sampling import balanced
from cellray.train.skips import Skips
from cellray.train.stages import Stage, key_of
from cellray.train.trackers import tracked

Event = dict[str, Any]
Emit = Callable[[Event], None]

NAMED = 8
"""Cells that a warning about a batch names."""


def step(
    stage: Stage,
    share: Share,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    clip: float,
    skips: Skips | None = None,
) -> dict[str, float]:
    """One optimiser update. Losses are means over the targets of all workers.

    A step that `skips` does not let pass changes nothing but `skips`; it takes what is finite by default.
    """
    skips = skips or Skips(0, 0.0)
    losses = stage.losses(share.batch, share.step)
    sums = torch.stack([loss.sum.detach().double().cpu() for loss in losses.values()])
    counts = torch.tensor([loss.count for loss in losses.values()], dtype=torch.float64)
    sums, counts = workers.total(torch.stack([sums, counts]))
    whole = sum(
        loss.weight / max(float(n), 1.0) * loss.sum for loss, n in zip(losses.values(), counts, strict=True)
    )
    assert isinstance(whole, torch.Tensor)
    means = (sums / counts.clamp_min(1.0)).tolist()
    value = sum(loss.weight * mean for loss, mean in zip(losses.values(), means, strict=True))
    norm = math.nan
    if skips.allows(value):
        whole.backward()
        workers.sum_gradients(parameters)
        norm = float(nn.utils.clip_grad_norm_(parameters, clip))
        if skips.allows(value, norm):
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": value, **dict(zip(losses, means, strict=True)), "gradient_norm": norm}


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    warm = max(1, round(optim.warmup * steps))
    if step < warm:
        return optim.lr * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return optim.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def adamw(modules: list[nn.Module], optim: Optim) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """The trained parameters and their optimiser; only the matrices of linear layers decay."""
    parameters = [p for module in modules for p in module.parameters()]
    linear = [m for module in modules for m in module.modules() if isinstance(m, nn.Linear)]
    decayed = {id(m.weight) for m in linear}
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return parameters, torch.optim.AdamW(groups, lr=optim.lr, betas=(0.9, 0.98), fused=True)


def fast_bf16(device: str) -> bool:
    """Whether bf16 matrix products have instructions of their own here."""
    if device != "cpu":
        return bool(torch.cuda.is_bf16_supported())
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def run_stage(
    stage: Stage,
    root: nn.Module,
    run: Run,
    *,
    started_from: str,
    eligible: np.ndarray,
    emit: Emit,
    stop: threading.Event,
) -> dict[str, Any]:
    """Train one stage to its end and commit it; returns what `stage.json` holds.

    Goes on from the newest whole checkpoint, so a run that was killed ends as if it had not been.
    When `stop` is set, in any worker, all end with Stopped after a last checkpoint.
    """
    recipe, folder = run.recipe, run.path("checkpoints", stage.name)
    key = run.key(stage.name, started_from)
    root.train().requires_grad_(False)
    for module in stage.trained():
        module.requires_grad_(True)
    parameters, optimizer = adamw(stage.trained(), recipe.optim)
    plan = plan_of(run.store, recipe, eligible, stage.needs(), stage.reads(), stage.epochs)
    meter, first = Meter(), 0
    # A stage none of whose batches could be used has not been trained.
    skips = Skips(min(recipe.optim.skips, plan.steps - 1), recipe.optim.spike)
    found = checkpoint.newest(folder, key, lambda text: emit({"stage": stage.name, "warning": text}))
    if found is not None:
        tensors, facts = found
        checkpoint.restore(tensors, root, optimizer)
        meter, first = Meter(**facts["meter"]), facts["step"]
        skips.restore(facts["skips"])
        emit({"stage": stage.name, "resumed": first})
    device = next(root.parameters()).device.type
    halved = recipe.precision == "bf16" or (recipe.precision == "auto" and fast_bf16(device))
    lead, world = workers.rank() == 0, workers.world()
    before, waited = meter.seconds, meter.waited

    def about() -> dict[str, Any]:
        return {"key": key, "meter": vars(meter), "skips": skips.state}

    with (
        checkpoint.Saver(folder, recipe.checkpoint_keep) as saver,
        tracked(run, stage.name, first, lambda text: emit({"stage": stage.name, "warning": text})) as log,
        Gauges(root, meter, device=device, halved=halved, first_worker=lead) as gauges,
        Feed(run.store, plan, first=first, rank=workers.rank(), world=world) as feed,
    ):
        saved = began = time.monotonic()
        for share in feed:
            rate = learning_rate(recipe.optim, share.step, plan.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device, torch.bfloat16, enabled=halved), gauges.counted(share.tokens):
                losses = step(stage, share, parameters, optimizer, recipe.optim.clip, skips)
            watchdog.beat()
            now = time.monotonic()
            meter.seconds, meter.waited = before + now - began, waited + feed.waited
            meter.cells, meter.tokens = meter.cells + share.cells, meter.tokens + share.tokens
            done = share.step + 1
            if skips.why:
                if lead:
                    emit(skipped(run.store, plan, stage, share.step, skips.why))
                skips.check(f"{stage.name} step {share.step}")
            else:
                meter.add(share.step, plan.steps, losses)
                gauges.add(losses, rate)
                if lead and (gauges.due(now) or done == plan.steps):
                    row, means = gauges.row(stage.name, done, plan.steps)
                    log(done, row)
                    emit({**row, "losses": means})
            if lead and now - saved > recipe.checkpoint_seconds and done < plan.steps:
                saver.save(done, root, optimizer, about())
                saved = time.monotonic()
            leaving = done < plan.steps and workers.agreed(stop.is_set())
            if lead and leaving:
                saver.last(done, root, optimizer, about())
            for event in saver.events():
                emit({"stage": stage.name, **event})
            if leaving:
                raise Stopped
    for event in saver.events():
        emit({"stage": stage.name, **event})
    facts = {
        "name": stage.name,
        "key": key,
        "started_from": started_from,
        "store": run.store.hash,
        "workers": world,
        "parameters": sum(p.numel() for p in parameters),
        "steps": plan.steps,
        "cells": meter.cells,
        "tokens": meter.tokens,
        "skipped": skips.skipped,
        **meter.facts(),
        **gauges.facts(),
        "loss_first": meter.rows[0]["loss"],
        "loss_last": meter.rows[-1]["loss"],
        "curve": meter.rows,
    }
    if lead:
        facts = checkpoint.commit(run.path("stages", stage.name), root, facts)
        checkpoint.remove(folder)
    return dict(workers.from_first(facts))


def skipped(store: Store, plan: Plan, stage: Stage, step: int, why: str) -> Event:
    """The warning about a batch that was skipped, with the first of its cells."""
    rows = plan.rows(step)
    ids = store.cells["cell_id"].take(rows[:NAMED]).to_pylist()
    text = (
        f"{stage.name} step {step}: a batch of {len(rows)} cells was skipped, as {why} ({', '.join(ids)}, …)"
    )
    return {"stage": stage.name, "warning": text, "skipped": step, "cells": ids}


def plan_of(
    store: Store,
    recipe: Recipe,
    eligible: np.ndarray,
    needs: Sequence[str],
    reads: Sequence[str],
    epochs: float,
) -> Plan:
    """The batches of a stage: eligible cells with one of the modalities it needs, by the tokens it reads."""
    present = store.cells["present"].to_numpy()
    names = list(store.tokenizer.vocabularies)
    bits = sum(1 << names.index(name) for name in needs)
    lengths = sum(store.cells[f"{name}.length"].to_numpy().astype(np.int64) for name in reads)
    feed = recipe.feed
    weights = balanced(store.cells, feed.balance_by, power=feed.balance) if feed.balance < 1 else None
    return Plan(
        starts=store.starts,
        lengths=np.asarray(lengths),
        eligible=eligible & (present & bits > 0),
        seed=key_of(recipe.seed, "plan"),
        epochs=epochs,
        tokens=feed.tokens,
        cells=feed.cells,
        window=feed.window,
        weights=weights,
    )
