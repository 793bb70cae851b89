"""The stages: what each trains, on which cells, and its losses. One class a stage, one method a step.

A loss is a sum over this worker's targets with their number; the loop divides by the number of
all workers, so that two workers equal one.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellray.data.ranking import by_rank, pooled_weight
from cellray.data.store import Batch
from cellray.data.tokens import POOLED, Counts, Tokenizer, Vocabulary
from cellray.model.decoder import Decoder
from cellray.model.student import Student, StudentOutput
from cellray.model.teacher import Teacher
from cellray.train import recipe as settings
from cellray.train.batches import (
    asked_features,
    kept,
    masked_tokens,
    plain_tokens,
    present,
    targets,
)
from cellray.train.contexts import Contexts
from cellray.train.feed import mix, uniform
from cellray.train.masks import mask_of
from cellray.train.targets import TeacherVectors
from cellray.train.workers import all_rows


@dataclass(frozen=True)
class Loss:
    """A sum over some targets, how many they are, and the weight of their mean in the whole."""

    sum: Tensor
    count: float
    weight: float = 1.0


class Stage(Protocol):
    """What the loop needs of a stage."""

    name: str
    epochs: float
    asked: int
    """Most features that a decoder is asked for in a step; 0 if it is asked for all."""

    def trained(self) -> list[nn.Module]:
        """The modules it changes; everything else stays bit for bit."""
        ...

    def needs(self) -> tuple[str, ...]:
        """Modalities of which a cell must have at least one to be trained on."""
        ...

    def reads(self) -> tuple[str, ...]:
        """Modalities whose tokens it reads, for the token budget."""
        ...

    def losses(self, batch: Batch, step: int) -> dict[str, Loss]:
        """Of one worker's share of a global batch. The same names on every worker."""
        ...


def key_of(seed: int, name: str) -> int:
    """A number of its own for every stage, so that none repeats another's random choices."""
    return int(mix(seed, *name.encode()) >> np.uint64(1))


def decoding(
    decoder: Decoder,
    vocabulary: Vocabulary,
    counts: Counts,
    cell: Tensor,
    *,
    queries: int,
    keys: tuple[int, ...],
    weight: float = 1.0,
    prior: float = 0.0,
) -> Loss:
    """How badly `cell` [cells, width] explains `counts`, per counted feature among those asked for."""
    asked = asked_features(len(vocabulary), queries, *keys)
    device = str(cell.device)
    wanted = targets(counts, len(vocabulary), asked, device)
    depth = torch.from_numpy(np.log1p(counts.total).astype(np.float32)).to(device)
    ids = None if asked is None else torch.from_numpy(asked).to(device)
    fit = decoder.negative_log_likelihood(cell, wanted, depth, ids, prior=prior)
    return Loss(fit, float((wanted > 0).sum()), weight)


class Unimodal:
    """Stage 1: values and detection at hidden places, and all features through the bottleneck."""

    def __init__(
        self,
        setting: settings.Unimodal,
        teacher: Teacher,
        tokenizer: Tokenizer,
        modality: str,
        *,
        seed: int,
        device: str,
        contexts: Contexts | None = None,
    ) -> None:
        self.setting, self.teacher, self.device, self.contexts = setting, teacher, device, contexts
        self.vocabulary = tokenizer.vocabularies[modality]
        self.modality = self.vocabulary.modality
        self.name = f"unimodal-{modality}"
        self.epochs, self.asked = setting.epochs, setting.queries
        self.seed = key_of(seed, self.name)
        self.mask = mask_of(setting, self.vocabulary)

    def trained(self) -> list[nn.Module]:
        name = self.modality.name
        return [self.teacher.encoders[name], self.teacher.heads[name], self.teacher.decoders[name]]

    def needs(self) -> tuple[str, ...]:
        return (self.modality.name,)

    reads = needs

    def losses(self, batch: Batch, step: int) -> dict[str, Loss]:
        name = self.modality.name
        counts = batch.counts[name]
        tokens, at, truth = masked_tokens(
            counts,
            batch.rows,
            self.modality,
            len(self.vocabulary),
            mask=self.mask,
            zeros=self.setting.zeros,
            keys=(self.seed, step),
            encoding=self.teacher.encoding,
            device=self.device,
        )
        if self.contexts is not None:
            tokens = replace(
                tokens, about=self.contexts.drawn(batch.rows, self.seed, step, device=self.device)
            )
        encoder, heads = self.teacher.encoder(name), self.teacher.heads[name]
        encoded = encoder(tokens, heads.withheld)
        value, detected = heads(encoded.at(at))
        counted = truth > 0
        rebuilt = decoding(
            self.teacher.decoder(name),
            self.vocabulary,
            counts,
            encoded.summary,
            queries=self.setting.queries,
            keys=(self.seed, step),
        )
        found = {
            "detection": Loss(
                F.binary_cross_entropy_with_logits(detected.float(), counted.float(), reduction="sum"),
                len(truth),
                self.setting.hidden,
            ),
            "reconstruction": rebuilt,
        }
        if value is not None:
            error = ((value.float() - truth / encoder.unit).square() * counted).sum()
            found["value"] = Loss(error, float(counted.sum()), self.setting.hidden)
        return found


