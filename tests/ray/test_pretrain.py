import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cellray.data import storage
from cellray.train import checkpoint, lease
from cellray.train.chain import chain
from cellray.train.ending import TERMINATED
from tests import stores
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("short")


def command(folder, *settings, environment=os.environ):
    """`python -m pipelines.pretrain` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.pretrain", "pipelines.recipes.tiny:recipe", "--plain", *settings],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def settings(folder, more=()):
    """Words of a command: a short run of every stage, with `more` settings in place of those here."""
    found = {
        "run": folder,
        "unimodal.epochs": 0.2,
        "joint.epochs": 25,
        "distil.epochs": 0.4,
        "checkpoint_seconds": 0.1,
        # Decoders are updated by rows.
        "unimodal.queries": 16,
        "joint.queries": 16,
        "distil.queries": 16,
    }
    return [f"{key}={value}" for key, value in (found | dict(more)).items()]


def of(session):
    """Processes of a session, with their names."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
                with open(f"/proc/{entry.name}/cmdline") as file:
                    name = file.read()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(entry.name)] = name
    return found


def killed(process):
    """Kill the driver alone, and wait until the workers it had started have ended by themselves."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while any("RayTrainWorker" in name for name in of(process.pid).values()):
        assert time.monotonic() < deadline, of(process.pid)
        time.sleep(0.1)
    for pid in of(process.pid):  # Ray's agents take minutes to see that they are alone
        os.kill(pid, signal.SIGKILL)


def await_checkpoints(folder, process, number=2):
    """Wait until a stage has that many."""
    deadline = time.monotonic() + 200
    while len(checkpoint.steps(folder)) < number:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_that_is_told_to_end_saves_and_is_gone_in_time(tmp_path):
    stores.write(str(tmp_path / "store"))
    folder = str(tmp_path / "checkpoints" / "unimodal-rna")
    long = ["unimodal.epochs=200", "checkpoint_seconds=1"]
    process = command(tmp_path, *settings(tmp_path)[:1], *long)
    await_checkpoints(folder, process, 1)
    before = checkpoint.steps(folder)[-1]
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == TERMINATED, said
    waited = time.monotonic() - begun
    print(f"\ngone after {waited:.1f} s")
    assert waited < 30, "what Kubernetes waits for if it is not told otherwise"
    assert "told to end" in said
    assert checkpoint.steps(folder)[-1] > before
    assert not of(process.pid)


def test_a_run_whose_driver_was_killed_goes_on_from_its_last_checkpoint(tmp_path):
    stores.write(str(tmp_path / "store"))
    first = command(tmp_path, *settings(tmp_path))
    folder = str(tmp_path / "checkpoints" / "joint")
    await_checkpoints(folder, first)
    killed(first)
    reached = checkpoint.steps(folder)[-1]
    assert not storage.exists(str(tmp_path / "stages" / "joint" / "stage.json"))

    second = command(tmp_path, *settings(tmp_path, {"checkpoint_seconds": 60}))
    said, _ = second.communicate(timeout=250)
    assert second.returncode == 0, said
    assert "unimodal-rna: was finished before" in said
    assert "joint: goes on from step" in said
    resumed = int(said.partition("joint: goes on from step ")[2].split()[0].replace(",", ""))
    assert resumed >= reached - 1
    joint = json.loads((tmp_path / "stages" / "joint" / "stage.json").read_bytes())
    assert resumed < joint["steps"]
    assert joint["curve"][-1]["step"] == joint["steps"]
    assert checkpoint.committed(str(tmp_path / "stages" / "distil")) is not None
    assert not list(Path(os.environ["TMPDIR"]).glob("cellray-*")), "of the killed driver, or its own"


def test_a_second_driver_is_refused_and_the_first_goes_on(tmp_path):
    stores.write(str(tmp_path / "store"))
    words = [f"run={tmp_path}", "stages=unimodal", "unimodal.epochs=1"]
    with lease.held(str(tmp_path), pytest.fail, stop=threading.Event(), lost=threading.Event()):
        second = command(tmp_path, *words)
        said, _ = second.communicate(timeout=200)
        assert second.returncode == 2, said
        assert said.startswith("error: ")
        assert f"{tmp_path} is being trained by process {os.getpid()} on" in said
    assert not storage.exists(str(tmp_path / "stages"))


def kills(session, draw, number):
    """Kill a training worker of the session at random times, `number` times; how often one was there."""
    done, deadline = 0, time.monotonic() + 60 * number
    while done < number and time.monotonic() < deadline:
        time.sleep(draw.uniform(0.0, 1.0))
        found = [pid for pid, name in of(session).items() if "RayTrainWorker" in name]
        if found:
            os.kill(draw.choice(found), signal.SIGKILL)
            done += 1
            while any("RayTrainWorker" in of(session).get(pid, "") for pid in found):
                time.sleep(0.05)
    return done


def outcome(folder):
    """Hash of the weights and loss curve of every stage."""
    names = ("unimodal-rna", "unimodal-atac", "unimodal-protein", "joint", "distil", "control")
    facts = {name: checkpoint.committed(str(folder / "stages" / name)) for name in names}
    return {name: (found["sha256"], found["curve"]) for name, found in facts.items() if found is not None}


def test_a_worker_that_is_killed_changes_neither_weights_nor_losses(tmp_path):
    changes = {"stages": "unimodal", "unimodal.epochs": "20", "workers": "1", "checkpoint_seconds": "0.1"}
    whole = stores.run(tmp_path / "whole", **changes)
    chain(whole, lambda event: None)
    stores.write(str(tmp_path / "broken" / "store"))
    words = [f"{key}={value}" for key, value in changes.items()]
    process = command(tmp_path, f"run={tmp_path / 'broken'}", *words)
    await_checkpoints(str(tmp_path / "broken" / "checkpoints" / "unimodal-rna"), process, 1)
    assert kills(process.pid, random.Random(0), 1) == 1
    said, _ = process.communicate(timeout=250)
    assert process.returncode == 0, said
    assert "goes on from step" in said
    assert len(outcome(tmp_path / "whole")) == 3
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_workers_that_are_killed_change_neither_weights_nor_losses(tmp_path):
    """30 kills of two workers at random times, five a run: more than Ray Train lets pass by itself."""
    draw, wanted, done = random.Random(0), None, 0
    while done < 30 or wanted is None:
        folder = tmp_path / f"{done}"
        stores.write(str(folder / "store"))
        process = command(folder, *settings(folder, {"unimodal.epochs": 30, "joint.epochs": 60}))
        mine = 0 if wanted is None else kills(process.pid, draw, 5)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
        if wanted is None:
            wanted = outcome(folder)
            assert len(wanted) == 6
            shutil.rmtree(folder)
            continue
        assert outcome(folder) == wanted
        done += mine
    print(f"\n{done} kills, all runs bit for bit the undisturbed one")


def test_a_run_without_a_store_says_what_to_do(tmp_path):
    process = command(tmp_path, f"run={tmp_path}")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.count("\n") == 1
    assert "run `python -m pipelines.ingest`" in said


def test_what_the_workers_cannot_go_on_with_is_said_in_one_line(tmp_path):
    stores.write(str(tmp_path / "store"))
    process = command(tmp_path, f"run={tmp_path}", "workers=3", "feed.cells=2", "stages=unimodal")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 2, said
    assert said.splitlines()[-1].startswith("error: step 0 has 2 cells for 3 workers: raise feed.cells")
    assert "Traceback" not in said
    assert not storage.exists(str(tmp_path / "stages"))


@pytest.mark.slow
def test_a_run_that_waits_for_nodes_says_so_and_ends_when_it_is_told_to(remote, tmp_path):
    environment = remote[1] | {"RAY_ADDRESS": remote[0]}
    stores.write(str(tmp_path / "store"))
    waits = command(tmp_path, f"run={tmp_path}", "workers=9", environment=environment)
    said = waits.stdout.readline()
    assert "take 9 CPUs, and the cluster has 2: training begins when" in said, said
    waits.send_signal(signal.SIGTERM)
    said, _ = waits.communicate(timeout=60)
    assert waits.returncode == TERMINATED, said
    assert "told to end" in said


def reached(folder):
    """How far a run is: its finished stages, and the newest checkpoint of the one under way."""
    stages = sorted((folder / "stages").glob("*/stage.json"))
    steps = [path.name for path in (folder / "checkpoints").glob("*/*")]
    return len(stages), max(steps, default="")


@pytest.mark.slow
def test_a_run_whose_driver_is_killed_ten_times_ends_bit_for_bit_as_an_undisturbed_one(tmp_path):
    draw, found = random.Random(0), []
    for name, kills in (("whole", 0), ("broken", 10)):
        folder = tmp_path / name
        stores.write(str(folder / "store"))
        words = settings(folder, {"unimodal.epochs": 20, "joint.epochs": 60})
        for _ in range(kills):
            before, process = reached(folder), command(folder, *words)
            while reached(folder) <= before:
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.05)
            time.sleep(draw.uniform(0.0, 1.0))
            killed(process)
        process = command(folder, *words)
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said
        found.append(outcome(folder))
    assert len(found[0]) == 6
    assert found[0] == found[1]


@pytest.mark.slow
def test_of_ten_second_drivers_none_gets_in_and_the_first_is_undisturbed(tmp_path):
    stores.write(str(tmp_path / "store"))
    words = [f"run={tmp_path}", "stages=unimodal", "unimodal.epochs=20000", "checkpoint_seconds=1"]
    first = command(tmp_path, *words)
    folder = str(tmp_path / "checkpoints" / "unimodal-rna")
    try:
        await_checkpoints(folder, first, 1)
        before = checkpoint.steps(folder)[-1]
        for _ in range(10):
            second = command(tmp_path, *words)
            said, _ = second.communicate(timeout=250)
            assert second.returncode == 2, said
            assert f"is being trained by process {first.pid} on" in said
        assert first.poll() is None
        await_checkpoints(folder, first, 1)
        assert checkpoint.steps(folder)[-1] > before
    finally:
        first.send_signal(signal.SIGTERM)
        said, _ = first.communicate(timeout=120)
    assert first.returncode == TERMINATED, said
    assert "goes on from step" not in said
