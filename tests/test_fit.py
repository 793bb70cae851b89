import itertools
import json

import numpy as np
import pytest
import torch

from cellray.data import storage
from cellray.train import checkpoint
from cellray.train.chain import chain, check, outlook
from cellray.train.fit import learning_rate, plan_of
from cellray.train.recipe import Optim, override
from cellray.train.run import Run
from tests import stores
from tests.chains import killed


def quick(folder, **changes):
    return stores.run(
        folder, **{"unimodal.epochs": 0.5, "distil.epochs": 1.0, "checkpoint_seconds": 0.0, **changes}
    )


def facts(run, name):
    found = checkpoint.committed(run.path("stages", name))
    assert found is not None
    return found


def weights(run):
    return {name: facts(run, name)["sha256"] for name in run.chain()}


def test_a_killed_chain_ends_as_if_it_had_not_been_killed(tmp_path):
    whole = quick(tmp_path / "whole")
    chain(whole, lambda event: None)
    broken = quick(tmp_path / "broken")
    resumed = killed(broken.recipe, [("unimodal-rna", 1), ("joint", 2), ("distil", 3)])
    assert resumed == ["unimodal-rna", "joint", "distil"]
    assert weights(broken) == weights(whole)


def test_running_again_trains_nothing(tmp_path):
    run = quick(tmp_path)
    chain(run, lambda event: None)
    before = weights(run)
    seen: list = []
    chain(Run(run.recipe), seen.append)
    assert all("finished" in event for event in seen)
    assert weights(run) == before


def test_stages_can_be_run_one_by_one(tmp_path):
    run = quick(tmp_path)
    with pytest.raises(ValueError, match="unimodal-rna has not finished"):
        chain(quick(tmp_path, stages="joint"), lambda event: None)
    for kind in ("unimodal", "joint", "distil"):
        chain(quick(tmp_path, stages=kind), lambda event: None)
    whole = quick(tmp_path / "whole")
    chain(whole, lambda event: None)
    assert weights(run) == weights(whole)


def test_the_outlook_is_what_training_then_does(tmp_path):
    run = quick(tmp_path)
    foreseen = {s.name: s for s in outlook(run)}
    chain(run, lambda event: None)
    for name in run.chain():
        done = facts(run, name)
        assert (done["steps"], done["cells"], done["tokens"]) == (
            foreseen[name].steps,
            foreseen[name].cells,
            foreseen[name].tokens,
        )
        assert done["curve"][-1]["step"] == done["steps"]
    assert all(s.finished for s in outlook(run))


