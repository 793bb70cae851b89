"""Weights averaged over the steps of a stage: what it comes to, in the place of the last weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cellray.train.sharding import own


class Averages:
    """An exponential moving average of some parameters; of those shared out, of this worker's rows.

    After step t the mean moves by 1 - min(decay, (1 + t) / (10 + t)) of its distance to the weights. So
    what training began from has no part in it after the first few dozen steps, however slow the decay.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """Begins at what the parameters are. With decay 0 it holds nothing, and changes nothing."""
        self.decay, self.steps = decay, 0
        self._parameters = dict(parameters) if decay else {}
        self.means: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after a step."""
        self.steps += 1
        move = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, p in self._parameters.items():
            own(self.means[name]).lerp_(own(p), move)

    @torch.no_grad()
    def put(self) -> None:
        """Make the weights what the means are."""
        for name, p in self._parameters.items():
            own(p).copy_(own(self.means[name]))
