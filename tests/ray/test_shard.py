import pytest
import torch
from safetensors.torch import load_file

from cellray.train import checkpoint
from cellray.train.loop import train
from tests import stores


@pytest.mark.slow
def test_a_run_that_shares_parameters_out_comes_to_what_one_worker_does(tmp_path, ray_session):
    """Through Ray Train, which starts two workers and connects them."""
    found, names = {}, ("unimodal-rna", "joint", "distil", "control")
    for how, changes in {"alone": {"workers": 1}, "shared": {"workers": 2, "shard": True}}.items():
        run = stores.run(tmp_path / how, **changes, **{"distil.epochs": 1.0})
        events: list[dict] = []
        train(run.recipe, events.append)
        assert not [event for event in events if "warning" in event]
        facts = {name: checkpoint.committed(run.path("stages", name)) for name in names}
        assert all(fact is not None and fact["workers"] == changes["workers"] for fact in facts.values())
        found[how] = {
            name: load_file(tmp_path / how / "stages" / name / "model.safetensors") for name in names
        }
    for name in names:
        for key, value in found["alone"][name].items():
            near = torch.isclose(found["shared"][name][key].float(), value.float(), atol=1e-3, rtol=1e-3)
            assert near.float().mean() > 0.99, (name, key)
