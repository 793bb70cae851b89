"""Sweeps: what may be searched, how trials are judged, and a small sweep from end to end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray import tune

from cellray.data.simulate import simulate
from cellray.data.truth import Simulation
from cellray.train.recipe import DataSet, Feed, Joint, Network, Optim, Recipe, Unimodal, override, to_json
from pipelines import command
from tune import spaces, sweep
from tune.sweep import Sweep, best, check_room, check_space, draw, load_space, search, table
from tune.trial import Judge, Trial, final_loss

# Ray Data warns of its own defaults.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")

RNA = Sweep(stage="unimodal-rna", trials=2, grace=25, reduction=2)


def hopeless():
    """Two settings, of which the first learns nothing."""
    return {"optim.lr": tune.choice([1e-7]), "optim.warmup": tune.choice([0.1, 0.2])}


def recipe(folder="runs/sweep", atlas=""):
    return Recipe(
        dataset=DataSet(
            name="cite", rna=f"{atlas}/cite_rna.h5ad", label="cell_type", donor="donor", layer="counts"
        ),
        run=str(folder),
        workers=1,
        network=Network(width=16, layers=1, heads=2, fusion_layers=1),
        feed=Feed(tokens=4096, cells=16, window=1),
        optim=Optim(lr=3e-3),
        unimodal=Unimodal(epochs=8, queries=256),
        joint=Joint(epochs=1, queries=256),
    )


def trial(number, loss, state="finished", **changes):
    settings = {"optim.lr": 1e-3 * (number + 1)}
    usual = Trial(trial=f"{number:03d}", settings=settings, loss=loss, percent=100, seconds=2.0, state=state)
    return replace(usual, **changes)


@pytest.mark.parametrize(
    ("space", "stage"),
    [(spaces.optimiser, "joint"), (spaces.optimiser, "unimodal-atac"), (spaces.network, "joint"),
     (spaces.masking, "joint"), (spaces.student, "distil")],
)  # fmt: skip
def test_the_spaces_that_come_along_fit_a_recipe(space, stage):
    assert len(space()) >= 2
    check_space(space(), Recipe(), Sweep(stage=stage))
    assert len(draw(space(), Recipe(), 6)) == 6


@pytest.mark.parametrize(
    ("space", "stage", "said"),
    [
        ({}, "joint", "space is empty"),
        ({"optim.rate": tune.uniform(0, 1)}, "joint", "no setting 'optim.rate'"),
        ({"optim.lr": [1e-3, 1e-4]}, "joint", "no distribution"),
        ({"split.fraction": tune.uniform(0.1, 0.3)}, "joint", "split.fraction is not for a sweep"),
        ({"joint.dropout": tune.uniform(0, 0.5)}, "joint", "changes what the loss of joint measures"),
        ({"unimodal.zeros": tune.uniform(0, 1)}, "unimodal-rna", "changes what the loss of unimodal-rna"),
        ({"optim.lr": tune.uniform(0, 1)}, "distil", "changes what the loss of distil measures"),
    ],
)
def test_spaces_that_cannot_be_compared_are_refused(space, stage, said):
    with pytest.raises(ValueError, match=said):
        check_space(space, Recipe(), Sweep(stage=stage))


def test_settings_that_cannot_be_are_refused_before_anything_starts():
    with pytest.raises(ValueError, match=r"no multiple of network\.heads"):
        draw({"network.width": tune.choice([30, 31])}, Recipe(), 3)


@pytest.mark.parametrize("path", ["tune.spaces", "tune.spaces:optimizer", "tune.nowhere:space"])
def test_a_space_that_is_not_there_is_refused(path):
    with pytest.raises(ValueError, match=path):
        load_space(path)


def test_trials_and_workers_that_do_not_fit_the_cpus_are_refused():
    two = replace(Recipe(), workers=2)
    check_room(two, Sweep(concurrent=1), {"CPU": 4.0})
    with pytest.raises(ValueError, match=r"need 4\.2 CPUs, the cluster has 4"):
        check_room(two, Sweep(concurrent=2), {"CPU": 4.0})
    with pytest.raises(ValueError, match="need 2 GPUs, the cluster has 0"):
        check_room(replace(two, gpu=True), Sweep(), {"CPU": 64.0})


def test_draws_begin_with_the_recipe_and_repeat_with_its_seed():
    space = {"optim.lr": tune.loguniform(1e-4, 1e-2), "network.layers": tune.choice([1, 2])}
    drawn = draw(space, Recipe(), 5)
    assert drawn[0] == {"optim.lr": Recipe().optim.lr, "network.layers": Recipe().network.layers}
    assert drawn == draw(space, Recipe(), 5)
    assert drawn[1:] != draw(space, Recipe(seed=1), 5)[1:]


def test_no_two_trials_are_alike():
    drawn = draw({"network.layers": tune.choice([1, 2, 3])}, Recipe(), 10)
    assert sorted(d["network.layers"] for d in drawn) == [1, 2, 3]


def test_a_judge_reports_one_stage_in_percent_and_goes_on_after_a_restart():
    told = []
    judge = Judge("joint", [], lambda reports: told.append(reports[-1]), clock=lambda: 7.0)
    judge({"stage": "unimodal-rna", "step": 10, "steps": 10, "losses": {"loss": 9.0}})
    for step in range(1, 101):
        judge({"stage": "joint", "step": step, "steps": 200, "losses": {"loss": float(step)}})
    assert [r["percent"] for r in told] == list(range(5, 51, 5))
    assert told[0]["loss"] == sum(range(1, 11)) / 10
    judge = Judge("joint", told, lambda reports: told.append(reports[-1]), clock=lambda: 7.0)
    judge({"stage": "joint", "step": 80, "steps": 200, "losses": {"loss": 1.0}})
    assert told[-1]["percent"] == 50
    judge(
        {"stage": "joint", "finished": {"curve": [{"step": s, "loss": s / 10} for s in (50, 100, 190, 200)]}}
    )
    assert told[-1] == {"percent": 100, "loss": 19.5, "seconds": 0.0}


def test_the_final_loss_is_that_of_the_last_tenth():
    assert final_loss([{"step": s, "loss": float(s)} for s in range(1, 101)]) == 95.5
    assert final_loss([{"step": 1, "loss": 2.0}]) == 2.0


def test_the_best_trial_is_one_that_finished():
    trials = [trial(0, 2.0), trial(1, 1.5), trial(2, 1.0, "stopped", percent=30), trial(3, None, "failed")]
    chosen = best(trials)
    assert chosen is not None
    assert chosen.trial == "001"
    assert best(trials[2:]) is None
    lines = table(trials).splitlines()
    assert lines[0].split() == ["trial", "optim.lr", "loss", "at", "seconds", "state"]
    assert lines[3].split() == ["002", "0.003", "1.0000", "30", "%", "2", "stopped"]


def test_the_command_refuses_what_is_wrong_before_ray_starts(capsys):
    assert sweep.main(["tests.ray.test_sweep:recipe", "tune.spaces:optimiser", "sweep.trial=3"]) == 2
    assert "Did you mean 'trials'?" in capsys.readouterr().err
    assert sweep.main(["tests.ray.test_sweep:recipe", "tune.spaces:masking", "sweep.stage=unimodal-rna"]) == 2
    assert "judge by another stage" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        sweep.main(["--help"])
    assert "sweep.trials=8" in capsys.readouterr().out


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "atlas"
    simulation = Simulation(cells=240, genes=60, peaks=40, proteins=4, types=2, nuisance=2, depth=80)
    return simulate(str(folder), simulation).parent


@pytest.fixture(scope="module")
def swept(ray_session, atlas, tmp_path_factory):
    made = recipe(tmp_path_factory.mktemp("sweep") / "run", atlas)
    return made, search(made, hopeless(), RNA, mode="quiet")


def test_a_sweep_finds_the_better_settings_and_writes_them_as_overrides(swept):
    made, trials = swept
    assert [t.trial for t in trials] == ["000", "001"]
    assert trials[0].state == "finished"
    assert (trials[1].state == "stopped") == (trials[1].percent < 100)
    if trials[1].state == "finished":
        assert trials[0].loss < trials[1].loss
    settings = command.changes([f"@{made.run}/best.json"])
    assert settings == trials[0].settings
    assert override(made, settings).optim == made.optim
    told = json.loads(Path(made.run, "sweep.json").read_text())
    assert told["best"] == "000"
    assert [row["state"] for row in told["trials"]] == [t.state for t in trials]


def test_a_trial_that_was_stopped_gives_its_cpus_back(swept):
    until = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 4.0:
        assert time.monotonic() < until, ray.available_resources()
        time.sleep(0.2)


def test_all_trials_read_one_store(swept):
    made, _ = swept
    run = Path(made.run)
    assert (run / "store" / "store.json").exists()
    assert [p.parent.parent for p in run.rglob("store.json")] == [run]
    assert not (run / "tune").exists()


def test_a_sweep_that_has_ended_is_not_repeated_and_another_is_refused(swept):
    made, trials = swept
    began = time.monotonic()
    assert search(made, hopeless(), RNA, mode="quiet") == trials
    assert time.monotonic() - began < 2
    with pytest.raises(ValueError, match="holds a sweep with another sweep and another trials"):
        search(made, hopeless(), replace(RNA, trials=3), mode="quiet")


def test_an_interrupted_sweep_keeps_what_ended_and_tells_why_a_trial_failed(swept, tmp_path):
    made, trials = swept
    shutil.copytree(made.run, tmp_path / "run")
    made = replace(made, run=str(tmp_path / "run"), store=f"{made.run}/store")
    for name in ("sweep.json", "best.json", "trials/001"):
        path = Path(made.run, name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    Path(made.run, "trials/001").mkdir()
    other = override(made, {"optim.lr": 0.5})
    Path(made.run, "trials/001/recipe.json").write_text(json.dumps(to_json(other)))
    model = Path(made.run, "trials/000/stages/unimodal-rna/model.safetensors")
    before = model.stat().st_mtime_ns
    again = search(made, hopeless(), RNA, mode="quiet")
    assert model.stat().st_mtime_ns == before
    assert again[0] == trials[0]
    assert again[1].state == "failed"
    assert "begun with other settings" in again[1].error
    assert json.loads(Path(made.run, "best.json").read_text()) == trials[0].settings


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_a_sweep_that_was_killed_goes_on_with_the_same_command(atlas, tmp_path, root):
    here = "tests.ray.test_sweep"
    args = [sys.executable, "-m", "tune.sweep", f"{here}:recipe", f"{here}:hopeless",
            f"dataset.rna={atlas}/cite_rna.h5ad", f"run={tmp_path}/run", "sweep.stage=unimodal-rna",
            "sweep.trials=2", "unimodal.epochs=60", "checkpoint_seconds=0.5"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": f"{root}/platform:{root}"}
    first = subprocess.Popen(args, cwd=root, env=env, start_new_session=True)
    waiting = time.monotonic() + 240
    while not (tmp_path / "run/trials/000/checkpoints").exists():
        assert time.monotonic() < waiting
        assert first.poll() is None
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "run/sweep.json").exists()
    second = subprocess.run(args, cwd=root, env=env, capture_output=True, text=True, timeout=280)
    assert second.returncode == 0, second.stderr
    assert "pipelines.pretrain tests.ray.test_sweep:recipe" in second.stdout
    assert json.loads((tmp_path / "run/sweep.json").read_text())["best"] == "000"
