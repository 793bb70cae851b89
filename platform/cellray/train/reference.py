"""The stages of the published design that ours is compared with, and the chain of them.

    unimodal-rna    value classes that are withheld, of every gene as a token
    unimodal-atac   all peaks from some of the open ones
    joint           matched and mismatched pairs, and all features of both from the joint vector
    distil          an MLP from the RNA vector to the ATAC vector; nothing else is trained
    control         joint, for RNA alone: what the RNA encoder comes to when it never meets ATAC

Settings are those of `cellray.train.recipe`: `network` width, layers and heads, `student` for the MLP,
`unimodal` epochs, mask and zeros, `joint` epochs, mask and match, `distil` epochs, mask and joint. The
others mean nothing here. All genes of a cell are tokens, so `feed.cells` says how large a batch is.
See `cellray.model.reference` for what is known of the design and what is ours.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellray.data.store import Batch, Store
from cellray.data.tokens import Tokenizer
from cellray.model.encoder import Tokens
from cellray.model.reference import (
    CLASSES,
    FUSED,
    ReferenceStudent,
    ReferenceTeacher,
)
from cellray.train import recipe as settings
from cellray.train.batches import kept, plain_tokens, present
from cellray.train.feed import uniform
from cellray.train.stages import Loss, decoding, key_of
from cellray.train.targets import TeacherVectors
from cellray.train.workers import all_rows

if TYPE_CHECKING:
    from cellray.train.methods import Trained, Vectors
    from cellray.train.run import Run


class Reader:
    """The parts of a batch as the networks read them, and how well a vector explains its counts."""

    def __init__(self, tokenizer: Tokenizer, seed: int, device: str) -> None:
        self.tokenizer, self.seed, self.device = tokenizer, seed, device
        names = list(tokenizer.vocabularies)
        self.bits = {name: names.index(name) for name in FUSED}

    def has(self, batch: Batch) -> np.ndarray:
        """Which modalities each cell has, bool [cells, modalities of the store]."""
        return present(batch, len(self.tokenizer.vocabularies))

    def rows(self, batch: Batch, *names: str) -> np.ndarray:
        """Places of the cells that have all of `names`."""
        return np.flatnonzero(self.has(batch)[:, [self.bits[name] for name in names]].all(axis=1))

    def tokens(self, name: str, batch: Batch, mask: float | np.ndarray, step: int) -> Tokens:
        """What is left of a modality when a share of what is counted is dropped. Ours: the published
        design is not known to drop any, but small data are soon learnt by heart."""
        counts = batch.counts[name]
        keep = kept(counts, batch.rows, mask, self.seed, step, self.bits[name])
        modality = self.tokenizer.vocabularies[name].modality
        return plain_tokens(counts, modality, keep=keep, device=self.device)

    def decoding(
        self,
        model: ReferenceTeacher | ReferenceStudent,
        name: str,
        batch: Batch,
        rows: np.ndarray,
        cell: Tensor,
        step: int,
    ) -> Loss:
        """Of every feature of a modality, from `cell` [rows, width]."""
        vocabulary, counts = self.tokenizer.vocabularies[name], batch.counts[name].take(rows)
        keys = (self.seed, step)
        return decoding(model.decoder(name), vocabulary, counts, cell, queries=len(vocabulary), keys=keys)


class Values:
    """Stage 1 of RNA: the classes of genes that are withheld, counted ones and others.

    Ours: of the genes that are not counted, a number is withheld that is `zeros` of those that are, so
    that neither a withheld class nor its frequency says that a gene is counted.
    """

    name = "unimodal-rna"

    def __init__(self, setting: settings.Unimodal, teacher: ReferenceTeacher, reader: Reader) -> None:
        self.setting, self.teacher, self.reader = setting, teacher, reader
        self.epochs, self.asked = setting.epochs, 0

    def trained(self) -> list[nn.Module]:
        return [self.teacher.genes.states, self.teacher.guess]

    def needs(self) -> tuple[str, ...]:
        return ("rna",)

    reads = needs

    def losses(self, batch: Batch, step: int) -> dict[str, Loss]:
        reader, states = self.reader, self.teacher.genes.states
        rna = reader.tokens("rna", batch, 0.0, step)
        truth = self.teacher.genes.classes(rna.ids, rna.values, rna.offsets[:-1])
        hidden = torch.from_numpy(self.withheld(truth.cpu().numpy() > 0, batch.rows, step)).to(truth.device)
        shown = truth.masked_fill(hidden, CLASSES)
        parts = zip(states.groups(shown), states.groups(hidden), strict=True)
        guessed = self.teacher.guess(torch.cat([states(classes)[asked] for classes, asked in parts]))
        wrong = F.cross_entropy(guessed.float(), truth[hidden], reduction="sum")
        return {"class": Loss(wrong, float(len(guessed)))}

    def withheld(self, counted: np.ndarray, rows: np.ndarray, step: int) -> np.ndarray:
        """Genes whose class is withheld, bool [cells, genes], by the cell and the gene alone."""
        keys, (low, high) = (self.reader.seed, step), self.setting.mask
        share = low + (high - low) * uniform(*keys, rows, 0)
        number = counted.sum(axis=1)
        others = self.setting.zeros * number / np.maximum(counted.shape[1] - number, 1)
        drawn = uniform(*keys, rows[:, None], np.arange(counted.shape[1]), 1)
        return drawn < np.where(counted, share[:, None], others[:, None])


class Peaks:
    """Stage 1 of ATAC: all peaks from a part of the open ones, by a linear decoder."""

    name = "unimodal-atac"

    def __init__(self, setting: settings.Unimodal, teacher: ReferenceTeacher, reader: Reader) -> None:
        self.setting, self.teacher, self.reader = setting, teacher, reader
        self.epochs, self.asked = setting.epochs, 0

    def trained(self) -> list[nn.Module]:
        return [self.teacher.peaks, self.teacher.decoder("atac")]

    def needs(self) -> tuple[str, ...]:
        return ("atac",)

    reads = needs

    def losses(self, batch: Batch, step: int) -> dict[str, Loss]:
        reader, (low, high) = self.reader, self.setting.mask
        share = low + (high - low) * uniform(reader.seed, step, batch.rows, 0)
        atac = reader.tokens("atac", batch, share, step)
        vectors, every = self.teacher.peaks(atac.ids, atac.offsets[:-1]), np.arange(len(batch.rows))
        return {"reconstruction": reader.decoding(self.teacher, "atac", batch, every, vectors, step)}


class Pairs:
    """Stage 2: one vector of both, which tells pairs from non-pairs and says every feature.

    A non-pair is the RNA of a cell and the ATAC of another one of the batch, of another label: the design
    needs labels. Cells without a label, or whose label is that of the whole batch, make neither pair nor
    non-pair. Cells of one modality are decoded from their half of the joint vector.
    """

    name = "joint"

    def __init__(
        self, setting: settings.Joint, teacher: ReferenceTeacher, reader: Reader, labels: np.ndarray
    ) -> None:
        """`labels`: a number for the label of each cell of the store, -1 where there is none."""
        self.setting, self.teacher, self.reader, self.labels = setting, teacher, reader, labels
        self.epochs, self.asked = setting.epochs, 0

    def trained(self) -> list[nn.Module]:
        t = self.teacher
        return [
            t.genes,
            t.peaks,
            t.joined,
            t.matched,
            *(t.decoder(name) for name in FUSED),
        ]

    def needs(self) -> tuple[str, ...]:
        return FUSED

    reads = needs

    def losses(self, batch: Batch, step: int) -> dict[str, Loss]:
        reader, teacher = self.reader, self.teacher
        has = torch.from_numpy(reader.has(batch)).to(reader.device)
        tokens = {name: reader.tokens(name, batch, self.setting.mask, step) for name in FUSED}
        summaries = teacher.summaries(tokens, has)
        cell = teacher.fused(summaries, has)
        found = {}
        for name in FUSED:
            rows = reader.rows(batch, name)
            mine = cell[torch.from_numpy(rows).to(reader.device)]
            found[name] = reader.decoding(teacher, name, batch, rows, mine, step)
        both = reader.rows(batch, *FUSED)
        at = torch.from_numpy(both).to(reader.device)
        found["match"] = self._match(cell[at], summaries[at], batch.rows[both], step)
        return found

    def _match(self, cell: Tensor, summaries: Tensor, rows: np.ndarray, step: int) -> Loss:
        """Whether a joint vector is of a pair: `cell` is, and those of mismatched `summaries` are not."""
        rna, atac = self.teacher.columns
        others, _ = all_rows(torch.from_numpy(rows).to(cell.device))
        vectors, _ = all_rows(summaries[:, atac])
        places, partners = self.mismatched(rows, others.cpu().numpy(), step)
        own, other = (torch.from_numpy(part).to(cell.device) for part in (places, partners))
        pair = torch.stack([summaries[own, rna], vectors[other]], dim=1)
        wrong = self.teacher.joined(pair, torch.ones_like(pair[..., 0], dtype=torch.bool))
        said = self.teacher.matched(torch.cat([cell[own], wrong])).squeeze(1).float()
        truth = torch.cat([torch.ones(len(own)), torch.zeros(len(own))]).to(said.device)
        error = F.binary_cross_entropy_with_logits(said, truth, reduction="sum")
        return Loss(error, 2.0 * len(own), self.setting.match)

    def mismatched(self, rows: np.ndarray, others: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place in `rows` that has one, a place in `others` of a cell with another label."""
        own, theirs = self.labels[rows][:, None], self.labels[others]
        wrong = (own != theirs) & (own >= 0) & (theirs >= 0)
        drawn = np.where(wrong, uniform(self.reader.seed, step, rows[:, None], others), -1.0)
        places = np.flatnonzero(wrong.any(axis=1))
        return places, drawn[places].argmax(axis=1) if len(places) else places


