"""One modality's tokens -> a summary vector a cell, and a state a token."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cellray.data.tokens import Vocabulary
from cellray.model.attention import (
    BLOCK,
    ROWS,
    Compute,
    Packed,
    attention,
    compiles,
    flash,
    groups,
    spans,
    steady,
    uncompiled,
)
from cellray.model.blocks import Block
from cellray.model.values import ENCODINGS


@dataclass(frozen=True)
class Tokens:
    """Tokens of some cells in one modality, ragged: cell i owns `[offsets[i], offsets[i + 1])`."""

    ids: Tensor
    """int64 [tokens]."""
    values: Tensor
    """float32 [tokens], scaled counts or what the encoding reads; where `hidden`, anything: none is read."""
    hidden: Tensor
    """bool [tokens]: the value is withheld, the id asked for."""
    offsets: Tensor
    """int64 [cells + 1]."""
    depth: Tensor
    """float32 [cells]: log(1 + total) over all features."""
    about: Tensor | None = None
    """int64 [cells, columns]: number of the cell's species, assay …, 0 where it is unknown. None: all are."""

    def __len__(self) -> int:
        return len(self.depth)


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of some cells."""

    summary: Tensor
    """[cells, width]."""
    attended: Tensor
    """States of the tokens within the context, [tokens there, width], in the order they were computed."""
    places: Tensor
    """Which token each of them is of."""
    tokens: int
    """How many there are in all."""

    def at(self, places: Tensor) -> Tensor:
        """States of the tokens at `places`, which must lie within the context."""
        rows = torch.arange(len(self.places), device=places.device)
        row = self.places.new_full((self.tokens,), len(rows)).index_copy(0, self.places, rows)
        return self.attended[row[places]]

    @property
    def states(self) -> Tensor:
        """[tokens, width]; zeros beyond the context. That is much memory to fill: see `at`."""
        found = self.attended.new_zeros(self.tokens, self.attended.shape[1])
        return found.index_put((self.places,), self.attended)


START = 0.01
"""How strong what a layer adds to its input is at first, against torch's own start."""


