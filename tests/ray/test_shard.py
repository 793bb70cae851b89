import pytest
import torch
from safetensors.torch import load_file

from cellray.train import checkpoint
from cellray.train.chain import chain
from tests import stores
from tests.ray.test_pretrain import command

pytestmark = pytest.mark.usefixtures("short")

NAMES = ("unimodal-rna", "joint", "distil", "control")


@pytest.mark.slow
def test_a_run_that_shares_parameters_out_comes_to_what_one_worker_does(tmp_path):
    """Through Ray Train, which starts two workers and connects them."""
    changes = {"unimodal.epochs": 0.5, "distil.epochs": 1.0}
    chain(stores.run(tmp_path / "alone", **changes), lambda event: None)
    run = stores.run(tmp_path / "shared", **changes)
    words = [f"{key}={value}" for key, value in changes.items()]
    process = command(tmp_path, f"run={tmp_path / 'shared'}", "workers=2", "shard=true", *words)
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said
    for name in NAMES:
        facts = checkpoint.committed(run.path("stages", name))
        assert facts is not None
        assert facts["workers"] == 2
        alone, shared = (
            load_file(tmp_path / how / "stages" / name / "model.safetensors") for how in ("alone", "shared")
        )
        for key, value in alone.items():
            near = torch.isclose(shared[key].float(), value.float(), atol=1e-3, rtol=1e-3)
            assert near.float().mean() > 0.99, (name, key)