class Impute:
    """Stage 3: the MLP learns the ATAC vector of a cell from its RNA vector. The rest is frozen.

    Both were computed once, with the teacher. Ours: a share of the numbers of the RNA vector is dropped.
    """

    name = "distil"

    def __init__(
        self, setting: settings.Distil, student: ReferenceStudent, vectors: TeacherVectors, reader: Reader
    ) -> None:
        self.setting, self.student, self.vectors, self.reader = setting, student, vectors, reader
        self.epochs, self.asked = setting.epochs, 0

    def trained(self) -> list[nn.Module]:
        return [self.student.predict]

    def needs(self) -> tuple[str, ...]:
        return ("atac",)

    reads = needs

    def losses(self, batch: Batch, step: int) -> dict[str, Loss]:
        reader, mask = self.reader, self.setting.mask
        rows = batch.rows[reader.rows(batch, *FUSED)]
        _, summaries = self.vectors.of(rows)
        rna, atac = (summaries[:, reader.bits[name]].to(reader.device) for name in FUSED)
        cells, width = rna.shape
        keep = uniform(reader.seed, step, rows[:, None], np.arange(width)) >= mask
        shown = rna * torch.from_numpy(keep.astype(np.float32) / (1 - mask)).to(reader.device)
        error = (self.student.predict(shown).float() - atac).square().sum() / width
        return {"impute-atac": Loss(error, cells, self.setting.joint)}


