"""Two workers equal one: real processes that talk over gloo on the loopback interface."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests import stores
from tests.conftest import ROOT

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from cellray.train import workers
from cellray.train.feed import Feed, Plan
from cellray.train.fit import adamw, plan_of, step
from cellray.train.recipe import Optim
from tests import stores
from tests.test_stages import stage

folder, name, world, rank, file = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{file}.rendezvous", world_size=world, rank=rank)
run = stores.run(folder)
work, root = stage(run, name)
parameters, optimizer = adamw(work.trained(), Optim(lr=1e-3))
plan = plan_of(run.store, run.recipe, ~run.test, work.needs(), work.reads(), 1.0)
losses = []
with Feed(run.store, plan, first=0, rank=rank, world=world) as feed:
    for share in feed:
        losses.append(step(work, share, parameters, optimizer, 1.0)["loss"])
        if share.step == 4:
            break
if rank == 0:
    state = {k: v.contiguous() for k, v in root.state_dict().items()}
    save_file(state | {"losses": torch.tensor(losses)}, file)
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
"""


def trained(folder, name, world):
    file = folder / f"{name}-{world}.safetensors"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder), name, str(world), str(rank), str(file)],
            env={**environment, "PYTHONPATH": path},
            cwd=ROOT,
        )
        for rank in range(world)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return load_file(file)


@pytest.mark.parametrize("name", ["joint", "distil"])
def test_two_workers_equal_one(tmp_path, name):
    _ = stores.run(tmp_path).test  # writes the split, so that no two workers do it at once
    one, two = trained(tmp_path, name, 1), trained(tmp_path, name, 2)
    torch.testing.assert_close(two["losses"], one["losses"], atol=1e-5, rtol=1e-5)
    for key, value in one.items():
        # Adam divides by the root of a mean square, so a rounding difference in a vanishing
        # gradient can turn its first steps: those of weight 1e-3 * 5 at the most, and rare.
        far = (two[key].float() - value.float()).abs() > 1e-5 + 1e-5 * value.float().abs()
        assert far.float().mean() < 2e-3, (key, float(far.float().mean()))
