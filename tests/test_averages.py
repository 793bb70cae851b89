import copy

import pytest
import torch

from cellray.data import storage
from cellray.train import checkpoint
from cellray.train.averages import Averages
from tests import pair_worker, stores


def module(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model, optimizer):
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_the_mean_is_that_of_a_plain_loop(decay):
    model, optimizer = module()
    averages = Averages(dict(model.named_parameters()), decay)
    plain = {name: p.detach().double() for name, p in model.named_parameters()}
    for number in range(1, 31):
        step(model, optimizer)
        averages.update()
        held = min(decay, (1 + number) / (10 + number))
        for name, p in model.named_parameters():
            plain[name] = held * plain[name] + (1 - held) * p.detach().double()
    last = copy.deepcopy(model.state_dict())
    averages.put()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), plain[name], atol=1e-6, rtol=1e-6)
        assert not torch.equal(p, last[name])


def test_without_a_decay_nothing_is_held_and_nothing_changes():
    model, optimizer = module()
    averages = Averages(dict(model.named_parameters()), 0.0)
    step(model, optimizer)
    averages.update()
    before = copy.deepcopy(model.state_dict())
    averages.put()
    assert not averages.means
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_holds_weights_and_means_and_both_come_back_bit_for_bit(tmp_path):
    model, optimizer = module()
    averages = Averages(dict(model.named_parameters()), 0.9)
    for _ in range(3):
        step(model, optimizer)
        averages.update()
    checkpoint.write(str(tmp_path), 3, checkpoint.snapshot(model, optimizer, averages), {"key": "k"})
    found = checkpoint.newest(str(tmp_path), "k", pytest.fail)
    assert found is not None
    other, its = module(1)
    means = Averages(dict(other.named_parameters()), 0.9)
    checkpoint.restore(found[0], other, its, means)
    for name, p in model.named_parameters():
        assert torch.equal(other.get_parameter(name), p)
        assert torch.equal(means.means[name], averages.means[name])
        assert not torch.equal(means.means[name], p)


def test_a_stage_comes_to_its_mean_and_a_killed_one_to_the_same(tmp_path):
    for name in ("whole", "broken", "last"):
        stores.run(tmp_path / name)
    more = {"optim.ema": 0.8}
    whole, _ = pair_worker.trained(tmp_path / "whole", **more)
    pair_worker.trained(tmp_path / "broken", at=pair_worker.AT, **more)
    broken, events = pair_worker.trained(tmp_path / "broken", **more)
    assert any("resumed" in event for event in events)
    last, _ = pair_worker.trained(tmp_path / "last")
    files = [
        storage.join(str(tmp_path), name, "stages/joint/model.safetensors") for name in ("whole", "broken")
    ]
    assert storage.read_bytes(files[0]) == storage.read_bytes(files[1])
    trained = whole.fusion.state_dict()
    assert all(torch.equal(value, broken.fusion.state_dict()[name]) for name, value in trained.items())
    assert not any(torch.equal(value, last.fusion.state_dict()[name]) for name, value in trained.items())
