import json
import math
import os
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.train import checkpoint, fit
from cellray.train.chain import chain
from cellray.train.run import Run
from cellray.train.skips import FEWEST, WINDOW, Diverged, Skips
from cellray.train.stages import Loss, Unimodal
from tests import stores
from tests.conftest import ROOT

NUMBERS = st.one_of(st.floats(1e-3, 1e3), st.sampled_from([math.nan, math.inf, 1e6]))


def feed(skips, loss, norm):
    """As a step asks."""
    return skips.allows(loss) and skips.allows(loss, norm)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=120), st.integers(0, 120))
def test_the_rule_is_the_plain_one_and_goes_on_from_its_state(pairs, cut):
    skips = Skips(10, 20.0)
    taken = [1.0] * (FEWEST - 20)
    skips.norms = list(taken)
    for number, (loss, norm) in enumerate(pairs):
        if number == cut:
            other = Skips(10, 20.0)
            other.restore(skips.state)
            skips = other
        usual = statistics.median(taken[-WINDOW:]) if len(taken) >= FEWEST else math.inf
        good = math.isfinite(loss) and math.isfinite(norm) and norm <= 20 * usual
        assert feed(skips, loss, norm) == good
        assert bool(skips.why) != good
        taken += [norm] * good
    assert skips.norms == taken[-WINDOW:]
    assert skips.skipped == len(pairs) - (len(taken) - FEWEST + 20)


def test_a_rule_without_spikes_takes_all_that_is_finite():
    skips = Skips(0, 0.0)
    assert all(feed(skips, 1.0, norm) for norm in [1.0] * 2 * FEWEST + [1e30])


def test_too_many_in_a_row_end_the_stage_and_one_that_is_taken_begins_anew():
    skips = Skips(2, 0.0)
    for _ in range(3):
        for _ in range(2):
            assert not feed(skips, math.nan, 1.0)
            skips.check("joint step 7")
        assert feed(skips, 1.0, 1.0)
    for _ in range(3):
        feed(skips, math.nan, 1.0)
    with pytest.raises(Diverged, match=r"joint step 7: 3 batches in a row were skipped, .*Lower optim\.lr"):
        skips.check("joint step 7")


class Poisoned(Unimodal):
    """A stage some of whose steps have a loss that is no number, or a huge gradient."""

    bad: dict[int, float] = {}  # noqa: RUF012

    def losses(self, batch, step):
        found = super().losses(batch, step)
        factor = self.bad.get(step, 1.0)
        if factor == 1.0:
            return found
        return {name: Loss(loss.sum * factor, loss.count, loss.weight) for name, loss in found.items()}


def quick(folder, **changes):
    more = {"stages": "unimodal", "unimodal.epochs": 3.0, "checkpoint_seconds": 0.0, "checkpoint_keep": 1000}
    return stores.run(folder, **(more | changes))


def poison(monkeypatch, bad):
    monkeypatch.setattr("cellray.train.chain.Unimodal", Poisoned)
    monkeypatch.setattr(Poisoned, "bad", bad)


class Killed(BaseException):
    """Stands for a kill."""


def test_bad_batches_are_skipped_named_and_never_saved(tmp_path, monkeypatch):
    run = quick(tmp_path)
    poison(monkeypatch, {2: math.nan, 3: math.inf, 5: math.nan})
    warned, saved = [], []

    def emit(event):
        if "skipped" in event:
            warned.append((event["stage"], event["skipped"], event["cells"]))
            assert f"{event['stage']} step {event['skipped']}" in event["warning"]
        if "saved" in event:
            path = run.path("checkpoints", event["stage"], f"{event['saved']:08d}", checkpoint.STATE)
            tensors = checkpoint.from_bytes(checkpoint.storage.read_bytes(path))
            assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
            saved.append(event["saved"])

    chain(run, emit)
    assert [step for name, step, _ in warned if name == "unimodal-rna"] == [2, 3, 5]
    ids = run.store.cells["cell_id"].to_pylist()
    plan = fit.plan_of(run.store, run.recipe, ~run.test, ["rna"], ["rna"], 3.0)
    for name, step, cells in warned:
        if name == "unimodal-rna":
            assert cells == [ids[row] for row in plan.rows(step)[: fit.NAMED]]
    facts = checkpoint.committed(run.path("stages", "unimodal-rna"))
    assert facts is not None
    assert facts["skipped"] == 3
    assert all(np.isfinite(list(row.values())).all() for row in facts["curve"])
    assert len(facts["curve"]) == facts["steps"] - 3
    assert len(saved) > 10


