"""Networks whose layers add at full strength, as trained ones do: new ones are near the identity."""

from typing import TypeVar

import torch
from torch import nn

from cellray.model.encoder import START, Layer

T = TypeVar("T", bound=nn.Module)


def attentive(network: T) -> T:
    """`network`, changed in place, with what its layers add to their input as large as torch begins it."""
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, Layer):
                for linear in (layer.mix, layer.body[-1]):
                    assert isinstance(linear, nn.Linear)
                    linear.weight.div_(START)
    return network
