"""Two workers equal one: real processes that talk over gloo on the loopback interface.

Both ways of distribution: parameters whole on every worker, and shared out among them (FSDP2).
"""

import functools
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from cellray.train import checkpoint
from tests import pair_worker, stores
from tests.conftest import ROOT
from tests.pair_worker import STAGES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two workers came to, all they are asked for: see tests/pair_worker.py."""
    folder = tmp_path_factory.mktemp("pair")
    for name in ("", "undisturbed", "left", "taken", "alone", "by-rows"):
        _ = stores.run(folder / name).test  # writes the split, so that no two workers do it at once
    pair_worker.trained(folder / "taken", at=pair_worker.AT, **{"optim.ema": 0.9})
    pair_worker.trained(folder / "by-rows", at=pair_worker.AT, **pair_worker.FEW)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    command = [sys.executable, "-m", "tests.pair_worker", str(folder)]
    processes = [subprocess.Popen([*command, str(rank), "2"], env=environment, cwd=ROOT) for rank in range(2)]
    try:
        assert [process.wait(timeout=270) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder


@functools.cache
def alone(folder, name):
    """What one worker comes to, in this process."""
    return pair_worker.lacking(folder) if name == "lacking" else pair_worker.five(folder, name)


def like(one, two):
    """Weights are the same up to rounding."""
    for key, value in one.items():
        # Adam divides by the root of a mean square, so a rounding difference in a vanishing
        # gradient can turn its first steps: those of weight 1e-3 * 5 at the most, and rare.
        far = (two[key].float() - value.float()).abs() > 1e-5 + 1e-5 * value.float().abs()
        assert far.float().mean() < 2e-3, (key, float(far.float().mean()))


@pytest.mark.parametrize("how", ["whole", "shared"])
@pytest.mark.parametrize("name", STAGES)
def test_two_workers_equal_one(folder, name, how):
    one, two = alone(folder, name), load_file(folder / f"{name}-{how}.safetensors")
    assert len(one["said"]) == 5
    torch.testing.assert_close(two["said"], one["said"], atol=1e-5, rtol=1e-5)
    like(one, two)


@pytest.mark.parametrize("how", ["whole", "shared", "rowwise"])
def test_a_modality_that_a_worker_has_no_cell_of_makes_no_difference(folder, how):
    one, two = alone(folder, "lacking"), load_file(folder / f"lacking-{how}.safetensors")
    torch.testing.assert_close(two["said"], one["said"], atol=1e-5, rtol=1e-5)
    like(one, two)


def test_gradients_are_summed_by_rows_where_few_rows_have_any(folder):
    found = load_file(folder / "summed.safetensors")
    assert int(found.pop("by rows")) == 1
    every = [pair_worker.gradients(rank) for rank in range(2)]
    assert all(torch.equal(found[str(i)], a + b) for i, (a, b) in enumerate(zip(*every, strict=True)))


@pytest.mark.parametrize("name", STAGES)
def test_gradients_exchanged_by_rows_are_those_exchanged_whole(folder, name):
    whole, rows = (load_file(folder / f"{name}-{how}.safetensors") for how in ("whole", "rows"))
    assert all(torch.equal(value, rows[key]) for key, value in whole.items())


@pytest.mark.parametrize("name", STAGES)
def test_tables_updated_by_rows_are_those_updated_whole_by_one_worker_and_by_two(folder, name):
    whole = pair_worker.five(folder, name, **pair_worker.FEW)
    one = pair_worker.five(folder, name, rowwise=True, **pair_worker.FEW)
    two = load_file(folder / f"{name}-rowwise.safetensors")
    for found in (one, two):
        torch.testing.assert_close(found["said"], whole["said"], atol=1e-5, rtol=1e-5)
        like(whole, found)


def test_workers_hold_the_same_weights_after_a_step_that_was_not_taken(folder):
    two = load_file(folder / "skipping.safetensors")
    assert all(torch.equal(first, second) for first, second in two.values())
    like(pair_worker.skipping(folder), {name: pair[0] for name, pair in two.items()})


def test_a_killed_run_that_shares_parameters_out_ends_as_if_it_had_not_been_killed(folder):
    whole, broken = (load_file(folder / f"{name}.safetensors") for name in ("undisturbed", "killed"))
    assert 1 <= int(broken.pop("resumed")) <= pair_worker.AT
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())
    committed = load_file(folder / "undisturbed" / "stages" / "joint" / "model.safetensors")
    assert all(torch.equal(value, committed[name]) for name, value in whole.items())


def test_one_worker_goes_on_from_what_two_wrote_and_two_from_what_one_wrote(folder):
    whole, taken = (load_file(folder / f"{name}.safetensors") for name in ("undisturbed", "taken"))
    files = [path.name for path in (folder / "left").glob("checkpoints/joint/*/*")]
    assert sum(name.startswith("part-") for name in files) == 2 * files.count(checkpoint.MANIFEST) > 0
    assert int(taken.pop("resumed")) >= 1
    root, events = pair_worker.trained(folder / "left", **{"optim.ema": 0.9})
    assert any("resumed" in event for event in events)
    one, _ = pair_worker.trained(folder / "alone", **{"optim.ema": 0.9})
    for found in (root.state_dict(), one.state_dict(), taken):
        like(whole, found)
    assert checkpoint.steps(str(folder / "left" / "checkpoints" / "joint")) == []


def test_two_workers_that_share_decoders_out_go_on_from_what_one_left_that_updates_them_by_rows(folder):
    found = load_file(folder / "by-rows.safetensors")
    assert int(found.pop("resumed")) >= 1
    like(pair_worker.trained(folder / "alone-by-rows", **pair_worker.FEW)[0].state_dict(), found)