class Joint:
    """Stage 2: one vector from any subset of modalities, from which all of them can be decoded."""

    name = "joint"

    def __init__(
        self,
        setting: settings.Joint,
        teacher: Teacher,
        tokenizer: Tokenizer,
        *,
        seed: int,
        device: str,
        contexts: Contexts | None = None,
    ) -> None:
        self.setting, self.teacher, self.tokenizer, self.device = setting, teacher, tokenizer, device
        self.contexts = contexts
        self.epochs, self.asked = setting.epochs, setting.queries
        self.seed = key_of(seed, self.name)

    def trained(self) -> list[nn.Module]:
        t = self.teacher
        return [t.encoders, t.decoders, t.fusion, *([t.match] if len(t.names) > 1 else [])]

    def needs(self) -> tuple[str, ...]:
        return self.teacher.names

    reads = needs

    def losses(self, batch: Batch, step: int) -> dict[str, Loss]:
        has = present(batch, len(self.teacher.names))
        tokens = {
            name: plain_tokens(
                counts,
                self.tokenizer.vocabularies[name].modality,
                keep=kept(counts, batch.rows, self.setting.mask, self.seed, step, i),
                encoding=self.teacher.encoding,
                device=self.device,
            )
            for i, (name, counts) in enumerate(batch.counts.items())
        }
        if self.contexts is not None:
            about = self.contexts.drawn(batch.rows, self.seed, step, device=self.device)
            tokens = {name: replace(own, about=about) for name, own in tokens.items()}
        summaries = self.teacher.summaries(tokens, torch.from_numpy(has).to(self.device))
        shown = torch.from_numpy(self._shown(batch.rows, has, step)).to(self.device)
        cell = self.teacher.fusion(summaries, shown)
        found: dict[str, Loss] = {}
        for i, name in enumerate(self.teacher.names):
            rows = np.flatnonzero(has[:, i])
            found[name] = decoding(
                self.teacher.decoder(name),
                self.tokenizer.vocabularies[name],
                batch.counts[name].take(rows),
                cell[torch.from_numpy(rows).to(self.device)],
                queries=self.setting.queries,
                keys=(self.seed, step),
                weight=1.0 if name == "rna" else self.setting.others,
            )
            for j in range(i):
                both = torch.from_numpy(np.flatnonzero(has[:, i] & has[:, j])).to(self.device)
                pair = f"match-{self.teacher.names[j]}-{name}"
                found[pair] = self._matched(j, i, summaries[both])
        return found

    def _shown(self, rows: np.ndarray, has: np.ndarray, step: int) -> np.ndarray:
        """What fusion sees of each cell: each present modality with chance 1 - dropout, one always."""
        drawn = uniform(self.seed, step, 99, rows[:, None], np.arange(has.shape[1]))
        drawn = np.where(has, drawn, -1.0)
        best = drawn.argmax(axis=1)[:, None] == np.arange(has.shape[1])
        return has & ((drawn >= self.setting.dropout) | best)

    def _matched(self, a: int, b: int, summaries: Tensor) -> Loss:
        """Which of the batch's cells is the other half of this pair, asked both ways; labels play no part."""
        names = self.teacher.names
        x = F.normalize(self.teacher.match[names[a]](summaries[:, a]).float(), dim=1)
        y = F.normalize(self.teacher.match[names[b]](summaries[:, b]).float(), dim=1)
        all_x, first = all_rows(x)
        all_y, _ = all_rows(y)
        own = torch.arange(first, first + len(x), device=x.device)
        t = self.setting.temperature
        there = F.cross_entropy(x @ all_y.T / t, own, reduction="sum")
        back = F.cross_entropy(y @ all_x.T / t, own, reduction="sum")
        return Loss((there + back) / 2, len(x), self.setting.match)


