"""Cells in, embeddings out: the student with its tokenizer and heads. Needs no Ray.

A cell gets the same bits alone, in any batch and at any place in it, and in whatever order its
tokens come: they are put in one order, the network runs on one thread and in shapes that follow from
the cell alone (`Student.embed`), and what stands on the embeddings always on CHUNK cells, so every
sum is made in one order.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from cellray.data.counts import check_counts
from cellray.data.features import merge_columns
from cellray.data.modalities import normalise_names, scaled
from cellray.data.ranking import by_rank, pooled_weight
from cellray.data.tokens import Counts, Tokenizer, Vocabulary, narrow
from cellray.heads import Head, Reference, fit_head, fit_reference
from cellray.model.student import TOGETHER, Student

CHUNK = TOGETHER
"""Cells that are answered at a time, always."""
INPUT = "rna"
"""The modality a student reads."""
FEWEST = 5
"""Known genes a sender must name, at the least."""
OVERLAP = 0.1
"""Known genes a sender must name, as a share of the shorter of the two lists of genes."""

Answer = Callable[[Tensor], tuple[np.ndarray, ...]]
"""From embeddings [CHUNK, width] to arrays of CHUNK items each."""

_one_at_a_time = threading.Lock()


class UnknownGenes(ValueError):
    """Too few of the sender's genes are in the vocabulary."""


@dataclass(frozen=True)
class Match:
    """How well a sender's features fit the vocabulary."""

    sent: int
    """Features the sender named."""
    known: int
    """Those of them that the vocabulary has."""
    unknown: tuple[str, ...]
    """The first ten it has not."""
    genes: np.ndarray
    """Known features counted in each cell, int32 [cells]."""
    kept: np.ndarray
    """Share of each cell's counts on known features, float32 [cells]; 0 for an empty cell."""
    share: float
    """Share of all counts on known features."""

    def summary(self) -> dict[str, Any]:
        """The facts about all cells together, as plain JSON values."""
        return {
            "genes_sent": self.sent,
            "genes_known": self.known,
            "genes_unknown": self.sent - self.known,
            "first_unknown": list(self.unknown),
            "counts_kept": self.share,
        }


@dataclass(frozen=True)
class Embeddings:
    """Where cells lie."""

    vectors: np.ndarray
    """Joint embeddings, float32 [cells, width]."""
    ood: np.ndarray
    """Share of the training cells that are less unusual, float32 [cells]; 1 for cells without known genes."""


@dataclass(frozen=True)
class Annotations:
    """What cells are."""

    labels: np.ndarray
    """Most probable label, str [cells]; "" for a cell without known genes."""
    confidence: np.ndarray
    """Its probability, float32 [cells]."""
    probabilities: np.ndarray
    """Of every class of the model, float32 [cells, classes]."""
    ood: np.ndarray
    """As in `Embeddings`."""


