"""The published network, to compare with: a transformer for which all genes are tokens, zeros included.

Widths are those that architecture.md's 307 GFLOP a cell follow from: 6 layers, 200 wide, 10 heads of
64, attention by 266 random features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values [cells, heads, tokens, size] -> what attention makes of the values, as large."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a transformer over all genes."""

    genes: int = 16_906
    width: int = 200
    layers: int = 6
    heads: int = 10
    classes: int = 7
    """Of values: what a token is beside its gene, and what is predicted of it."""


class Favor(nn.Module):
    """Softmax attention estimated by positive random features, at a cost linear in the tokens.

    Source: Choromanski 2021, doi:10.48550/arXiv.2009.14794.
    """

    projection: Tensor

    def __init__(self, size: int = 64, features: int = 266) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("projection", torch.randn(features, size) * size**-0.25)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self._features(q, (-1,)), self._features(k, (-2, -1))
        scale = q @ k.sum(dim=-2).unsqueeze(-1)
        return (q @ (k.transpose(-2, -1) @ v)) / scale

    def _features(self, x: Tensor, over: tuple[int, ...]) -> Tensor:
        """exp(x · w - |x|² / 2) of each random w, over the largest along `over`: that cancels."""
        dots = x @ self.projection.T
        norm = x.square().sum(dim=-1, keepdim=True) * (0.5 * self.size**-0.5)
        return torch.exp(dots - (norm + dots.detach().amax(dim=over, keepdim=True)))


class Linear(nn.Module):
    """Attention whose similarity is a product of elu + 1: the cheapest there is.

    Source: Katharopoulos 2020, doi:10.48550/arXiv.2006.16236.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(dim=-2).unsqueeze(-1))


class Block(nn.Module):
    """Pre-norm transformer layer with any attention, whose heads may be wider in sum than the layer."""

    def __init__(self, width: int, heads: int, size: int, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * size, bias=False)
        self.mix = nn.Linear(heads * size, width)
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[cells, tokens, width] of the same."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, dim=-1)
        )
        x = x + self.mix(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.body(x)


class AllGenes(nn.Module):
    """Logits of the value classes of every gene, from the value classes of all."""

    def __init__(self, shape: Shape, size: int, attend: Callable[[], Attend]) -> None:
        """`size` of a head; `attend` makes the attention of a layer."""
        super().__init__()
        width = shape.width
        self.gene = nn.Parameter(torch.randn(shape.genes, width) * 0.05)
        self.value = nn.Embedding(shape.classes, width)
        self.layers = nn.Sequential(
            *(Block(width, shape.heads, size, attend()) for _ in range(shape.layers)), nn.LayerNorm(width)
        )
        self.head = nn.Linear(width, shape.classes)

    def forward(self, classes: Tensor) -> Tensor:
        """[cells, genes, classes] from int64 [cells, genes]."""
        logits: Tensor = self.head(self.layers(self.gene + self.value(classes)))
        return logits


def published(shape: Shape) -> AllGenes:
    """As published: attention by random features, in heads of 64."""
    return AllGenes(shape, 64, Favor)


def cheapest(shape: Shape) -> AllGenes:
    """The least that a transformer of this width and depth costs if every gene is a token."""
    return AllGenes(shape, shape.width // shape.heads, Linear)
