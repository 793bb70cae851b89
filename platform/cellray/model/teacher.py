"""The teacher: an encoder a modality, a fusion of whatever is present, and decoders of everything."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellray.data.modalities import Modality
from cellray.data.tokens import Vocabulary
from cellray.model.decoder import Decoder
from cellray.model.encoder import Encoder, Layer, Tokens


class Fusion(nn.Module):
    """Summaries of the present modalities -> one joint vector, by attention from a [CELL] position.

    [CELL] starts from the mean of the present summaries: what they say needs no layer to get there.
    """

    def __init__(self, modalities: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.cell = nn.Parameter(torch.zeros(width))
        self.kind = nn.Parameter(torch.zeros(modalities, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        nn.init.normal_(self.cell, std=0.05)
        nn.init.normal_(self.kind, std=0.05)

    def forward(self, summaries: Tensor, present: Tensor) -> Tensor:
        """Joint vectors [cells, width] from `summaries` [cells, modalities, width].

        `present` bool [cells, modalities]. What stands at an absent place changes nothing, bit
        for bit: it is replaced by zeros before attention, and attention gives it weight 0.
        """
        x = torch.where(present[..., None], summaries + self.kind, 0.0)
        mean = x.sum(dim=1, keepdim=True) / present.sum(dim=1).clamp_min(1)[:, None, None]
        x = torch.cat([(self.cell + mean).to(x.dtype), x], dim=1)
        real = torch.cat([present.new_ones(len(x), 1), present], dim=1)
        for layer in self.layers:
            x = layer(x, real)
        joint: Tensor = self.out(x[:, 0])
        return joint


class Heads(nn.Module):
    """What stage 1 asks of the token states of one modality: value and detection at hidden places.

    An open peak is open: under a Bernoulli likelihood there is no value to guess.
    """

    def __init__(self, width: int, likelihood: str) -> None:
        super().__init__()
        self.withheld = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.withheld, std=0.05)
        self.valued = likelihood == "negative_binomial"
        if self.valued:
            self.value = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.detection = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, states: Tensor) -> tuple[Tensor | None, Tensor]:
        """Value in the encoder's unit, where counted, and logit of being counted, both [states]."""
        value = self.value(states).squeeze(1) if self.valued else None
        return value, self.detection(states).squeeze(1)


class Teacher(nn.Module):
    """Encoders, fusion, decoders and heads over a fixed, ordered set of modalities."""

    def __init__(
        self,
        modalities: Mapping[str, tuple[Modality, int]],
        *,
        width: int,
        layers: int,
        heads: int,
        fusion_layers: int,
        encoding: str = "value",
        contexts: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """`modalities`: name -> (modality, number of features), in the order of the presence bits.

        `encoding` as in `cellray.model.values.ENCODINGS`. `contexts`: what the encoders are told of a
        cell, such as "assay" -> the names that have a vector; see `cellray.train.contexts`.
        """
        super().__init__()
        self.width = width
        self.names = tuple(modalities)
        self.encoding, self.contexts = encoding, dict(contexts or {})
        about = [len(names) for names in self.contexts.values()]
        self.encoders = nn.ModuleDict(
            {
                n: Encoder(size, width, layers, heads, m.context, encoding=encoding, about=about)
                for n, (m, size) in modalities.items()
            }
        )
        self.heads = nn.ModuleDict({n: Heads(width, m.likelihood) for n, (m, _) in modalities.items()})
        self.decoders = nn.ModuleDict(
            {n: Decoder(size, width, m.likelihood) for n, (m, size) in modalities.items()}
        )
        self.fusion = Fusion(len(modalities), width, fusion_layers, heads)
        self.match = nn.ModuleDict({n: nn.Linear(width, width) for n in modalities})

    def start(self, vocabularies: Mapping[str, Vocabulary]) -> None:
        """Begin the decoders at the mean profiles, and measure depth from the mean depth."""
        for name, vocabulary in vocabularies.items():
            self.decoder(name).start(vocabulary)
            self.encoder(name).start(vocabulary)

    def encoder(self, modality: str) -> Encoder:
        encoder = self.encoders[modality]
        assert isinstance(encoder, Encoder)
        return encoder

    def decoder(self, modality: str) -> Decoder:
        decoder = self.decoders[modality]
        assert isinstance(decoder, Decoder)
        return decoder

    def rna_path(self) -> list[nn.Module]:
        """What the RNA of a cell passes on its way to the joint vector."""
        return [self.encoder("rna"), self.fusion]

    def summaries(self, tokens: Mapping[str, Tokens], present: Tensor) -> Tensor:
        """Unimodal summaries [cells, modalities, width]; zeros where a modality is absent.

        Only the cells that have a modality pass its encoder. `present` bool [cells, modalities].
        """
        found = []
        for i, name in enumerate(self.names):
            encoder, cells = self.encoder(name), present[:, i].nonzero().squeeze(1)
            column = torch.zeros(len(present), self.width, device=present.device)
            if len(cells):
                summary = encoder(some_cells(tokens[name], cells)).summary
                column = column.to(summary.dtype).index_put((cells,), summary)
            elif encoder.awaited:
                # Any cell will do: nothing of it is used, and all gradients are zeros.
                none = encoder(some_cells(tokens[name], cells.new_zeros(1))).summary[:0]
                column = column.to(none.dtype).index_put((cells,), none)
            found.append(column)
        return torch.stack(found, dim=1)

    def forward(self, tokens: Mapping[str, Tokens], present: Tensor) -> tuple[Tensor, Tensor]:
        """Joint vectors [cells, width], and the unimodal summaries they come from."""
        summaries = self.summaries(tokens, present)
        return self.fusion(summaries, present), summaries


def some_cells(tokens: Tokens, cells: Tensor) -> Tokens:
    """The tokens of `cells`, in that order."""
    lengths = tokens.offsets[cells + 1] - tokens.offsets[cells]
    offsets = F.pad(torch.cumsum(lengths, 0), (1, 0))
    shift = torch.repeat_interleave(tokens.offsets[cells] - offsets[:-1], lengths)
    index = torch.arange(int(offsets[-1]), device=cells.device) + shift
    about = None if tokens.about is None else tokens.about[cells]
    ids, values, hidden = tokens.ids[index], tokens.values[index], tokens.hidden[index]
    return Tokens(ids, values, hidden, offsets, tokens.depth[cells], about)
