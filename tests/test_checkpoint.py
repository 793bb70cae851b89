import json
import random
import shutil
import threading

import pytest
import torch

from cellray.data import faults, storage
from cellray.train import checkpoint
from tests import proxy

KEY = "k"


def module(seed=0, steps=3):
    """A small model after some steps, and its optimiser."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(steps):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    return model, optimizer


def numbers(tensors):
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def two(folder):
    """Checkpoints of steps 3 and 6, with other weights; what is in each."""
    found = {}
    for step in (3, 6):
        model, optimizer = module(step, step)
        checkpoint.save(str(folder), step, model, optimizer, {"key": KEY, "meter": {"seconds": step / 7}})
        found[step] = numbers(checkpoint.snapshot(model, optimizer))
    return found


def check(folder, saved):
    """Load; what comes is wholly of one of the checkpoints. Its step, and what was reported."""
    told: list[str] = []
    found = checkpoint.newest(str(folder), KEY, told.append)
    if found is None:
        return None, told
    tensors, manifest = found
    assert numbers(tensors) == saved[manifest["step"]]
    assert manifest["meter"] == {"seconds": manifest["step"] / 7}
    return manifest["step"], told


def flips(folder, saved, trials):
    """Flip a bit of a random byte of a file of the newest, `trials` times; how often it was still used."""
    draw = random.Random(0)
    files = sorted((folder / "00000006").iterdir())
    used = 0
    for number in range(trials):
        file = files[number % len(files)]
        before = file.read_bytes()
        at = draw.randrange(len(before))
        after = bytes([before[at] ^ (1 << draw.randrange(8))])
        file.write_bytes(before[:at] + after + before[at + 1 :])
        step, told = check(folder, saved)
        file.write_bytes(before)
        # A space may become another sign that JSON does not care for: then nothing was changed.
        assert step in (3, 6)
        assert len(told) == (step == 3)
        used += step == 6
    return used


def test_no_flipped_byte_is_loaded(tmp_path):
    assert flips(tmp_path, two(tmp_path), 200) <= 4


@pytest.mark.slow
def test_none_of_ten_thousand_flipped_bytes_is_loaded(tmp_path):
    assert flips(tmp_path, two(tmp_path), 10_000) <= 200


@pytest.mark.parametrize("how", ["drop", "empty", "half", "folder"])
def test_a_checkpoint_that_lacks_anything_is_passed_over_and_told_of(tmp_path, how):
    saved = two(tmp_path)
    for name in (checkpoint.STATE, checkpoint.MANIFEST):
        shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-{name}")
        folder = tmp_path.parent / f"{tmp_path.name}-{name}"
        file = folder / "00000006" / name
        if how == "drop":
            file.unlink()
        elif how == "folder":
            file.unlink()
            shutil.copy(folder / "00000003" / name, file)
        else:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 if how == "half" else 0])
        step, told = check(folder, saved)
        assert step == 3
        assert len(told) == 1
        assert "00000006" in told[0]
        assert told[0].endswith(": passed over")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"<html>", "unreadable manifest"),
        (b"\xff\xfe\x00", "unreadable manifest"),
        (b"[" * 100_000, "unreadable manifest"),
        (b"[1]", "things are missing"),
        (b"{}", "things are missing"),
        (b'{"step": 6, "key": "k", "files": {}}', "things are missing"),
        (b'{"step": 6, "key": "k", "files": {}, "sha256": "00"}', "was changed"),
    ],
)
def test_a_manifest_that_is_none_is_passed_over_and_told_of(tmp_path, text, says):
    saved = two(tmp_path)
    (tmp_path / "00000006" / checkpoint.MANIFEST).write_bytes(text)
    step, told = check(tmp_path, saved)
    assert step == 3
    assert says in told[0]


def test_a_checkpoint_of_other_work_is_passed_over_and_told_of(tmp_path):
    saved = two(tmp_path)
    model, optimizer = module(9, 9)
    checkpoint.save(str(tmp_path), 9, model, optimizer, {"key": "other"})
    step, told = check(tmp_path, saved)
    assert step == 6
    assert "00000009 belongs to other settings" in told[0]


def test_nothing_whole_is_nothing(tmp_path):
    saved = two(tmp_path)
    for step in (3, 6):
        (tmp_path / f"{step:08d}" / checkpoint.STATE).unlink()
    step, told = check(tmp_path, saved)
    assert step is None
    assert len(told) == 2
    assert checkpoint.newest(str(tmp_path / "nowhere"), KEY, pytest.fail) is None


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_whole_ones_stay_as_asked_whatever_else_is_there(tmp_path, keep):
    model, optimizer = module()
    for step in (1, 2, 3):
        checkpoint.save(str(tmp_path), step, model, optimizer, {"key": KEY}, keep=keep)
    # Two that were begun and not written to the end, and one from which the stage did not go on.
    for step in (4, 5):
        storage.write_bytes(str(tmp_path / f"{step:08d}" / checkpoint.STATE), b"begun")
    shutil.copytree(tmp_path / "00000003", tmp_path / "00000009")
    checkpoint.save(str(tmp_path), 6, model, optimizer, {"key": KEY}, keep=keep)
    assert checkpoint.steps(str(tmp_path)) == [2, 3, 6][-keep:]


def test_a_snapshot_does_not_change_with_the_model(tmp_path):
    model, optimizer = module()
    held = checkpoint.snapshot(model, optimizer)
    before = numbers(held)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert numbers(held) == before
    after = numbers(checkpoint.snapshot(model, optimizer))
    assert all(after[name] != before[name] for name in before)


def test_what_is_written_in_the_background_is_what_was_when_it_was_asked_for(tmp_path, monkeypatch):
    model, optimizer = module()
    before = numbers(checkpoint.snapshot(model, optimizer))
    rows = [1]
    about = {"key": KEY, "meter": {"rows": rows}}
    gate, write = threading.Event(), checkpoint.write

    def slow(*args, **more):
        assert gate.wait(60)
        write(*args, **more)

    monkeypatch.setattr(checkpoint, "write", slow)
    with checkpoint.Saver(str(tmp_path), 2) as saver:
        saver.save(3, model, optimizer, about)
        with torch.no_grad():
            model.weight.zero_()
        rows.append(2)
        assert saver.events() == []
        gate.set()
    assert saver.events() == [{"saved": 3}]
    found = checkpoint.newest(str(tmp_path), KEY, pytest.fail)
    assert found is not None
    tensors, manifest = found
    assert numbers(tensors) == before
    assert manifest["meter"] == {"rows": [1]}


def test_a_store_that_fails_is_told_of_and_tried_again(tmp_path):
    model, optimizer = module()
    folder = tmp_path / "checkpoints"
    folder.write_text("a file where a folder should be")
    with checkpoint.Saver(str(folder), 2) as saver:
        saver.save(1, model, optimizer, {"key": KEY})
        saver.save(2, model, optimizer, {"key": KEY})
        saver._join(None)
        for step, event in enumerate(saver.events(), start=1):
            assert f"checkpoint of step {step} could not be written" in event["warning"]
        folder.unlink()
        saver.save(3, model, optimizer, {"key": KEY})
    assert saver.events() == [{"saved": 3}]
    assert checkpoint.steps(str(folder)) == [3]


def test_a_bucket_that_is_down_for_a_while_costs_a_checkpoint_and_no_more(monkeypatch):
    monkeypatch.setattr(faults, "DEADLINE", 0.3)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    model, optimizer = module()
    with (
        proxy.object_store() as upstream,
        proxy.proxy(upstream) as server,
        proxy.pointed(server.server_port, read_timeout=0.5),
    ):
        storage.locate("s3://runs")[0].mkdir("runs")
        with checkpoint.Saver("s3://runs/joint", 2) as saver:
            saver.save(1, model, optimizer, {"key": KEY})
            saver._join(None)
            server.plan = proxy.Plan(1.0, {"error": 1})
            saver.save(2, model, optimizer, {"key": KEY})
            saver._join(None)
            server.plan = None
            saver.save(3, model, optimizer, {"key": KEY})
        told = saver.events()
        assert [next(iter(event)) for event in told] == ["saved", "warning", "saved"]
        assert "checkpoint of step 2 could not be written" in told[1]["warning"]
        assert checkpoint.steps("s3://runs/joint") == [1, 3]
        found = checkpoint.newest("s3://runs/joint", KEY, pytest.fail)
        assert found is not None
        server.plan = proxy.Plan(1.0, {"error": 1})
        with pytest.raises(OSError, match="could not be reached"):
            checkpoint.newest("s3://runs/joint", KEY, pytest.fail)


def test_a_write_that_hangs_holds_training_up_once(tmp_path, monkeypatch):
    gate, write, steps = threading.Event(), checkpoint.write, []

    def hanging(folder, step, *args, **more):
        steps.append(step)
        assert gate.wait(60)
        write(folder, step, *args, **more)

    monkeypatch.setattr(checkpoint, "write", hanging)
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.05)
    monkeypatch.setattr(checkpoint, "GRACE", 0.1)
    model, optimizer = module()
    with checkpoint.Saver(str(tmp_path), 2) as saver:
        for step in (1, 2, 3):
            saver.save(step, model, optimizer, {"key": KEY})
        assert [event["warning"] for event in saver.events()] == [
            "checkpoint of step 1 is still being written; training goes on"
        ]
        saver.last(4, model, optimizer, {"key": KEY})
        assert "step 4 could not be written in time" in saver.events()[0]["warning"]
        gate.set()
        saver._join(None)
        saver.last(5, model, optimizer, {"key": KEY})
    assert steps == [1, 5]
    assert saver.events() == [{"saved": 1}, {"saved": 5}]


def test_the_manifest_is_written_last_and_names_every_file(tmp_path):
    two(tmp_path)
    here = tmp_path / "00000006"
    manifest = json.loads((here / checkpoint.MANIFEST).read_text())
    assert manifest["files"] == {checkpoint.STATE: storage.sha256((here / checkpoint.STATE).read_bytes())}
    assert {file.name for file in here.iterdir()} == {checkpoint.MANIFEST, *manifest["files"]}
