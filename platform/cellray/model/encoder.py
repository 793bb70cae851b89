"""One modality's tokens -> a summary vector a cell, and a state a token."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellray.data.tokens import Vocabulary

GROUP = 16_384
"""Most padded tokens that attend in one call: enough to fill the cores, little enough for their caches."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of some cells in one modality, ragged: cell i owns `[offsets[i], offsets[i + 1])`."""

    ids: Tensor
    """int64 [tokens]."""
    values: Tensor
    """float32 [tokens], scaled counts; where `hidden`, anything: it is not read."""
    hidden: Tensor
    """bool [tokens]: the value is withheld, the id asked for."""
    offsets: Tensor
    """int64 [cells + 1]."""
    depth: Tensor
    """float32 [cells]: log(1 + total) over all features."""

    def __len__(self) -> int:
        return len(self.depth)


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of some cells."""

    summary: Tensor
    """[cells, width]."""
    states: Tensor
    """[tokens, width]; zeros beyond the context."""


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # a bias of the keys would cancel in the softmax
        self.mix = nn.Linear(width, width)
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        """`x` [cells, positions, width]; `real` bool [cells, positions], None where all are."""
        cells, positions, width = x.shape
        shape = (cells, positions, self.heads, width // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, dim=-1))
        mask = None if real is None else real[:, None, None, :]
        if x.device.type == "cpu":  # there the backward of bf16 attention takes twice the time of fp32
            with torch.autocast("cpu", enabled=False):
                mixed = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.mix(mixed.transpose(1, 2).reshape(cells, positions, width))
        return x + self.body(x)


class Encoder(nn.Module):
    """A transformer over the non-zero tokens of a cell, after a gather over all of them.

    A token is its feature's vector plus a vector of its value, or of "hidden". The [CLS]
    position starts from the value-weighted sum of all visible tokens, so that it holds what a
    linear model of the cell would before attention refines it.
    """

    reference: Tensor
    """log(1 + mean depth): depth is read as the departure from it."""
    unit: Tensor
    """A typical value: values are read as multiples of it."""
    awaited: bool = False
    """Its parameters are shared out among workers: each has to call it in every step, on any cells."""

    def __init__(self, features: int, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.feature = nn.Embedding(features, width)
        self.value = nn.Sequential(nn.Linear(1, width), nn.GELU(), nn.Linear(width, width))
        self.cls = nn.Parameter(torch.zeros(width))
        self.depth = nn.Linear(1, width)
        self.bag = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.out = nn.LayerNorm(width)
        self.summary = nn.Linear(width, width)
        self.register_buffer("reference", torch.zeros(()))
        self.register_buffer("unit", torch.ones(()))
        nn.init.normal_(self.feature.weight, std=0.05)
        nn.init.normal_(self.cls, std=0.05)

    @torch.no_grad()
    def start(self, vocabulary: Vocabulary) -> None:
        """Take the units of the frozen statistics."""
        self.reference.fill_(vocabulary.log_depth)
        self.unit.fill_(vocabulary.typical)

    def forward(self, tokens: Tokens, withheld: Tensor | None = None) -> Encoded:
        """`withheld` [width] stands where a value is hidden; it is needed where some are."""
        values = tokens.values.masked_fill(tokens.hidden, 0.0) / self.unit
        weighted = F.embedding_bag(
            tokens.ids, self.feature.weight, tokens.offsets[:-1], mode="sum", per_sample_weights=values
        )
        cls = self.cls + self.depth((tokens.depth - self.reference)[:, None]) + self.bag(weighted)
        within, offsets = first_tokens(tokens.offsets, self.context)
        said = self.value(values[within][:, None])
        if withheld is not None:
            said = torch.where(tokens.hidden[within][:, None], withheld, said)
        x = self.feature(tokens.ids[within]) + said
        states, summaries, order = [], [], []
        for cells in groups(offsets):
            y, index, at, real = _pad(x, cls, offsets, cells)
            for layer in self.layers:
                y = layer(y, real)
            y = self.out(y)
            summaries.append(self.summary(y[:, 0]))
            states.append((within[index], y[:, 1:][at]))
            order.append(cells)
        summary = torch.cat(summaries)[torch.argsort(torch.cat(order))]
        found = torch.cat([s for _, s in states])
        spread = found.new_zeros(len(tokens.ids), found.shape[1])
        return Encoded(summary, spread.index_put((torch.cat([i for i, _ in states]),), found))


def first_tokens(offsets: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Positions of the first `context` tokens of every cell, and the offsets of what is left."""
    lengths = (offsets[1:] - offsets[:-1]).clamp(max=context)
    left = F.pad(torch.cumsum(lengths, 0), (1, 0))
    shift = torch.repeat_interleave(offsets[:-1] - left[:-1], lengths)
    return torch.arange(int(left[-1]), device=offsets.device) + shift, left


def _pad(
    x: Tensor, cls: Tensor, offsets: Tensor, cells: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Some cells as [cells, 1 + longest, width]; the tokens used; where they sit; what is real."""
    lengths = offsets[cells + 1] - offsets[cells]
    positions = torch.arange(int(lengths.max()) if len(lengths) else 0, device=x.device)
    at = positions < lengths[:, None]
    index = (offsets[cells][:, None] + positions)[at]
    body = x.new_zeros(*at.shape, x.shape[1]).index_put((at,), x[index])
    real = torch.cat([at.new_ones(len(cells), 1), at], dim=1)
    padded = torch.cat([cls[cells][:, None].to(x.dtype), body], dim=1)
    return padded, index, at, None if bool(at.all()) else real


def groups(offsets: Tensor) -> list[Tensor]:
    """Cells in groups of like length, so that little is padded: each a tensor of cell indices."""
    lengths = offsets[1:] - offsets[:-1]
    order = torch.argsort(lengths, stable=True)
    found, first = [], 0
    sizes = (lengths[order] + 1).tolist()
    for end in range(1, len(sizes) + 1):
        if (
            end == len(sizes)
            or (end - first + 1) * sizes[end] > GROUP
            or sizes[end] > 1.25 * sizes[first] + 16
        ):
            found.append(order[first:end])
            first = end
    return found
