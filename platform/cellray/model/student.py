"""The students: joint embeddings from RNA alone. Two kinds behind one protocol, for two prices."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellray.data.modalities import Modality
from cellray.data.tokens import Vocabulary
from cellray.model.blocks import Block
from cellray.model.decoder import Decoder
from cellray.model.encoder import Encoder, Tokens
from cellray.model.teacher import some_cells

TOGETHER = 64
"""Cells that `embed` takes at the most, and that a student without attention always runs on."""
POSITIONS = 1024
"""About how many positions of cells of one length the small transformer runs on at a time."""


@dataclass(frozen=True)
class StudentOutput:
    """What the student says of some cells."""

    embedding: Tensor
    """[cells, width]: its estimate of the teacher's joint vector."""
    summaries: dict[str, Tensor]
    """Modality that was not given -> its estimated summary, [cells, width]."""
    log_variances: dict[str, Tensor]
    """How sure it is of them, [cells, width]."""


class Student(Protocol):
    """What training, the embedder and the bundle ask of a student, a torch module of any kind.

    RNA tokens of some cells are `ids` int64 [tokens]; `values` [tokens], counts as
    `modalities.scaled` gives them; `offsets` int64 [cells], where each cell's tokens begin; `depth`
    [cells], log(1 + total).
    """

    kind: str
    """Its name in KINDS."""
    ranked: bool
    """Whether a cell's tokens have to come in rank order, of all assays together; else any order will do."""
    sizes: dict[str, int]
    """What it is made with beside the modalities."""

    def __call__(self, ids: Tensor, values: Tensor, offsets: Tensor, depth: Tensor) -> StudentOutput:
        """From the RNA tokens of any number of cells."""
        ...

    def embed(self, ids: Tensor, values: Tensor, offsets: Tensor, depth: Tensor) -> Tensor:
        """Embeddings [cells, width] of at most TOGETHER cells: on one thread of a CPU, a cell's bits
        depend on its own tokens alone, in the order they have."""
        ...

    def decode(self, embedding: Tensor, modality: str) -> Tensor:
        """Log expected counts, or logits, of every feature of `modality`, [cells, features]."""
        ...

    def decoder(self, modality: str) -> Decoder: ...

    def path(self) -> list[nn.Module]:
        """What an embedding passes through."""
        ...

    def answers(self) -> list[nn.Module]:
        """What stands beside and on the embedding: all else that it is made of."""
        ...

    def start(self, vocabularies: Mapping[str, Vocabulary]) -> None:
        """Begin the decoders at the mean profiles, and take the unit of RNA values."""
        ...

    def eval(self) -> Any: ...

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...


class SparseMLP(nn.Module):
    """An embedding bag over the expressed genes, weighted by value, then residual blocks.

    The bag is as wide as the embedding, not as the hidden layers: it holds most of the weights
    and all of the memory traffic, and the student has to be smaller than the teacher's RNA path.
    """

    kind = "mlp"
    ranked = False
    unit: Tensor
    """A typical value: values are read as multiples of it."""

    def __init__(
        self, modalities: Mapping[str, tuple[Modality, int]], *, width: int, hidden: int, blocks: int
    ) -> None:
        """`modalities`: name -> (modality, number of features), "rna" among them."""
        super().__init__()
        self.sizes = {"width": width, "hidden": hidden, "blocks": blocks}
        self.bag = nn.EmbeddingBag(modalities["rna"][1], width, mode="sum")
        self.depth = nn.Linear(1, width)
        self.lift = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        self.blocks = nn.Sequential(*(Block(hidden) for _ in range(blocks)))
        self.joint, self.impute = _heads(modalities, hidden, width)
        self.decoders = _decoders(modalities, width)
        self.register_buffer("unit", torch.ones(()))
        nn.init.normal_(self.bag.weight, std=0.05)

    @torch.no_grad()
    def start(self, vocabularies: Mapping[str, Vocabulary]) -> None:
        self.unit.fill_(vocabularies["rna"].typical)
        for name, vocabulary in vocabularies.items():
            self.decoder(name).start(vocabulary)

    def decoder(self, modality: str) -> Decoder:
        return _decoder(self.decoders, modality)

    def path(self) -> list[nn.Module]:
        return [self.bag, self.depth, self.lift, self.blocks, self.joint]

    def answers(self) -> list[nn.Module]:
        return [self.impute, self.decoders]

    def forward(self, ids: Tensor, values: Tensor, offsets: Tensor, depth: Tensor) -> StudentOutput:
        reference = self.decoder("rna").reference
        x = self.bag(ids, offsets, per_sample_weights=values / self.unit)
        x = self.lift(x + self.depth((depth - reference)[:, None]))
        return _said(self.blocks(x), self.joint, self.impute)

    def embed(self, ids: Tensor, values: Tensor, offsets: Tensor, depth: Tensor) -> Tensor:
        """As in `Student`."""
        return embed_filled(self, ids, values, offsets, depth)

    def decode(self, embedding: Tensor, modality: str) -> Tensor:
        predicted: Tensor = self.decoder(modality)(embedding)
        return predicted


