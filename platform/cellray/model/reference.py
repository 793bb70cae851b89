"""The networks of the published design that ours is compared with. RNA and ATAC; nothing else is read.

What is known of the design, and is so here:

* every gene of the vocabulary is a token in every cell, zeros included, in six value classes;
* a vector of RNA from a number a token, and a linear layer over the numbers of all genes;
* an ATAC encoder whose weights belong to one list of peaks;
* a joint vector that is linear in both vectors, one behind the other; linear decoders of every feature;
* a student that replaces the ATAC branch alone: an MLP from the RNA vector to the ATAC vector.

What is not known is ours, and meant to serve the design well: each such choice is marked "Ours" where it
is made. Its decoders have the likelihoods and the depth offset of `cellray.model.decoder`, so that what is
compared is the designs. Other modalities of a store, protein among them, are ignored: their vectors are
zeros, and their decoders say the mean profile of the training statistics for every cell.
Source: scMomer, bioRxiv 2025.08.04.668374, as far as described; no code of it was read.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellray.data.modalities import Modality
from cellray.data.tokens import Vocabulary
from cellray.model.decoder import Decoder
from cellray.model.encoder import Tokens
from cellray.model.student import Block, StudentOutput, embed_filled
from cellray.model.teacher import Teacher

FUSED = ("rna", "atac")
"""What the design reads, in the order of its joint vector."""
CLASSES = 6
"""Value classes of a gene: 0 where it is not counted."""
TYPICAL = 3
"""The class of a typical count."""
GROUP = 16_384
"""Tokens that pass the layers in one call: few enough for the caches of a core."""


def value_classes(ids: Tensor, values: Tensor, starts: Tensor, genes: int) -> Tensor:
    """The value class of every gene of every cell, int64 [cells, genes], from the genes that are counted.

    `ids`, `values` [tokens]: counted genes and their values, in classes; `starts` [cells]: where those of
    each cell begin. The class is the value rounded to the nearest whole number. Ours: but 1 at the least,
    since a counted gene is none that is not, and CLASSES - 1 at the most.
    """
    lengths = torch.diff(starts, append=starts.new_tensor([len(ids)]))
    cells = torch.repeat_interleave(torch.arange(len(starts), device=ids.device), lengths)
    found = torch.zeros(len(starts), genes, dtype=torch.int64, device=ids.device)
    return found.index_put((cells, ids), values.round().clamp(1, CLASSES - 1).long())


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query's mean of the values, weighted by its product with the keys, [..., positions, width].

    `q`, `k` are positive. The weights of all pairs of positions are never made: the cost is linear in
    the positions.
    Source: Katharopoulos 2020, arXiv:2006.16236.
    """
    read = k.transpose(-1, -2) @ v
    return (q @ read) / (q @ k.sum(dim=-2)[..., None])