class Alone:
    """The student's twin that never met ATAC: stage 2 with the terms of RNA alone, as long as stage 2."""

    name = "control"

    def __init__(self, setting: settings.Joint, student: ReferenceStudent, reader: Reader) -> None:
        self.setting, self.student, self.reader = setting, student, reader
        self.epochs, self.asked = setting.epochs, 0

    def trained(self) -> list[nn.Module]:
        return [self.student.genes, self.student.joined, self.student.decoder("rna")]

    def needs(self) -> tuple[str, ...]:
        return ("rna",)

    reads = needs

    def losses(self, batch: Batch, step: int) -> dict[str, Loss]:
        rna = self.reader.tokens("rna", batch, self.setting.mask, step)
        cell = self.student(rna.ids, rna.values, rna.offsets[:-1], rna.depth).embedding
        every = np.arange(len(batch.rows))
        return {"rna": self.reader.decoding(self.student, "rna", batch, every, cell, step)}


def teacher(run: "Run") -> ReferenceTeacher:
    """The teacher before training: the same numbers for the same recipe and store."""
    n, vocabularies = run.recipe.network, run.tokenizer.vocabularies
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(run.recipe.seed)
        made = ReferenceTeacher(
            {name: (v.modality, len(v)) for name, v in vocabularies.items()},
            width=n.width,
            layers=n.layers,
            heads=n.heads,
        )
    made.start(vocabularies)
    return made


