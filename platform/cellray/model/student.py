"""The student: joint embeddings from RNA alone, for the price of a gather and a small MLP."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cellray.data.modalities import Modality
from cellray.data.tokens import Vocabulary
from cellray.model.decoder import Decoder


@dataclass(frozen=True)
class StudentOutput:
    """What the student says of some cells."""

    embedding: Tensor
    """[cells, width]: its estimate of the teacher's joint vector."""
    summaries: dict[str, Tensor]
    """Modality that was not given -> its estimated summary, [cells, width]."""
    log_variances: dict[str, Tensor]
    """How sure it is of them, [cells, width]."""


class Block(nn.Module):
    """Residual MLP, pre-norm."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Student(nn.Module):
    """Sparse MLP: an embedding bag over the expressed genes, weighted by value, then residual blocks.

    The bag is as wide as the embedding, not as the hidden layers: it holds most of the weights
    and all of the memory traffic, and the student has to be smaller than the teacher's RNA path.
    """

    unit: Tensor
    """A typical value: values are read as multiples of it."""

    def __init__(
        self, modalities: Mapping[str, tuple[Modality, int]], *, width: int, hidden: int, blocks: int
    ) -> None:
        """`modalities`: name -> (modality, number of features), "rna" among them."""
        super().__init__()
        self.bag = nn.EmbeddingBag(modalities["rna"][1], width, mode="sum")
        self.depth = nn.Linear(1, width)
        self.lift = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        self.blocks = nn.Sequential(*(Block(hidden) for _ in range(blocks)))
        self.joint = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width))
        missing = [name for name in modalities if name != "rna"]
        self.impute = nn.ModuleDict({name: nn.Linear(hidden, 2 * width) for name in missing})
        self.decoders = nn.ModuleDict(
            {name: Decoder(size, width, m.likelihood) for name, (m, size) in modalities.items()}
        )
        self.register_buffer("unit", torch.ones(()))
        nn.init.normal_(self.bag.weight, std=0.05)

    @torch.no_grad()
    def start(self, vocabularies: Mapping[str, Vocabulary]) -> None:
        """Begin the decoders at the mean profiles, and take the unit of RNA values."""
        self.unit.fill_(vocabularies["rna"].typical)
        for name, vocabulary in vocabularies.items():
            self.decoder(name).start(vocabulary)

    def decoder(self, modality: str) -> Decoder:
        decoder = self.decoders[modality]
        assert isinstance(decoder, Decoder)
        return decoder

    def path(self) -> list[nn.Module]:
        """What every embedding passes."""
        return [self.bag, self.depth, self.lift, self.blocks, self.joint]

    def forward(self, ids: Tensor, values: Tensor, offsets: Tensor, depth: Tensor) -> StudentOutput:
        """From the RNA tokens of some cells.

        `ids` int64 [tokens]; `values` [tokens], counts as `modalities.scaled` gives them;
        `offsets` int64 [cells], where each cell's tokens begin; `depth` [cells], log(1 + total).
        """
        reference = self.decoder("rna").reference
        x = self.bag(ids, offsets, per_sample_weights=values / self.unit)
        x = self.lift(x + self.depth((depth - reference)[:, None]))
        x = self.blocks(x)
        said = {name: head(x).chunk(2, dim=1) for name, head in self.impute.items()}
        return StudentOutput(
            self.joint(x),
            {name: mean for name, (mean, _) in said.items()},
            {name: log_variance.clamp(-8, 8) for name, (_, log_variance) in said.items()},
        )

    def decode(self, embedding: Tensor, modality: str) -> Tensor:
        """Log expected counts, or logits, of every feature of `modality`, [cells, features]."""
        predicted: Tensor = self.decoder(modality)(embedding)
        return predicted