class LinearLayer(nn.Module):
    """Pre-norm transformer layer over all genes, with linear attention.

    The published one approximates softmax attention by random features, for the same cost in genes. Ours:
    elu + 1 as the feature map, which is cheaper still and draws nothing at random.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` [cells, genes, width]."""
        cells, genes, width = x.shape
        shape = (cells, genes, self.heads, width // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, dim=-1))
        with torch.autocast(x.device.type, enabled=False):  # sums over all genes, of positive numbers
            mixed = linear_attention(F.elu(q.float()) + 1, F.elu(k.float()) + 1, v.float())
        x = x + self.mix(mixed.transpose(1, 2).reshape(cells, genes, width))
        return x + self.body(x)


class GeneStates(nn.Module):
    """Value classes of all genes -> a state a gene."""

    def __init__(self, genes: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.gene = nn.Embedding(genes, width)
        self.value = nn.Embedding(CLASSES + 1, width)
        """The last one stands where the class is withheld."""
        self.layers = nn.ModuleList(LinearLayer(width, heads) for _ in range(layers))
        self.out = nn.LayerNorm(width)
        nn.init.normal_(self.gene.weight, std=0.05)
        nn.init.normal_(self.value.weight, std=0.05)

    def forward(self, classes: Tensor) -> Tensor:
        """States [cells, genes, width] from `classes` int64 [cells, genes]; CLASSES where one is withheld."""
        x = self.gene.weight + self.value(classes)
        for layer in self.layers:
            x = layer(x)
        states: Tensor = self.out(x)
        return states

    def groups(self, classes: Tensor) -> tuple[Tensor, ...]:
        """The cells in pieces of about GROUP tokens."""
        return classes.split(max(1, GROUP // max(1, classes.shape[1])))


class GeneEncoder(nn.Module):
    """Value classes of all genes -> a vector a cell: a number from each gene's state, then a linear layer.

    Ours: a norm behind it, as the ATAC vector has, so that the two are of like size where they meet; and
    a typical count of the training statistics is of class TYPICAL, so that the classes are of use at any
    depth: rounded as they are, log1p(CP10k) of shallow cells are nearly all of three classes.
    """

    unit: Tensor
    """log1p(CP10k) that is worth one class."""

    def __init__(self, genes: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.genes = genes
        self.states = GeneStates(genes, width, layers, heads)
        self.reduce = nn.Linear(width, 1)
        self.summary = nn.Sequential(nn.Linear(genes, width), nn.LayerNorm(width))
        self.register_buffer("unit", torch.ones(()))

    @torch.no_grad()
    def start(self, vocabulary: Vocabulary) -> None:
        """Take the unit of values from the frozen statistics."""
        self.unit.fill_(vocabulary.typical / TYPICAL)

    def classes(self, ids: Tensor, values: Tensor, starts: Tensor) -> Tensor:
        """`value_classes` of counted genes with `values` as log1p(CP10k)."""
        return value_classes(ids, values / self.unit, starts, self.genes)

    def forward(self, classes: Tensor) -> Tensor:
        """Vectors [cells, width] from `classes` int64 [cells, genes]."""
        reduced = [self.reduce(self.states(part)).squeeze(2) for part in self.states.groups(classes)]
        vectors: Tensor = self.summary(torch.cat(reduced))
        return vectors.float()


class PeakEncoder(nn.Module):
    """The binary vector of all peaks -> a vector a cell. Ours: an MLP of one hidden layer.

    The product of the first layer is made as a sum over the open peaks, which is the same for less.
    """

    def __init__(self, peaks: int, width: int) -> None:
        super().__init__()
        hidden = 4 * width
        self.peak = nn.EmbeddingBag(peaks, hidden, mode="sum")
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.body = nn.Sequential(
            nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, width), nn.LayerNorm(width)
        )
        nn.init.normal_(self.peak.weight, std=0.05)

    def forward(self, ids: Tensor, starts: Tensor) -> Tensor:
        """Vectors [cells, width]; `ids` [tokens] are open peaks, those of each cell from `starts` [cells]."""
        vectors: Tensor = self.body(self.peak(ids, starts) + self.bias)
        return vectors.float()


class Concatenation(nn.Module):
    """Both vectors, one behind the other, and a linear layer: the joint vector.

    Ours: an absent one is zeros, where the published design has none to give.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.joint = nn.Linear(2 * width, width)

    def forward(self, pair: Tensor, present: Tensor) -> Tensor:
        """Joint vectors [cells, width] from `pair` [cells, 2, width]; `present` bool [cells, 2]."""
        joint: Tensor = self.joint(torch.where(present[..., None], pair, 0.0).flatten(1))
        return joint


class LinearDecoder(Decoder):
    """Log rates or logits that are linear in the cell vector: a row of weights and a bias a feature."""

    def __init__(self, features: int, width: int, likelihood: str) -> None:
        super().__init__(features, width, likelihood)
        del self.enter, self.leave

    @torch.no_grad()
    def inherit(self, other: Decoder, mean: np.ndarray, spread: float) -> None:
        """Take over what `other` learnt, for cell vectors that are (its vector - mean) / spread."""
        self.load_state_dict(other.state_dict())
        middle = torch.from_numpy(mean).to(self.bias)
        self.bias.add_(self.feature.weight @ middle)
        self.feature.weight.mul_(spread)
        self.depth.bias.add_(self.depth.weight @ middle)
        self.depth.weight.mul_(spread)

    def direction(self, cell: Tensor) -> Tensor:
        """The cell vector itself."""
        return cell


def _decoders(modalities: Mapping[str, tuple[Modality, int]], width: int) -> nn.ModuleDict:
    """A decoder a modality; of those that are ignored, one that says the mean profile whatever the cell."""
    made = {name: LinearDecoder(size, width, m.likelihood) for name, (m, size) in modalities.items()}
    for name in made.keys() - set(FUSED):
        nn.init.zeros_(made[name].feature.weight)
    return nn.ModuleDict(made)


class ReferenceTeacher(Teacher):
    """The published teacher, for all that asks a `Teacher` for vectors: `forward`, `names`, `decoder`."""

    def __init__(
        self, modalities: Mapping[str, tuple[Modality, int]], *, width: int, layers: int, heads: int
    ) -> None:
        """`modalities`: name -> (modality, number of features), in the order of the presence bits."""
        nn.Module.__init__(self)  # none of a Teacher's own networks
        if missing := [name for name in FUSED if name not in modalities]:
            raise ValueError(
                f"method=reference fuses RNA and ATAC; the store holds {', '.join(modalities)} "
                f"and no {' and no '.join(missing)}. Ingest both, or train with method=cellray."
            )
        self.width = width
        self.names = tuple(modalities)
        self.encoding, self.contexts = "value", {}
        self.columns = [self.names.index(name) for name in FUSED]
        self.genes = GeneEncoder(modalities["rna"][1], width, layers, heads)
        self.peaks = PeakEncoder(modalities["atac"][1], width)
        self.guess = nn.Linear(width, CLASSES)
        """Stage 1: the class of a gene that was withheld, from its state."""
        self.joined = Concatenation(width)
        self.matched = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        """Stage 2: whether a joint vector is of one cell. Ours: a hidden layer, without which a linear
        fusion could tell no pair from another: the answer would be a sum over the two halves."""
        self.decoders = _decoders(modalities, width)

    def start(self, vocabularies: Mapping[str, Vocabulary]) -> None:
        """Begin the decoders at the mean profiles, and take the unit of RNA values."""
        self.genes.start(vocabularies["rna"])
        for name, vocabulary in vocabularies.items():
            self.decoder(name).start(vocabulary)

    def rna_path(self) -> list[nn.Module]:
        """What the RNA of a cell passes on its way to the joint vector."""
        return [self.genes, self.joined]

    def summaries(self, tokens: Mapping[str, Tokens], present: Tensor) -> Tensor:
        """RNA and ATAC vectors [cells, modalities, width]; zeros where one is absent, or ignored."""
        rna, atac = (tokens[name] for name in FUSED)
        of_rna, of_atac = (present[:, i].nonzero().squeeze(1) for i in self.columns)
        classes = self.genes.classes(rna.ids, rna.values, rna.offsets[:-1])
        vectors = torch.zeros(*present.shape, self.width, device=present.device)
        at = [torch.full_like(cells, i) for i, cells in zip(self.columns, (of_rna, of_atac), strict=True)]
        vectors = vectors.index_put((of_rna, at[0]), self.genes(classes[of_rna]))
        return vectors.index_put((of_atac, at[1]), self.peaks(atac.ids, atac.offsets[:-1])[of_atac])

    def fused(self, summaries: Tensor, present: Tensor) -> Tensor:
        """Joint vectors [cells, width] from what `summaries` makes; `present` bool [cells, modalities]."""
        joint: Tensor = self.joined(summaries[:, self.columns], present[:, self.columns])
        return joint

    def forward(self, tokens: Mapping[str, Tokens], present: Tensor) -> tuple[Tensor, Tensor]:
        """Joint vectors [cells, width], and the vectors they come from."""
        summaries = self.summaries(tokens, present)
        return self.fused(summaries, present), summaries


class ReferenceStudent(nn.Module):
    """The published student, a `Student` to all that asks one: the large RNA encoder, then an MLP for ATAC.

    The embedding is the fusion of the RNA vector and of the ATAC vector that the MLP predicts from it,
    centred and scaled as `TeacherVectors.joint` is. The MLP reads and predicts vectors that are centred and
    scaled likewise.
    """

    kind = "reference"
    ranked = False
    means: Tensor
    """Of the RNA vector, the ATAC vector and the joint vector, [3, width]."""
    spreads: Tensor
    """Of the same, [3]."""
    sees: Tensor
    """Whether the predicted ATAC vector is used: not in the control, which knows RNA alone."""

    def __init__(
        self,
        modalities: Mapping[str, tuple[Modality, int]],
        *,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        blocks: int,
    ) -> None:
        """`modalities`: name -> (modality, number of features), "rna" among them."""
        super().__init__()
        self.sizes = {"width": width, "layers": layers, "heads": heads, "hidden": hidden, "blocks": blocks}
        self.genes = GeneEncoder(modalities["rna"][1], width, layers, heads)
        self.joined = Concatenation(width)
        self.predict = nn.Sequential(
            nn.Linear(width, hidden),
            *(Block(hidden) for _ in range(blocks)),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, width),
        )
        self.decoders = _decoders(modalities, width)
        self.register_buffer("means", torch.zeros(3, width))
        self.register_buffer("spreads", torch.ones(3))
        self.register_buffer("sees", torch.ones((), dtype=torch.bool))

    def start(self, vocabularies: Mapping[str, Vocabulary]) -> None:
        """Begin the decoders at the mean profiles, and take the unit of RNA values."""
        self.genes.start(vocabularies["rna"])
        for name, vocabulary in vocabularies.items():
            self.decoder(name).start(vocabulary)

    def path(self) -> list[nn.Module]:
        return [self.genes, self.predict, self.joined]

    def answers(self) -> list[nn.Module]:
        return [self.decoders]

    def decoder(self, modality: str) -> Decoder:
        decoder = self.decoders[modality]
        assert isinstance(decoder, Decoder)
        return decoder

    def decode(self, embedding: Tensor, modality: str) -> Tensor:
        predicted: Tensor = self.decoder(modality)(embedding)
        return predicted

    def embed(self, ids: Tensor, values: Tensor, offsets: Tensor, depth: Tensor) -> Tensor:
        """As in `Student`."""
        return embed_filled(self, ids, values, offsets, depth)

    @torch.no_grad()
    def follow(self, teacher: ReferenceTeacher, centres: list[tuple[np.ndarray, float]]) -> None:
        """Take over all but the MLP. `centres`: mean and spread of the RNA, ATAC and joint vectors."""
        self.genes.load_state_dict(teacher.genes.state_dict())
        self.joined.load_state_dict(teacher.joined.state_dict())
        self.means.copy_(torch.from_numpy(np.stack([mean for mean, _ in centres])))
        self.spreads.copy_(torch.tensor([spread for _, spread in centres]))
        for name in teacher.names:
            self.decoder(name).inherit(teacher.decoder(name), *centres[2])

    @torch.no_grad()
    def alone(self, teacher: ReferenceTeacher) -> None:
        """Become the control: take over the RNA encoder, as it is when it has met RNA alone."""
        self.genes.load_state_dict(teacher.genes.state_dict())
        self.sees.fill_(False)

    def forward(self, ids: Tensor, values: Tensor, offsets: Tensor, depth: Tensor) -> StudentOutput:
        """As in `Student`. `depth` is not read: value classes know no depth."""
        rna = self.genes(self.genes.classes(ids, values, offsets))
        atac = self.predict((rna - self.means[0]) / self.spreads[0]).float()
        pair = torch.stack([rna, atac * self.spreads[1] + self.means[1]], dim=1)
        known = torch.stack([torch.ones_like(self.sees), self.sees]).expand(len(pair), 2)
        joint = (self.joined(pair, known).float() - self.means[2]) / self.spreads[2]
        return StudentOutput(joint, {"atac": atac}, {"atac": torch.zeros_like(atac)})