def test_a_stage_that_reads_what_no_cell_has_is_refused_before_anything_is_trained(tmp_path):
    stores.write(str(tmp_path / "store"), measured=("atac", "protein"))
    said = r"distil reads rna, and .* holds atac, protein alone\. Ingest rna too, .* stages=unimodal,joint"
    for refuse in (check, outlook, lambda run: chain(run, lambda event: None)):
        with pytest.raises(ValueError, match=said):
            refuse(quick(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"store"}
    run = quick(tmp_path, stages="unimodal,joint")
    assert [stage.name for stage in outlook(run)] == ["unimodal-atac", "unimodal-protein", "joint"]
    chain(run, lambda event: None)
    assert run.trained_teacher().names == ("atac", "protein")


def test_a_stage_whose_cells_are_all_held_out_is_refused(tmp_path):
    run = quick(tmp_path)
    has = run.store.cells["present"].to_numpy() & 4 > 0
    run.split = (has, run.split[1])
    with pytest.raises(ValueError, match=rf"unimodal-protein has no cell .* {has.sum()} have protein"):
        check(run)


@pytest.mark.parametrize("stages", ["", "joint,joint", "unimodal,jonit"])
def test_stages_are_named_each_once(tmp_path, stages):
    with pytest.raises(ValueError, match="stages"):
        quick(tmp_path, stages=stages)


def test_held_out_cells_are_never_trained_on(tmp_path):
    run = quick(tmp_path)
    donors = run.store.cells["donor"].to_pandas()
    assert set(donors[run.test]).isdisjoint(donors[~run.test])
    cells = sum(s.cells for s in outlook(quick(tmp_path, **{"distil.epochs": 1.0})) if s.name == "control")
    rna = run.store.cells["present"].to_numpy() & 1 == 1
    assert cells == (rna & ~run.test).sum()


def test_a_run_keeps_the_edition_of_the_store_it_began_with(tmp_path):
    before = quick(tmp_path)
    assert before.test.any()
    manifest = before.store.manifest
    (tmp_path / "store" / "store-000002.json").write_text(
        json.dumps(manifest | {"edition": 2, "shards": manifest["shards"][:1]})
    )
    after = quick(tmp_path)
    assert after.store.hash == before.store.hash
    assert len(after.test) == len(before.test)
    other = quick(tmp_path / "other", store=str(tmp_path / "store"))
    assert len(other.store) < len(before.store)


def test_rare_groups_come_more_often_when_the_recipe_says_so(tmp_path):
    run = quick(tmp_path, **{"feed.balance": 0.0, "feed.balance_by": "label", "feed.window": 1})
    labels = np.array(run.store.cells["label"].to_pylist())
    every = np.ones(len(labels), bool)
    plain = override(run.recipe, {"feed.balance": 1.0})
    shares = {}
    for name, recipe in (("plain", plain), ("balanced", run.recipe)):
        plan = plan_of(run.store, recipe, every, ["rna"], ["rna"], 20.0)
        rows = np.concatenate([plan.rows(step) for step in range(plan.steps)])
        shares[name] = np.bincount(np.unique(labels, return_inverse=True)[1][rows]) / len(rows)
    assert np.ptp(shares["balanced"]) < 0.5 * np.ptp(shares["plain"])
    odd = override(run.recipe, {"feed.balance_by": "typ"})
    with pytest.raises(ValueError, match="cannot be balanced by 'typ': there are dataset, donor"):
        plan_of(run.store, odd, every, ["rna"], ["rna"], 1.0)


def test_another_recipe_is_refused_in_the_same_folder(tmp_path):
    run = quick(tmp_path)
    run.claim()
    quick(tmp_path, workers=1, checkpoint_seconds=9.0).claim()
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.001 there, 0\.01 now"):
        quick(tmp_path, **{"optim.lr": 0.01}).claim()
    with pytest.raises(ValueError, match="holds out other cells"):
        _ = run.test, Run(override(run.recipe, {"split.fraction": 0.5})).test


def test_a_damaged_stage_is_refused(tmp_path):
    run = quick(tmp_path, stages="unimodal")
    chain(run, lambda event: None)
    path = tmp_path / "stages" / "unimodal-atac" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ValueError, match=r"model\.safetensors has sha256"):
        chain(Run(run.recipe), lambda event: None)


def module(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    return model, optimizer


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    model, optimizer = module()
    states = optimizer.state_dict()["state"].items()
    wanted = {index: {name: value.clone() for name, value in state.items()} for index, state in states}
    checkpoint.save(str(tmp_path), 3, model, optimizer, {"key": "k"})
    found = checkpoint.newest(str(tmp_path), "k", print)
    assert found is not None
    tensors, manifest = found
    other, its = module(1)
    checkpoint.restore(tensors, other, its)
    assert manifest["step"] == 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    restored = its.state_dict()["state"]
    for index, state in wanted.items():
        assert all(torch.equal(state[name], restored[index][name]) for name in state)


@pytest.mark.parametrize("harm", ["no manifest", "cut state", "flipped byte", "torn manifest", "other key"])
def test_the_newest_whole_checkpoint_is_used_and_bad_ones_are_told_of(tmp_path, harm):
    model, optimizer = module()
    for step in (3, 6):
        checkpoint.save(str(tmp_path), step, model, optimizer, {"key": "k"})
    here = tmp_path / "00000006"
    state = (here / "state.safetensors").read_bytes()
    if harm == "no manifest":
        (here / "manifest.json").unlink()
    elif harm == "cut state":
        (here / "state.safetensors").write_bytes(state[:-9])
    elif harm == "flipped byte":
        (here / "state.safetensors").write_bytes(state[:100] + bytes([state[100] ^ 1]) + state[101:])
    elif harm == "torn manifest":
        (here / "manifest.json").write_text('{"step": 6, "sha')
    else:
        manifest = json.loads((here / "manifest.json").read_text())
        (here / "manifest.json").write_text(json.dumps({**manifest, "key": "of something else"}))
    told: list = []
    found = checkpoint.newest(str(tmp_path), "k", told.append)
    assert found is not None
    _, manifest = found
    assert manifest["step"] == 3
    assert len(told) == 1
    assert "00000006" in told[0]


def test_old_checkpoints_go(tmp_path):
    model, optimizer = module()
    for step in range(1, 6):
        checkpoint.save(str(tmp_path), step, model, optimizer, {"key": "k"})
    assert checkpoint.steps(str(tmp_path)) == [4, 5]
    assert not storage.exists(str(tmp_path / "00000001"))


def test_the_learning_rate_rises_then_falls():
    rates = [learning_rate(Optim(lr=1.0, warmup=0.1), step, 100) for step in range(100)]
    assert rates.index(max(rates)) in (9, 10)
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] < 0.02
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