def test_a_killed_stage_with_bad_batches_ends_as_if_it_had_not_been_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("cellray.train.skips.FEWEST", 3)
    bad = {1: math.nan, 4: 1e4, 6: 1e4, 7: math.nan}
    poison(monkeypatch, bad)
    whole, broken = quick(tmp_path / "whole"), quick(tmp_path / "broken")
    chain(whole, lambda event: None)
    kills = {3, 5, 7}  # the one after may be saved as well, and not be told of any more

    def emit(event):
        if event["stage"] == "unimodal-rna" and event.get("saved") in kills:
            kills.discard(event["saved"])
            raise Killed

    while kills:
        with pytest.raises(Killed):
            chain(Run(broken.recipe), emit)
    chain(Run(broken.recipe), emit)
    for name in ("unimodal-rna", "unimodal-atac", "unimodal-protein"):
        a, b = (checkpoint.committed(run.path("stages", name)) for run in (whole, broken))
        assert a is not None
        assert b is not None
        assert (a["sha256"], a["curve"], a["skipped"]) == (b["sha256"], b["curve"], b["skipped"])
        assert a["skipped"] == sum(step < a["steps"] for step in bad)


def test_a_stage_all_of_whose_batches_are_bad_ends_with_an_error(tmp_path, monkeypatch):
    poison(monkeypatch, dict.fromkeys(range(1000), math.nan))
    with pytest.raises(Diverged, match=r"unimodal-rna step 4: 5 batches in a row"):
        chain(quick(tmp_path, **{"optim.skips": 4}), lambda event: None)
    with pytest.raises(Diverged, match=r"unimodal-rna step 2: 3 batches in a row"):
        chain(quick(tmp_path / "short", **{"unimodal.epochs": 0.5, "optim.skips": 99}), lambda event: None)


SCRIPT = """
import json, math, sys, torch
import torch.distributed as dist
from cellray.train.skips import Skips
from cellray.train import fit
from cellray.train.feed import Feed
from tests import stores
from tests.test_skips import Poisoned

folder, rank, file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{file}", world_size=2, rank=rank)
run = stores.run(folder)
teacher = run.teacher()
work = Poisoned(run.recipe.unimodal, teacher, run.tokenizer, "rna", seed=0, device="cpu")
# Each is bad on one worker alone; the other one's loss and gradient are as ever.
Poisoned.bad = {1: math.nan, 3: 1e6} if rank == 0 else {2: math.inf, 3: 1e6}
parameters, optimizer = fit.adamw(work.trained(), run.recipe.optim)
plan = fit.plan_of(run.store, run.recipe, ~run.test, ["rna"], ["rna"], 2.0)
skips, said = Skips(10, 20.0, norms=[1.0] * 50), []
with Feed(run.store, plan, first=0, rank=rank, world=2) as feed:
    for share in feed:
        fit.step(work, share, parameters, optimizer, 1.0, skips)
        said.append(skips.why)
        if share.step == 5:
            break
weights = sum(float(p.double().sum()) for p in parameters)
print(json.dumps([said, skips.norms, weights]))
dist.barrier()
dist.destroy_process_group()
"""


def test_two_workers_skip_the_same_batches(tmp_path):
    stores.run(tmp_path)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), str(rank), str(tmp_path / "rendezvous")],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert said[0] == said[1]
    reasons = json.loads(said[0])[0]
    assert ["loss" in why for why in reasons] == [False, True, True, False, False, False]
    assert "norm" in reasons[3]
    assert not reasons[0] + reasons[4] + reasons[5]


def test_a_step_that_is_skipped_changes_nothing(tmp_path):
    run = stores.run(tmp_path)
    teacher = run.teacher()
    work = Poisoned(run.recipe.unimodal, teacher, run.tokenizer, "rna", seed=0, device="cpu")
    parameters, optimizer = fit.adamw(work.trained(), run.recipe.optim)
    plan = fit.plan_of(run.store, run.recipe, ~run.test, ["rna"], ["rna"], 1.0)
    skips = Skips(10, 20.0)
    with fit.Feed(run.store, plan, first=0, rank=0, world=1) as shares:
        share = next(iter(shares))
    fit.step(work, share, parameters, optimizer, 1.0, skips)
    before = checkpoint.snapshot(teacher, optimizer)
    Poisoned.bad = {0: math.nan}
    try:
        fit.step(work, share, parameters, optimizer, 1.0, skips)
    finally:
        Poisoned.bad = {}
    assert skips.why == "the loss is nan"
    after = checkpoint.snapshot(teacher, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in parameters)