class Layer(nn.Module):
    """Pre-norm transformer layer. It begins near the identity, and learns what to add.

    Where all layers add at full strength from the start, the first hundred steps lead summaries into a
    few large directions, and hundreds more back out of them.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # a bias of the keys would cancel in the softmax
        self.mix = nn.Linear(width, width)
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.compiled = False
        with torch.no_grad():
            for linear in (self.mix, self.body[-1]):
                assert isinstance(linear, nn.Linear)
                linear.weight.mul_(START)
                linear.bias.zero_()

    def forward(self, x: Tensor, where: Tensor | Packed | None) -> Tensor:
        """`x` [cells, positions, width] or, packed, [positions, width]; `where` as `attention` wants it."""
        return (_compiled() if self.compiled else _layer)(self, x, where)


def _layer(layer: Layer, x: Tensor, where: Tensor | Packed | None) -> Tensor:
    q, k, v = layer.qkv(layer.before(x)).unflatten(-1, (3, layer.heads, -1)).unbind(-3)
    x = x + layer.mix(attention(q, k, v, where).flatten(-2))
    found: Tensor = x + layer.body(x)
    return found


@functools.cache
def _compiled() -> Callable[[Layer, Tensor, Tensor | Packed | None], Tensor]:
    """One function for the layers of all encoders, so that it is compiled once, for all lengths."""
    uncompiled()
    return torch.compile(_layer, dynamic=True)


class Encoder(nn.Module):
    """A transformer over the non-zero tokens of a cell, after a gather over all of them.

    A token is its feature's vector plus a vector of its value, or of "hidden". The [CLS]
    position starts from the value-weighted sum of all visible tokens, so that it holds what a
    linear model of the cell would before attention refines it. What is known of the cell, such as
    its assay, is added there.
    """

    reference: Tensor
    """log(1 + mean depth): depth is read as the departure from it."""
    unit: Tensor
    """A typical value: values are read as multiples of it."""
    awaited: bool = False
    """Its parameters are shared out among workers: each has to call it in every step, on any cells."""

    def __init__(
        self,
        features: int,
        width: int,
        layers: int,
        heads: int,
        context: int,
        *,
        encoding: str = "value",
        about: Sequence[int] = (),
    ) -> None:
        """`encoding` as in `values.ENCODINGS`; `about`: names there are in each column of `Tokens.about`."""
        super().__init__()
        self.context = context
        self.heads, self.compute = heads, Compute()
        self.feature = nn.Embedding(features, width)
        self.value = ENCODINGS[encoding](width)
        self.cls = nn.Parameter(torch.zeros(width))
        self.depth = nn.Linear(1, width)
        self.bag = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            Block(4 * width),
            Block(4 * width),
            nn.LayerNorm(4 * width),
            nn.Linear(4 * width, width),
        )
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.out = nn.LayerNorm(width)
        self.summary = nn.Linear(width, width)
        self.register_buffer("reference", torch.zeros(()))
        self.register_buffer("unit", torch.ones(()))
        nn.init.normal_(self.feature.weight, std=0.05)
        nn.init.normal_(self.cls, std=0.05)
        # From zeros: an encoder begins as one that is told nothing, and draws no other random numbers.
        self.about = nn.ModuleList(
            nn.Embedding.from_pretrained(torch.zeros(names + 1, width), freeze=False) for names in about
        )

    @torch.no_grad()
    def start(self, vocabulary: Vocabulary) -> None:
        """Take the units of the frozen statistics."""
        self.reference.fill_(vocabulary.log_depth)
        self.unit.fill_(vocabulary.typical)

    def forward(self, tokens: Tokens, withheld: Tensor | None = None) -> Encoded:
        """`withheld` [width] stands where a value is hidden; it is needed where some are."""
        codes, weights = self.value.read(tokens, self.unit)
        feature, ids = self.feature.weight, tokens.ids
        if self.feature.sparse:  # in training by rows: these are all that is read of it
            rows, ids = torch.unique(ids, return_inverse=True)
            feature = self.feature(rows)
        weighted = F.embedding_bag(ids, feature, tokens.offsets[:-1], mode="sum", per_sample_weights=weights)
        depth = steady(self.depth, (tokens.depth - self.reference)[:, None])
        cls = self.cls + depth + steady(self.bag, weighted)
        for column, vectors in enumerate(self.about):
            known = tokens.ids.new_zeros(len(tokens)) if tokens.about is None else tokens.about[:, column]
            cls = cls + vectors(known)
        within, offsets = first_tokens(tokens.offsets, self.context)
        said = self.value(codes[within])
        if withheld is not None:
            said = torch.where(tokens.hidden[within][:, None], withheld, said)
        x = F.embedding(ids[within], feature) + said
        summary, states, order = self._attended(x, cls, offsets)
        return Encoded(summary, states, within[order], len(tokens.ids))

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """While the body runs, layers are not compiled.

        For those who watch operations: in such a mode torch.compile gives up on a function for good.
        """
        compute = self.compute
        self.compute = replace(compute, compile="off")
        try:
            yield
        finally:
            self.compute = compute

    def _attended(self, x: Tensor, cls: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Summaries [cells, width] and states [tokens, width] of tokens `x` [tokens, width].

        Then of which token each state is: they come as they are computed.
        """
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.compiled = compiles(self.compute, x.device)
        host = offsets.cpu()  # the one time that a GPU is waited for
        parts = groups(host, self.compute.together)
        order, lengths = torch.cat(parts), host.diff()
        index = spans(host[:-1][order], lengths[order], len(x)).to(x.device)
        cells, counts = [len(part) for part in parts], [int(lengths[part].sum()) for part in parts]
        shares = zip(
            x.index_select(0, index).split(counts),
            cls.index_select(0, order.to(x.device)).split(cells),
            lengths[order].to(x.device).split(cells),
            [int(lengths[part[-1:]].sum()) + 1 for part in parts],
            strict=True,
        )
        if self.compute.recompute and torch.is_grad_enabled():
            again = functools.partial(checkpoint, self._part, use_reentrant=False, preserve_rng_state=False)
            found = [again(*share) for share in shares]
        else:
            found = [self._part(*share) for share in shares]
        firsts, states = (torch.cat(one) for one in zip(*found, strict=True))
        summary = steady(self.summary, firsts.index_select(0, torch.argsort(order).to(x.device)))
        return summary, states, index

    def _part(self, x: Tensor, cls: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """States at [CLS] and at the tokens of cells that pass the layers in one call.

        `lengths` [cells] of their tokens; `longest` is the most positions that a cell has.
        """
        rows = len(x) + len(cls)
        ends = torch.cumsum(lengths + 1, 0)
        firsts, offsets = ends - lengths - 1, F.pad(ends, (1, 0))
        if rows < ROWS:  # a cell more, of nothing: see `steady`
            offsets = F.pad(offsets, (0, 1), value=ROWS)
        at = spans(firsts + 1, lengths, len(x))
        y = x.new_zeros(max(rows, ROWS), x.shape[1])
        y = y.index_copy(0, firsts, cls.to(y.dtype)).index_copy(0, at, x)
        weight, longest = self.summary.weight, -(-max(longest, ROWS) // BLOCK) * BLOCK
        takes = flash(y.device, weight.dtype, y.shape[1] // self.heads)
        where = Packed(offsets.to(torch.int32), longest, takes)
        for layer in self.layers:
            y = layer(y, where)
        y = self.out(y)
        return y.index_select(0, firsts), y.index_select(0, at)


def first_tokens(offsets: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Positions of the first `context` tokens of every cell, and the offsets of what is left."""
    lengths = (offsets[1:] - offsets[:-1]).clamp(max=context)
    left = F.pad(torch.cumsum(lengths, 0), (1, 0))
    return spans(offsets[:-1], lengths, int(left[-1])), left