@dataclass(frozen=True, eq=False)
class Embedder:
    """A student ready to answer, and frozen. `bundle.load` makes one of files, `bundle.write` the files."""

    student: Student
    tokenizer: Tokenizer
    reference: Reference
    head: Head | None = None
    """None where no labels were known in training."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What it was made from and how it scored, plain JSON values; see `bundle.card`."""
    hash: str = ""
    """sha256 of the bundle's manifest; "" before it is written."""

    def __post_init__(self) -> None:
        self.student.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Numbers in an embedding."""
        return self.reference.whiten.shape[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels it can give, in the order of `Annotations.probabilities`."""
        return self.head.classes if self.head else ()

    def embed(self, counts: Counts) -> Embeddings:
        """Embeddings of cells given by their RNA tokens."""
        vectors, ood = self._run(counts, lambda x: (x.numpy(), self.reference.score(x)))
        ood[counts.lengths == 0] = 1
        return Embeddings(vectors, ood)

    def annotate(self, counts: Counts) -> Annotations:
        """Labels of cells given by their RNA tokens. ValueError if the model was trained without labels."""
        if self.head is None:
            raise ValueError(
                "this model gives no labels: its training cells had none. Use `embed`, or export a model "
                "from an atlas that names a label column."
            )
        head = self.head
        probabilities, ood = self._run(
            counts, lambda x: (head.probabilities(x).float().numpy(), self.reference.score(x))
        )
        return _annotations(head, probabilities, ood, counts)

    def embed_and_annotate(self, counts: Counts) -> tuple[Embeddings, Annotations | None]:
        """What `embed` and `annotate` say, in one pass of the network; None if the model gives no labels."""
        if self.head is None:
            return self.embed(counts), None
        head = self.head
        vectors, probabilities, ood = self._run(
            counts, lambda x: (x.numpy(), head.probabilities(x).float().numpy(), self.reference.score(x))
        )
        said = _annotations(head, probabilities, ood, counts)
        return Embeddings(vectors, said.ood), said

    def translate(self, counts: Counts, modality: str) -> np.ndarray:
        """Every feature of `modality` as RNA tokens suggest it, float32 [cells, features].

        Expected counts, or for a Bernoulli modality the probability that the feature is counted,
        at the depth the model predicts for the cell.
        """
        if modality not in self.tokenizer.vocabularies:
            raise ValueError(f"this model knows {', '.join(self.tokenizer.vocabularies)}, not {modality!r}")
        bernoulli = self.tokenizer.vocabularies[modality].modality.likelihood == "bernoulli"

        def answer(x: Tensor) -> tuple[np.ndarray, ...]:
            said = self.student.decode(x, modality)
            return ((torch.sigmoid(said) if bernoulli else torch.exp(said.clamp(max=15))).numpy(),)

        return self._run(counts, answer)[0]

    @classmethod
    def fit(
        cls,
        student: Student,
        tokenizer: Tokenizer,
        counts: Counts,
        labels: Sequence[str] | np.ndarray,
        *,
        about: Mapping[str, Any],
    ) -> "Embedder":
        """A trained student with a label head and a reference, fitted on training cells.

        `counts` are their RNA tokens; `labels` [cells], "" where unknown. The same cells in the same
        order always give the same embedder.
        """
        student.eval()
        found = vectors(student, tokenizer, counts)
        return cls(student, tokenizer, fit_reference(found), fit_head(found, labels), about)

    def _run(self, counts: Counts, answer: Answer) -> list[np.ndarray]:
        return _run(self.student, self.tokenizer, counts, answer)


def vectors(student: Student, tokenizer: Tokenizer, counts: Counts) -> np.ndarray:
    """Embeddings float32 [cells, width] of cells given by their RNA tokens, for a student without heads.

    The same bits as `Embedder.embed`. The student is to be in eval mode.
    """
    return _run(student, tokenizer, counts, lambda x: (x.numpy(),))[0]


def _run(student: Student, tokenizer: Tokenizer, counts: Counts, answer: Answer) -> list[np.ndarray]:
    """What `answer` makes of the embeddings, [CHUNK, width] at a time, for all cells."""
    scale = tokenizer.vocabularies[INPUT].modality.scale
    weight = pooled_weight(tokenizer, INPUT) if student.ranked else None
    parts = []
    for first in range(0, max(len(counts), 1), CHUNK):
        part = _some(counts, first, first + CHUNK)
        part = _in_id_order(part) if weight is None else by_rank(part, weight)
        with _exact():
            whole = answer(_embed_chunk(student, part, scale))
        parts.append([array[: len(part)] for array in whole])
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def _annotations(head: Head, probabilities: np.ndarray, ood: np.ndarray, counts: Counts) -> Annotations:
    """The best class of each cell; none, and as unusual as can be, for a cell without tokens."""
    empty = counts.lengths == 0
    best = probabilities.argmax(axis=1)
    labels = np.where(empty, "", np.asarray(head.classes, dtype=str)[best])
    confidence = np.where(empty, np.float32(0), probabilities[np.arange(len(best)), best])
    return Annotations(labels, confidence, probabilities, np.where(empty, np.float32(1), ood))


def _some(counts: Counts, first: int, stop: int) -> Counts:
    """The cells from `first` up to `stop`, or to the last one. Copies nothing: `take` would."""
    offsets = counts.offsets[first : stop + 1]
    tokens = slice(offsets[0], offsets[-1])
    return Counts(offsets - offsets[0], counts.ids[tokens], counts.counts[tokens], counts.total[first:stop])


def _in_id_order(part: Counts) -> Counts:
    """The same cells, the tokens of each by rising id. A store has them by rank, a sender as it likes."""
    cells = np.repeat(np.arange(len(part), dtype=narrow(len(part))), part.lengths)
    if ((part.ids[1:] > part.ids[:-1]) | (cells[1:] > cells[:-1])).all():
        return part
    order = np.lexsort((part.ids, cells))
    return Counts(part.offsets, part.ids[order], part.counts[order], part.total)


