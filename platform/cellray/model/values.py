"""How an encoder reads the value of a token: the scaled count, its bin within the cell, or its rank.

Each says two things of every token: the code that becomes a vector, and the weight of its feature in
the sum over the cell, about 1 on average. Neither depends on what a hidden token holds.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellray.model.attention import steady

if TYPE_CHECKING:
    from cellray.model.encoder import Tokens

BINS = 51
"""Bins of a cell's counts, one of them for zeros."""
FIRST = 16
"""Ranks from the highest on that have a vector of their own."""
OCTAVE = 8
"""Vectors for each doubling of the rank after them."""
OCTAVES = 12
"""Doublings; ranks beyond the last, 65,536, share the last vector."""


class Scaled(nn.Sequential):
    """A small network of the scaled count in units of a typical one. `Tokens.values` are scaled counts."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(1, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, codes: Tensor) -> Tensor:
        """Vectors [tokens, width]; none depends on how many there are."""
        return steady(super().forward, codes)

    def read(self, tokens: "Tokens", unit: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and weights [tokens]."""
        values = tokens.values.masked_fill(tokens.hidden, 0.0) / unit
        return values[:, None], values


class Binned(nn.Embedding):
    """A vector a bin. `Tokens.values` are bins among the visible counts of the cell.

    Source: Cui 2024, scGPT, doi:10.1038/s41592-024-02201-0; bins as in `cellray.data.encodings.bins`.
    """

    def __init__(self, width: int) -> None:
        super().__init__(BINS, width)
        nn.init.normal_(self.weight, std=0.05)

    def read(self, tokens: "Tokens", unit: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and weights [tokens]: the bin, 1 for the middle one."""
        bins = tokens.values.masked_fill(tokens.hidden, 0.0)
        return bins.long(), bins * (2 / (BINS - 1))


class Ranked(nn.Embedding):
    """A vector a rank among the visible tokens of the cell, ranks of like size sharing one.

    Visible tokens come in rank order; `Tokens.values` are not read. Source: Theodoris 2023,
    doi:10.1038/s41586-023-06139-9, for ranks as values; there each position has a vector.
    """

    def __init__(self, width: int) -> None:
        super().__init__(FIRST + OCTAVE * OCTAVES, width)
        nn.init.normal_(self.weight, std=0.05)

    def read(self, tokens: "Tokens", unit: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and weights [tokens]: the share of the visible tokens that rank lower, 1 for the middle."""
        rank, visible = ranks(tokens)
        weights = 2 - (2 * rank + 1) / visible.clamp_min(1)
        return bucket(rank).masked_fill(tokens.hidden, 0), weights.masked_fill(tokens.hidden, 0.0)


Reading = Scaled | Binned | Ranked
ENCODINGS: dict[str, type[Reading]] = {"value": Scaled, "bins": Binned, "rank": Ranked}
"""By the name in a recipe."""


def ranks(tokens: "Tokens") -> tuple[Tensor, Tensor]:
    """How many visible tokens of its cell come before each token, and how many there are, int64 [tokens]."""
    before = F.pad(torch.cumsum(~tokens.hidden, 0), (1, 0))
    first, last = before[tokens.offsets[:-1]], before[tokens.offsets[1:]]
    lengths = tokens.offsets[1:] - tokens.offsets[:-1]
    rank = before[:-1] - torch.repeat_interleave(first, lengths)
    return rank, torch.repeat_interleave(last - first, lengths)


def bucket(rank: Tensor) -> Tensor:
    """Number of the vector of a rank, int64: its own below FIRST, then OCTAVE for each doubling."""
    octaves = torch.log2(rank.clamp_min(FIRST).double() / FIRST)
    later = FIRST + torch.floor(octaves * OCTAVE).long()
    return torch.where(rank < FIRST, rank, later).clamp(max=FIRST + OCTAVE * OCTAVES - 1)