class SmallTransformer(nn.Module):
    """An encoder like the teacher's over the highest-ranked genes, beside its gather over all of them."""

    kind = "transformer"
    ranked = True

    def __init__(
        self,
        modalities: Mapping[str, tuple[Modality, int]],
        *,
        width: int,
        layers: int,
        heads: int,
        context: int,
    ) -> None:
        """`modalities`: name -> (modality, number of features), "rna" among them.

        `context` is how many tokens of a cell attend to each other, the first ones.
        """
        super().__init__()
        if width % heads:
            raise ValueError(f"a student of width {width} cannot have {heads} heads: it is no multiple")
        self.sizes = {"width": width, "layers": layers, "heads": heads, "context": context}
        self.encoder = Encoder(modalities["rna"][1], width, layers, heads, context)
        self.joint, self.impute = _heads(modalities, width, width)
        self.decoders = _decoders(modalities, width)

    def start(self, vocabularies: Mapping[str, Vocabulary]) -> None:
        self.encoder.start(vocabularies["rna"])
        for name, vocabulary in vocabularies.items():
            self.decoder(name).start(vocabulary)

    def decoder(self, modality: str) -> Decoder:
        return _decoder(self.decoders, modality)

    def path(self) -> list[nn.Module]:
        return [self.encoder, self.joint]

    def answers(self) -> list[nn.Module]:
        return [self.impute, self.decoders]

    def forward(self, ids: Tensor, values: Tensor, offsets: Tensor, depth: Tensor) -> StudentOutput:
        return self._read(_tokens(ids, values, offsets, depth))

    def embed(self, ids: Tensor, values: Tensor, offsets: Tensor, depth: Tensor) -> Tensor:
        """As in `Student`: cells with as many tokens as the context holds run some at a time, always
        as many, others alone. So what a cell is padded to, and with whom, follows from the cell."""
        tokens = _tokens(ids, values, offsets, depth)
        lengths = (tokens.offsets[1:] - tokens.offsets[:-1]).clamp(max=self.sizes["context"])
        whole = (lengths == self.sizes["context"]).nonzero().squeeze(1)
        size = together(self.sizes["context"])
        groups = [*whole.split(size), *(lengths < self.sizes["context"]).nonzero().split(1)]
        found = depth.new_empty(len(depth), self.sizes["width"])
        for cells in (group.flatten() for group in groups if len(group)):
            full = size if lengths[cells[0]] == self.sizes["context"] else 1
            filled = torch.cat([cells, cells[-1:].expand(full - len(cells))])
            found[cells] = self._read(some_cells(tokens, filled)).embedding[: len(cells)]
        return found

    def decode(self, embedding: Tensor, modality: str) -> Tensor:
        predicted: Tensor = self.decoder(modality)(embedding)
        return predicted

    def _read(self, tokens: Tokens) -> StudentOutput:
        return _said(self.encoder(tokens).summary, self.joint, self.impute)


KINDS: dict[str, type[SparseMLP] | type[SmallTransformer]] = {
    "mlp": SparseMLP,
    "transformer": SmallTransformer,
}
"""The kinds there are, by the names that recipes and bundles use."""


def build(
    kind: str, modalities: Mapping[str, tuple[Modality, int]], sizes: Mapping[str, int]
) -> SparseMLP | SmallTransformer:
    """An untrained student of a kind and the `sizes` that such a student has.

    ValueError for a kind there is not, or sizes that it is not made with.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no student of the kind {kind!r}, only of {', '.join(KINDS)}")
    try:
        return KINDS[kind](modalities, **sizes)
    except TypeError as error:
        raise ValueError(f"a student of the kind {kind!r} has no sizes {dict(sizes)}: {error}") from None


def embed_filled(student: Student, ids: Tensor, values: Tensor, offsets: Tensor, depth: Tensor) -> Tensor:
    """`Student.embed`, always on TOGETHER cells, the last ones empty, so that every sum has one order."""
    more = TOGETHER - len(depth)
    said = student(ids, values, F.pad(offsets, (0, more), value=len(ids)), F.pad(depth, (0, more)))
    return said.embedding[: len(depth)]


def together(context: int) -> int:
    """Cells of `context` tokens that the small transformer runs on at a time, a power of two.

    About POSITIONS in all: enough to fill a core, and no more for a single cell to wait for.
    """
    most: int = POSITIONS // (context + 1)
    return min(TOGETHER, 1 << max(most.bit_length() - 1, 0))


def _heads(
    modalities: Mapping[str, tuple[Modality, int]], hidden: int, width: int
) -> tuple[nn.Sequential, nn.ModuleDict]:
    """From `hidden` numbers a cell to the joint vector, and to the summary of each missing modality."""
    joint = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width))
    missing = [name for name in modalities if name != "rna"]
    return joint, nn.ModuleDict({name: nn.Linear(hidden, 2 * width) for name in missing})


def _decoders(modalities: Mapping[str, tuple[Modality, int]], width: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: Decoder(size, width, m.likelihood) for name, (m, size) in modalities.items()})


def _decoder(decoders: nn.ModuleDict, modality: str) -> Decoder:
    decoder = decoders[modality]
    assert isinstance(decoder, Decoder)
    return decoder


def _said(x: Tensor, joint: nn.Module, impute: nn.ModuleDict) -> StudentOutput:
    """What the heads make of `x` [cells, hidden]."""
    said = {name: head(x).chunk(2, dim=1) for name, head in impute.items()}
    return StudentOutput(
        joint(x),
        {name: mean for name, (mean, _) in said.items()},
        {name: log_variance.clamp(-8, 8) for name, (_, log_variance) in said.items()},
    )


def _tokens(ids: Tensor, values: Tensor, offsets: Tensor, depth: Tensor) -> Tokens:
    """RNA tokens as an encoder takes them, none hidden."""
    ends = F.pad(offsets, (0, 1), value=len(ids))
    return Tokens(ids, values, torch.zeros_like(ids, dtype=torch.bool), ends, depth)