def _embed_chunk(student: Student, part: Counts, scale: str) -> Tensor:
    """Embeddings of at most CHUNK cells, [CHUNK, width]: zeros for those missing."""
    embedding = student.embed(
        torch.from_numpy(part.ids.astype(np.int64)),
        torch.from_numpy(scaled(part.counts, np.repeat(part.total, part.lengths), scale)),
        torch.from_numpy(part.offsets[:-1].astype(np.int64)),
        torch.from_numpy(np.log1p(part.total).astype(np.float32)),
    )
    return F.pad(embedding, (0, 0, 0, CHUNK - len(part)))


def tokens_from(
    tokenizer: Tokenizer,
    matrix: sp.spmatrix | np.ndarray,
    names: Sequence[str],
    *,
    total: np.ndarray | None = None,
    where: str = "the counts",
) -> tuple[Counts, Match]:
    """RNA tokens, in id order, of the cells of `matrix` [cells, genes], and how well its genes fit.

    `matrix` holds raw counts. `names` are the genes, in any order: Ensembl ids (a version is
    ignored) or symbols; of genes that are named twice the counts are summed. `total` is each cell's
    depth over all genes, int64 [cells], where genes were left out of `matrix`.

    ValueError where `matrix` does not hold raw counts (`where` names it), UnknownGenes where fewer
    than FEWEST of the genes are known, or fewer than OVERLAP of the shorter of the two lists.
    """
    counts = sp.csr_matrix(matrix)
    if counts.shape[1] != len(names):
        raise ValueError(f"{where}: {counts.shape[1]:,} columns of counts, but {len(names):,} gene names")
    check_counts(counts.data, where)
    # Whole numbers as they stand: `astype` of the matrix would sort every row on the way.
    counts = sp.csr_matrix(
        (counts.data.astype(np.int64, copy=False), counts.indices, counts.indptr), counts.shape
    )
    vocabulary = tokenizer.vocabularies[INPUT]
    places = _places(names, vocabulary)
    known = int((places >= 0).sum())
    unknown = tuple(names[i] for i in np.flatnonzero(places < 0)[:10])
    if known < max(FEWEST, OVERLAP * min(len(names), len(vocabulary))):
        raise UnknownGenes(
            f"{where}: {known:,} of {len(names):,} genes are among the {len(vocabulary):,} this model knows, "
            f"too few for an answer. Unknown are {', '.join(unknown)}; the model's look like "
            f"{', '.join(vocabulary.ids[:3])}. Check the species, and which column holds the gene ids."
        )
    sums = _row_sums(counts)
    depth = sums if total is None else np.asarray(total, np.int64)
    if len(depth) != len(sums):
        raise ValueError(f"{where}: totals of {len(depth):,} cells, but counts of {len(sums):,}")
    if (short := np.flatnonzero(depth < sums)).size:
        cell = short[0]
        raise ValueError(
            f"{where}: the total of cell {cell} is {depth[cell]:,}, but its counts add up to {sums[cell]:,}"
        )
    inside = merge_columns(counts, places, len(vocabulary))
    check_counts(inside.data, where)
    kept = _row_sums(inside)
    tokens = Counts(
        inside.indptr.astype(np.int64),
        inside.indices.astype(narrow(len(vocabulary))),
        inside.data.astype(np.uint32),
        depth,
    )
    match = Match(
        sent=len(names),
        known=known,
        unknown=unknown,
        genes=tokens.lengths.astype(np.int32),
        kept=(kept / np.maximum(depth, 1)).astype(np.float32),
        share=float(kept.sum() / max(depth.sum(dtype=np.float64), 1.0)),
    )
    return tokens, match


def _places(names: Sequence[str], vocabulary: Vocabulary) -> np.ndarray:
    """Index of each name in the vocabulary, as it is or else in the usual spelling; -1 if unknown. int32."""
    index = vocabulary.index
    places = np.fromiter(map(index.get, names, repeat(-1)), np.int32, len(names))
    rest = np.flatnonzero(places < 0).tolist()
    spelt = normalise_names([names[i] for i in rest], vocabulary.modality.features)
    places[rest] = [index.get(name, -1) for name in spelt]
    return places


def _row_sums(counts: sp.csr_matrix) -> np.ndarray:
    """Sum of each row of int64 numbers, int64 [rows], exact."""
    sums: np.ndarray = counts.sum(axis=1).A1
    return sums


@contextmanager
def _exact() -> Iterator[None]:
    """Run torch on one thread without gradients; whoever else runs it waits. Threads are given back after."""
    with _one_at_a_time:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(threads)