class View:
    """The student's side of stage 3: RNA with tokens dropped in, an embedding and its decoding out."""

    def __init__(
        self, setting: settings.Distil, student: Student, tokenizer: Tokenizer, *, seed: int, device: str
    ) -> None:
        self.setting, self.student, self.tokenizer, self.device = setting, student, tokenizer, device
        self.seed = key_of(seed, "student")
        self.weight = pooled_weight(tokenizer, "rna")

    def __call__(self, batch: Batch, step: int) -> StudentOutput:
        """From the tokens that stay; their values make up for those dropped."""
        rna, share = self.tokenizer.vocabularies["rna"].modality, self.setting.mask
        counts = batch.counts["rna"]
        if self.student.ranked:  # as it will be asked, when nobody says of which assay a cell is
            counts = by_rank(counts, self.weight)
        keep = kept(counts, batch.rows, share, self.seed, step)
        tokens = plain_tokens(counts, rna, keep=keep, device=self.device)
        return self.student(tokens.ids, tokens.values / (1 - share), tokens.offsets[:-1], tokens.depth)

    def decoding(self, name: str, batch: Batch, rows: np.ndarray, embedding: Tensor, step: int) -> Loss:
        vocabulary = self.tokenizer.vocabularies[name]
        prior = 0.0 if name == "rna" else self.setting.prior / max(1, vocabulary.cells[POOLED])
        return decoding(
            self.student.decoder(name),
            vocabulary,
            batch.counts[name].take(rows),
            embedding[torch.from_numpy(rows).to(self.device)],
            queries=self.setting.queries,
            keys=(self.seed, step),
            weight=self.setting.decode,
            prior=prior,
        )


def distil_stage(kind: str) -> str:
    """Name of the stage that trains the student of a kind."""
    return "distil" if kind == "mlp" else f"distil-{kind}"


class Distil:
    """Stage 3: the student learns the teacher's vectors from RNA alone, and what it cannot see."""

    def __init__(self, view: View, vectors: TeacherVectors) -> None:
        self.view, self.vectors = view, vectors
        self.name = distil_stage(view.student.kind)
        self.epochs, self.asked = view.setting.epochs, view.setting.queries

    def trained(self) -> list[nn.Module]:
        return [*self.view.student.path(), *self.view.student.answers()]

    def needs(self) -> tuple[str, ...]:
        return ("rna",)

    reads = needs

    def losses(self, batch: Batch, step: int) -> dict[str, Loss]:
        view, setting = self.view, self.view.setting
        said = view(batch, step)
        embedding = said.embedding.float()
        joint, summaries = (part.to(view.device) for part in self.vectors.of(batch.rows))
        cells, width = embedding.shape
        found = {
            "joint": Loss((embedding - joint).square().sum() / width, cells, setting.joint),
            "relation": self._relation(embedding, joint),
        }
        has = present(batch, len(view.tokenizer.vocabularies))
        for i, name in enumerate(view.tokenizer.vocabularies):
            rows = np.flatnonzero(has[:, i])
            found[f"decode-{name}"] = view.decoding(name, batch, rows, embedding, step)
            if name != "rna":
                at = torch.from_numpy(rows).to(view.device)
                log_variance = said.log_variances[name][at].float()
                error = (said.summaries[name][at].float() - summaries[at, i]).square()
                likelihood = (error / log_variance.exp() + log_variance).sum() / (2 * width)
                found[f"impute-{name}"] = Loss(likelihood, len(rows), setting.impute)
        return found

    def _relation(self, embedding: Tensor, joint: Tensor) -> Loss:
        """Squared difference of the cosines between the cells of the global batch."""
        own, theirs = F.normalize(embedding, dim=1), F.normalize(joint, dim=1)
        all_own, _ = all_rows(own)
        all_theirs, _ = all_rows(theirs)
        difference = (own @ all_own.T - theirs @ all_theirs.T).square().sum() / len(all_own)
        return Loss(difference, len(own), self.view.setting.relation)


class Control:
    """The student's twin that never saw the teacher: same network, same batches, RNA alone.

    What the student gains over it is what the other modalities gave.
    """

    name = "control"

    def __init__(self, view: View) -> None:
        self.view = view
        self.epochs, self.asked = view.setting.epochs, view.setting.queries

    def trained(self) -> list[nn.Module]:
        return [*self.view.student.path(), self.view.student.decoder("rna")]

    def needs(self) -> tuple[str, ...]:
        return ("rna",)

    reads = needs

    def losses(self, batch: Batch, step: int) -> dict[str, Loss]:
        embedding = self.view(batch, step).embedding.float()
        rows = np.arange(len(batch.rows))
        return {"decode-rna": self.view.decoding("rna", batch, rows, embedding, step)}
