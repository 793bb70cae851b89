import json
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data import storage
from cellray.train import checkpoint, parts
from cellray.train.parts import Part, joined

KEY = "k"


def split(tensors, shared, world):
    """What each of `world` workers writes of `tensors`, of which those named `shared` are shared out."""
    found: list[dict] = [{} for _ in range(world)]
    for name, tensor in tensors.items():
        found[0][name] = tensor
        if name in shared:
            rows = -(-len(tensor) // world)
            for rank, part in enumerate(found):
                part[name] = tensor[rank * rows : (rank + 1) * rows].clone()
    return found


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=5), st.integers(1, 5))
def test_what_was_split_is_joined_again(sizes, world):
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(rows, 3) for i, (rows, _) in enumerate(sizes)}
    tensors["step"] = torch.tensor(3.0)
    shared = {f"t{i}" for i, (_, whether) in enumerate(sizes) if whether}
    again = joined(split(tensors, shared, world))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_parts_that_do_not_belong_together_are_refused():
    tensors = {"a": torch.ones(4), "b": torch.ones(2)}
    first, second, third = split(tensors, {"a", "b"}, 3)
    for odd in ([first, {"a": second["a"]}, third], [{"a": first["a"]}, second, third]):
        with pytest.raises(ValueError, match="do not belong together"):
            joined(odd)


def write(folder, step, world=3, attempt="aa"):
    """A checkpoint of three workers, the first of which begins first. What is in it."""
    torch.manual_seed(step)
    tensors = {"model.w": torch.randn(7, 2), "optimizer.w.step": torch.tensor(float(step))}
    threads = []
    for rank, part in enumerate(split(tensors, {"model.w"}, world)):
        args = (str(folder), step, part, {"key": KEY})
        more = {"part": Part(attempt, rank, world)}
        threads.append(threading.Thread(target=checkpoint.write, args=args, kwargs=more))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return tensors


def newest(folder):
    """Tensors and step of the newest whole one, and what was told of others."""
    told: list[str] = []
    found = checkpoint.newest(str(folder), KEY, told.append)
    return (None, None, told) if found is None else (found[0], found[1]["step"], told)


def test_the_parts_of_three_workers_are_one_checkpoint(tmp_path):
    tensors = write(tmp_path, 3)
    found, step, told = newest(tmp_path)
    assert (step, told) == (3, [])
    assert found is not None
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    here = tmp_path / "00000003"
    manifest = json.loads((here / checkpoint.MANIFEST).read_text())
    assert {file.name for file in here.iterdir()} == {checkpoint.MANIFEST, *manifest["files"]}
    for name, digest in manifest["files"].items():
        assert storage.sha256((here / name).read_bytes()) == digest


@pytest.mark.parametrize("harm", ["drop", "cut", "flip", "other attempt", "exchange"])
@pytest.mark.parametrize("rank", range(3))
def test_a_checkpoint_that_lacks_a_worker_is_passed_over_and_told_of(tmp_path, rank, harm):
    write(tmp_path, 3)
    write(tmp_path, 6)
    here = tmp_path / "00000006"
    names = sorted(path.name for path in here.glob("part-*"))
    file = here / names[rank]
    data = file.read_bytes()
    file.unlink()
    if harm == "cut":
        file.write_bytes(data[:-1])
    elif harm == "flip":
        file.write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])
    elif harm == "other attempt":
        file.with_name(names[rank].replace("part-aa", "part-bb")).write_bytes(data)
    elif harm == "exchange":
        file.write_bytes((here / names[(rank + 1) % 3]).read_bytes())
    _, step, told = newest(tmp_path)
    assert step == 3
    assert len(told) == 1
    assert "00000006" in told[0]
    assert told[0].endswith("passed over")


def test_a_worker_that_never_writes_costs_the_checkpoint_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "WAIT", 0.05)
    write(tmp_path, 3)
    # An older attempt left what the second worker wrote at this step: it is not taken for that of this one.
    checkpoint.write(str(tmp_path), 6, {}, {"key": KEY}, part=Part("old", 1, 2))
    with checkpoint.Saver(str(tmp_path), 2, Part("new", 0, 2)) as saver:
        model = torch.nn.Linear(2, 2)
        saver.save(6, model, torch.optim.AdamW(model.parameters()), {"key": KEY})
    (event,) = saver.events()
    assert "checkpoint of step 6 could not be written" in event["warning"]
    assert "lacks the parts of the workers [1]" in event["warning"]
    _, step, told = newest(tmp_path)
    assert step == 3
    assert "is not whole" in told[0]


def test_what_was_begun_goes_with_the_next(tmp_path):
    write(tmp_path, 3)
    checkpoint.write(str(tmp_path), 4, {}, {"key": KEY}, part=Part("old", 1, 2))
    write(tmp_path, 6, world=2, attempt="cc")
    assert checkpoint.steps(str(tmp_path)) == [3, 6]
