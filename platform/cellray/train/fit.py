"""One stage as a straight loop: batches in, updates, checkpoints, a committed model out. No Ray."""

import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cellray.data import storage
from cellray.data.store import Store
from cellray.model.decoder import Decoder
from cellray.model.encoder import Encoder
from cellray.train import checkpoint, sharding, watchdog, workers
from cellray.train.averages import Averages
from cellray.train.ending import Stopped
from cellray.train.feed import Feed, Plan, Share
from cellray.train.meters import Gauges, Meter, Row
from cellray.train.parts import Part
from cellray.train.recipe import Optim, Recipe
from cellray.train.rowwise import RowwiseAdamW
from cellray.train.run import Run
from cellray.train.sampling import balanced
from cellray.train.skips import Skips
from cellray.train.stages import Stage, key_of
from cellray.train.trackers import tracked

Event = dict[str, Any]
Emit = Callable[[Event], None]

MANY = 2
"""A table is updated by rows if a step needs one in so many of them at the most."""
NAMED = 8
"""Cells that a warning about a batch names."""


def step(
    stage: Stage,
    share: Share,
    parameters: list[nn.Parameter],
    optimizer: RowwiseAdamW,
    clip: float,
    skips: Skips | None = None,
) -> dict[str, float]:
    """One optimiser update. Losses are means over the targets of all workers.

    A step that `skips` does not let pass trains nothing; it takes what is finite by default.
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
        workers.sum_gradients(parameters, optimizer.tables)
        norm = sharding.clip(parameters, clip)
        if skips.allows(value, norm):
            optimizer.step()
    if skips.why:
        optimizer.catch_up_all()
    optimizer.zero_grad()
    return {"loss": value, **dict(zip(losses, means, strict=True)), "gradient_norm": norm}


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    warm = max(1, round(optim.warmup * steps))
    if step < warm:
        return optim.lr * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return optim.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def adamw(
    modules: list[nn.Module], optim: Optim, *, asked: int = 0, read: int = 0
) -> tuple[list[nn.Parameter], RowwiseAdamW]:
    """The trained parameters and their optimiser; only the matrices of linear layers decay.

    What is shared out among the workers and what is not are in groups of their own: they do not mix.
    Decoders that are asked for `asked` features in a step, and encoders that read `read` tokens, are
    updated by rows if they have many more features.
    """
    parameters = [p for module in modules for p in module.parameters()]
    every = [m for module in modules for m in module.modules()]
    decayed = {id(m.weight) for m in every if isinstance(m, nn.Linear)}
    used = [(m.feature, asked) for m in every if isinstance(m, Decoder)]
    # Tokens of several cells are of the same features.
    used += [(m.feature, read // 2) for m in every if isinstance(m, Encoder)]
    # Means of weights are taken of all rows in every step.
    tables = [
        table
        for table, most in used
        if 0 < MANY * most <= table.num_embeddings and not optim.ema and not workers.shared_out(table.weight)
    ]
    kinds = [(id(p) in decayed, workers.shared_out(p)) for p in parameters]
    groups = [
        {
            "params": [p for p, its in zip(parameters, kinds, strict=True) if its == kind],
            "weight_decay": optim.weight_decay if kind[0] else 0.0,
        }
        for kind in ((True, False), (False, False), (True, True), (False, True))
        if kind in kinds
    ]
    return parameters, RowwiseAdamW(groups, tables, lr=optim.lr, betas=(0.9, 0.98))


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
    work = Work(stage, root, run, run.key(stage.name, started_from), eligible, emit)
    work.resume()
    gauges = work.train(stop)
    work.finish()
    facts = {**work.facts(), "started_from": started_from, **gauges.facts(), **work.curve()}
    if work.lead:
        facts = checkpoint.commit(run.path("stages", stage.name), root, facts)
        storage.remove_folder(work.folder)
    return dict(workers.from_first(facts))


class Work:
    """A stage under way in this worker: what it trains, how far it came, and what that cost."""

    def __init__(
        self, stage: Stage, root: nn.Module, run: Run, key: str, eligible: np.ndarray, emit: Emit
    ) -> None:
        """`root` holds what the stage trains; what else it holds is frozen. `eligible` bool [cells]."""
        recipe = run.recipe
        self.stage, self.root, self.run, self.key = stage, root, run, key
        self.folder = run.path("checkpoints", stage.name)
        self.lead = workers.rank() == 0
        self.device = next(root.parameters()).device.type
        self.halved = recipe.precision == "bf16" or (recipe.precision == "auto" and fast_bf16(self.device))
        root.train().requires_grad_(False)
        for module in stage.trained():
            module.requires_grad_(True)
        self.shares = sharding.Shares(root, self.device) if recipe.shard and workers.world() > 1 else None
        self.parameters, self.optimizer = adamw(
            stage.trained(), recipe.optim, asked=stage.asked, read=recipe.feed.tokens
        )
        trained = {name: p for name, p in root.named_parameters() if p.requires_grad}
        self.averages = Averages(trained, recipe.optim.ema)
        self.plan = plan_of(run.store, recipe, eligible, stage.needs(), stage.reads(), stage.epochs)
        # A stage none of whose batches could be used has not been trained.
        self.skips = Skips(min(recipe.optim.skips, self.plan.steps - 1), recipe.optim.spike)
        self.meter, self.first = Meter(), 0
        self._emit = emit
        self._saved = 0.0
        """When the last checkpoint was begun, as `time.monotonic`."""

    def resume(self) -> None:
        """Take up the newest whole checkpoint, if there is one."""
        # One of them looks: two could find that another one is the newest.
        found = checkpoint.newest(self.folder, self.key, self.warn) if self.lead else None
        step = workers.from_first(found[1]["step"] if found else None)
        if step is None:
            return
        tensors, facts = found or checkpoint.read(self.folder, step, self.key)
        checkpoint.restore(tensors, self.root, self.optimizer, self.averages)
        self.averages.steps = facts["averaged"]
        self.meter, self.first = Meter(**facts["meter"]), facts["step"]
        self.skips.restore(facts["skips"])
        self.tell({"resumed": self.first})

    def train(self, stop: threading.Event) -> Gauges:
        """Take the steps that are left; what they cost."""
        name, meter, lead = self.stage.name, self.meter, self.lead
        before, waited = meter.seconds, meter.waited
        with (
            checkpoint.Saver(self.folder, self.run.recipe.checkpoint_keep, self.part()) as saver,
            tracked(self.run, name, self.first, self.warn) as log,
            Gauges(self.root, meter, device=self.device, halved=self.halved, first_worker=lead) as gauges,
            Feed(
                self.run.store, self.plan, first=self.first, rank=workers.rank(), world=workers.world()
            ) as feed,
        ):
            self._saved = began = time.monotonic()
            for share in feed:
                rate, losses = self.step(share, gauges)
                watchdog.beat()
                now = time.monotonic()
                meter.seconds, meter.waited = before + now - began, waited + feed.waited
                meter.cells, meter.tokens = meter.cells + share.cells, meter.tokens + share.tokens
                self.note(share, rate, losses, gauges, log, now)
                self.save(share.step + 1, saver, now, stop)
        self.tell(*saver.events())
        return gauges

    def step(self, share: Share, gauges: Gauges) -> tuple[float, dict[str, float]]:
        """One optimiser update: its learning rate and its losses."""
        optim = self.run.recipe.optim
        rate = learning_rate(optim, share.step, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        halved = torch.autocast(self.device, torch.bfloat16, enabled=self.halved)
        with halved, gauges.counted(share.tokens):
            losses = step(self.stage, share, self.parameters, self.optimizer, optim.clip, self.skips)
        if not self.skips.why:
            self.averages.update()
        return rate, losses

    def note(
        self,
        share: Share,
        rate: float,
        losses: dict[str, float],
        gauges: Gauges,
        log: Callable[[int, Row], None],
        now: float,
    ) -> None:
        """Write down how a step went, or that it was skipped. Diverged if too many were, in a row."""
        name, done, steps = self.stage.name, share.step + 1, self.plan.steps
        if self.skips.why:
            if self.lead:
                self._emit(skipped(self.run.store, self.plan, self.stage, share.step, self.skips.why))
            self.skips.check(f"{name} step {share.step}")
            return
        self.meter.add(share.step, steps, losses)
        gauges.add(losses, rate)
        if self.lead and (gauges.due(now) or done == steps):
            row, means = gauges.row(name, done, steps)
            log(done, row)
            self._emit({**row, "losses": means})

    def save(self, done: int, saver: checkpoint.Saver, now: float, stop: threading.Event) -> None:
        """Begin a checkpoint, if it is time for one. Stopped, after a last one, if any worker should stop."""
        due = leaving = False
        if done < self.plan.steps:
            if self.lead and now - self._saved > self.run.recipe.checkpoint_seconds:
                # When the first worker is ready all of them are: it waits for their parts.
                due = saver.ready()
                self._saved = time.monotonic()
            due, leaving = workers.any_of(due, stop.is_set())
        if (due or leaving) and (self.lead or self.shares):
            begin = saver.last if leaving else saver.save
            begin(done, self.root, self.optimizer, self.about(), self.averages)
        self.tell(*saver.events())
        if leaving:
            raise Stopped

    def finish(self) -> None:
        """Make the model what the stage has come to, whole on every worker."""
        self.optimizer.settle()
        self.averages.put()
        if self.shares:
            self.shares.undo()

    def part(self) -> Part | None:
        """What this worker writes of every checkpoint, where they share that out."""
        if not self.shares:
            return None
        return Part(workers.from_first(uuid.uuid4().hex), workers.rank(), workers.world())

    def about(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors."""
        return {
            "key": self.key,
            "meter": vars(self.meter),
            "skips": self.skips.state,
            "averaged": self.averages.steps,
        }

    def facts(self) -> dict[str, Any]:
        """What came of it, and what it cost."""
        return {
            "name": self.stage.name,
            "key": self.key,
            "store": self.run.store.hash,
            "workers": workers.world(),
            "parameters": sum(p.numel() for p in self.parameters),
            "steps": self.plan.steps,
            "cells": self.meter.cells,
            "tokens": self.meter.tokens,
            "skipped": self.skips.skipped,
            **self.meter.facts(),
        }

    def curve(self) -> dict[str, Any]:
        """The losses, first, last and between."""
        rows = self.meter.rows
        return {"loss_first": rows[0]["loss"], "loss_last": rows[-1]["loss"], "curve": rows}

    def tell(self, *events: Event) -> None:
        for event in events:
            self._emit({"stage": self.stage.name, **event})

    def warn(self, text: str) -> None:
        self.tell({"warning": text})


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
