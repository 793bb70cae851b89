"""Counts from a cell vector, asked for by feature id, and how likely the true counts are under them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellray.data.tokens import POOLED, Vocabulary


class Decoder(nn.Module):
    """Log rates (negative binomial) or logits (Bernoulli) of any features of one modality.

    A feature is a vector and a bias; a cell vector passes a small MLP and meets them in a dot
    product, so the cost is that of the features asked for. Depth is an offset: at training the
    cell's own, at prediction the one that the cell vector suggests.
    """

    reference: Tensor

    def __init__(self, features: int, width: int, likelihood: str) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.enter = nn.Linear(width, width)
        self.leave = nn.Linear(width, width)
        self.feature = nn.Embedding(features, width)
        self.bias = nn.Parameter(torch.zeros(features))
        if likelihood == "negative_binomial":
            self.dispersion = nn.Parameter(torch.ones(features))
        self.slope = nn.Parameter(torch.ones(()))
        self.depth = nn.Linear(width, 1)
        self.register_buffer("reference", torch.zeros(()))
        nn.init.normal_(self.feature.weight, std=0.1)
        nn.init.zeros_(self.depth.weight)
        for layer in (self.enter, self.leave, self.depth):
            nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def start(self, vocabulary: Vocabulary) -> None:
        """Begin at the mean profile of the frozen statistics, so that training learns departures from it."""
        cells = max(1, vocabulary.cells[POOLED])
        sums = torch.from_numpy(vocabulary.sums[POOLED]).double()
        self.reference.fill_(vocabulary.log_depth)
        if self.likelihood == "bernoulli":
            share = torch.from_numpy(vocabulary.nonzero[POOLED]).double() / cells
            self.bias.copy_(torch.logit(share.clamp(1e-5, 1 - 1e-5)))
        else:
            self.bias.copy_(torch.log((sums / cells).clamp_min(1e-5)))

    @torch.no_grad()
    def inherit(self, other: "Decoder", mean: np.ndarray, spread: float) -> None:
        """Take over what `other` learnt, for cell vectors that are (its vector - mean) / spread."""
        self.load_state_dict(other.state_dict())
        for linear in (self.enter, self.depth):
            linear.bias.add_(linear.weight @ torch.from_numpy(mean).to(linear.weight))
            linear.weight.mul_(spread)

    def forward(self, cell: Tensor, ids: Tensor | None = None, log_depth: Tensor | None = None) -> Tensor:
        """Log rates or logits [cells, features asked for]; all features where `ids` is None.

        `log_depth` [cells] is log(1 + total) where it is known; without it the predicted depth is used.
        """
        feature: Tensor = self.feature.weight
        bias: Tensor = self.bias
        if ids is not None:
            # Not bias[ids]: its gradient allows for ids that come twice, and takes longer for it.
            feature, bias = self.feature(ids), bias.index_select(0, ids)
        if log_depth is None:
            log_depth = self.log_depth(cell)
        offset = self.slope * (log_depth - self.reference)
        return F.linear(self.direction(cell), feature, bias) + offset[:, None]

    def direction(self, cell: Tensor) -> Tensor:
        """What the vectors of features are multiplied with, [cells, width]."""
        found: Tensor = self.leave(F.gelu(self.enter(cell)))
        return found

    def log_depth(self, cell: Tensor) -> Tensor:
        """Predicted log(1 + total) of each cell, [cells]."""
        return self.reference + self.depth(cell).squeeze(1)

    def negative_log_likelihood(
        self,
        cell: Tensor,
        counts: Tensor,
        log_depth: Tensor,
        ids: Tensor | None = None,
        *,
        prior: float = 0.0,
    ) -> Tensor:
        """Sum over cells and asked features, plus the squared error of the predicted depth. Scalar.

        `counts` [cells, asked features] are raw. With `prior` so many times the squared departures from
        the mean profile come to it.
        The depth head learns from a detached vector, so depth does not shape the embedding
        beyond what the counts themselves say.
        """
        # Not self(…): while this runs parameters that are shared out are gathered, after that no more.
        predicted = self.forward(cell, ids, log_depth).float()
        if self.likelihood == "bernoulli":
            fit = F.binary_cross_entropy_with_logits(predicted, (counts > 0).float(), reduction="sum")
        else:
            dispersion = self.dispersion if ids is None else self.dispersion.index_select(0, ids)
            shape = F.softplus(dispersion) + 1e-4
            fit = _negative_binomial(counts, predicted.clamp(max=15.0), shape)
        if prior:
            bias = self.bias if ids is None else self.bias.index_select(0, ids)
            mean = bias + (self.slope * (log_depth - self.reference))[:, None]
            fit = fit + prior * (predicted - mean).square().sum()
        return fit + (self.log_depth(cell.detach()) - log_depth).square().sum()


def _negative_binomial(counts: Tensor, log_rate: Tensor, shape: Tensor) -> Tensor:
    """Sum of -log NB(counts; mean exp(log_rate), inverse dispersion `shape` [asked features]).

    Of a count of zero the three gammas cancel, so they are computed of the others, few as they are.
    """
    log_total = torch.logaddexp(log_rate, shape.log())
    fit = (shape * (log_total - shape.log()) + counts * (log_total - log_rate)).sum()
    cell, feature = counts.nonzero(as_tuple=True)
    seen, own = counts[cell, feature], shape.index_select(0, feature)
    return fit + (torch.lgamma(own) + torch.lgamma(seen + 1) - torch.lgamma(seen + own)).sum()