def student(run: "Run") -> ReferenceStudent:
    """The student before training: the same numbers for the same recipe and store."""
    n, s, vocabularies = run.recipe.network, run.recipe.student, run.tokenizer.vocabularies
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(run.recipe.seed + 1)
        made = ReferenceStudent(
            {name: (v.modality, len(v)) for name, v in vocabularies.items()},
            width=n.width,
            layers=n.layers,
            heads=n.heads,
            hidden=s.hidden,
            blocks=s.blocks,
        )
    made.start(vocabularies)
    return made


def shapes(recipe: settings.Recipe) -> list[tuple[str, tuple[str, ...], float]]:
    """Every stage in order: its name, what it reads, its epochs."""
    first, joint = recipe.unimodal.epochs, recipe.joint.epochs
    return [
        (Values.name, ("rna",), first),
        (Peaks.name, ("atac",), first),
        (Pairs.name, FUSED, joint),
        (Impute.name, ("atac",), recipe.distil.epochs),
        (Alone.name, ("rna",), joint),
    ]


def check(run: "Run") -> None:
    """ValueError as `label_codes`."""
    label_codes(run.store)


def chain(run: "Run", device: str, trained: "Trained", vectors: "Vectors") -> None:
    """Every stage the recipe asks for, in order."""
    recipe = run.recipe
    own, control = teacher(run).to(device), student(run).to(device)

    def reader(name: str) -> Reader:
        return Reader(run.tokenizer, key_of(recipe.seed, name), device)

    labels = label_codes(run.store)
    origin = trained(Values(recipe.unimodal, own, reader(Values.name)), own, run.store.hash)
    control.alone(own)
    before = origin
    origin = trained(Peaks(recipe.unimodal, own, reader(Peaks.name)), own, origin)
    if recipe.stages == ("unimodal",):
        return
    origin = trained(Pairs(recipe.joint, own, reader(Pairs.name), labels), own, origin)
    if "distil" not in recipe.stages:
        return
    found, pupil = vectors(own, origin), student(run).to(device)
    pupil.follow(own, [*(found.centres[i] for i in own.columns), (found.mean, found.spread)])
    trained(Impute(recipe.distil, pupil, found, reader(Impute.name)), pupil, origin)
    trained(Alone(recipe.joint, control, reader(Alone.name)), control, before)


def label_codes(store: Store) -> np.ndarray:
    """A number for the label of each cell, int64 [cells]; -1 where there is none.

    ValueError where the cells with both modalities do not have two labels at the least.
    """
    text = store.cells["label"].to_numpy(zero_copy_only=False).astype(str)
    names, codes = np.unique(text, return_inverse=True)
    codes = np.where(text == "", -1, codes.reshape(-1)).astype(np.int64)
    mask = sum(1 << store.names.index(name) for name in FUSED)
    known = codes[(store.cells["present"].to_numpy() & mask == mask) & (codes >= 0)]
    if len(np.unique(known)) < 2:
        raise ValueError(
            f"method=reference tells pairs of RNA and ATAC from mismatched ones by their labels, and the "
            f"{len(known):,} labelled cells of {store.url} that have both have "
            f"{', '.join(names[np.unique(known)]) or 'none'}: name a label column with two labels or more"
        )
    return codes
