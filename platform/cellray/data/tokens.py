"""The tokenizer: vocabularies, frozen statistics, and counts in rank order. Versioned and hashed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from cellray.data.modalities import Modality, scaled

VERSION = 2
POOLED = ""
"""The assay name under which the statistics of all assays together are kept."""


@dataclass(frozen=True)
class Counts:
    """Raw counts of some cells in one modality, without zeros. `Tokenizer.rank` puts them in rank order."""

    offsets: np.ndarray
    """int64 [cells + 1]; cell i owns `ids[offsets[i]:offsets[i + 1]]`."""
    ids: np.ndarray
    """Feature indices into the vocabulary, [tokens]."""
    counts: np.ndarray
    """Raw counts, [tokens]."""
    total: np.ndarray
    """int64 [cells]: depth over all features of the modality, those outside the vocabulary too."""

    def __len__(self) -> int:
        return len(self.total)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each cell, int64 [cells]."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "Counts":
        """The cells at `rows`, in that order."""
        offsets, index = gather(self.offsets, rows)
        return Counts(offsets, self.ids[index], self.counts[index], self.total[rows])

    def matrix(self, features: int) -> sp.csr_matrix:
        """Raw counts [cells, features], float32."""
        return sp.csr_matrix(
            (self.counts.astype(np.float32), self.ids.astype(np.int64), self.offsets),
            shape=(len(self), features),
        )


def gather(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the ragged rows `rows`, and the positions of all their items, in order."""
    lengths = offsets[rows + 1] - offsets[rows]
    picked = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=picked[1:])
    index = np.arange(picked[-1]) + np.repeat(offsets[rows] - picked[:-1], lengths)
    return picked, index


@dataclass(frozen=True)
class Vocabulary:
    """The features of one modality, in id order, with the statistics that were frozen with them."""

    modality: Modality
    ids: tuple[str, ...]
    symbols: tuple[str, ...]
    """A second name of each feature, "" where there is none."""
    sums: Mapping[str, np.ndarray] = field(repr=False)
    """Assay -> sum of counts of each feature, int64 [features]. POOLED is always there."""
    nonzero: Mapping[str, np.ndarray] = field(repr=False)
    """Assay -> cells in which each feature was counted, int64 [features]."""
    cells: Mapping[str, int] = field(repr=False)
    """Assay -> cells."""

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.symbols)
        assert all(len(v) == len(self.ids) for v in (*self.sums.values(), *self.nonzero.values()))

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def index(self) -> dict[str, int]:
        """Id, then unambiguous symbol -> feature index. Ids win over symbols."""
        found: dict[str, int] = {}
        twice: set[str] = set()
        for i, symbol in enumerate(self.symbols):
            if symbol:
                if symbol in found:
                    twice.add(symbol)
                found[symbol] = i
        for symbol in twice:
            del found[symbol]
        found.update({name: i for i, name in enumerate(self.ids)})
        return found

    def means(self, assay: str) -> np.ndarray:
        """Non-zero mean count of each feature under `assay`, float64 [features], never 0.

        Features that the assay never counted, and assays never seen, take the pooled mean; features
        that were counted nowhere take 1.
        """
        pooled = np.maximum(self.sums[POOLED], 1) / np.maximum(self.nonzero[POOLED], 1)
        if assay not in self.sums:
            return pooled
        own = self.sums[assay] / np.maximum(self.nonzero[assay], 1)
        return np.where(self.nonzero[assay] > 0, own, pooled)

    @property
    def log_depth(self) -> float:
        """log(1 + mean depth in the vocabulary)."""
        return float(np.log1p(self.sums[POOLED].sum() / max(self.cells[POOLED], 1)))

    @property
    def typical(self) -> float:
        """What a model reads for the mean non-zero count of a cell of mean depth: the unit of values."""
        total = max(int(self.sums[POOLED].sum()), 1)
        count = np.array([total / max(int(self.nonzero[POOLED].sum()), 1)])
        depth = np.array([total / max(self.cells[POOLED], 1)])
        return float(scaled(count, depth, self.modality.scale)[0])


@dataclass(frozen=True)
class Tokenizer:
    """Turns raw counts into rank-ordered tokens. The same object ingests, trains, scores and serves."""

    vocabularies: Mapping[str, Vocabulary]
    """Modality name -> vocabulary."""

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return tuple(v.modality for v in self.vocabularies.values())

    @cached_property
    def hash(self) -> str:
        """sha256 of everything that decides a token; different hashes must never meet."""
        digest = hashlib.sha256(f"cellray tokenizer {VERSION}\n".encode())
        for name, vocabulary in self.vocabularies.items():
            modality = asdict(vocabulary.modality)
            facts = {key: modality[key] for key in ("name", "features", "scale")}
            digest.update(json.dumps(facts, sort_keys=True).encode())
            digest.update("\n".join(vocabulary.ids).encode())
            for assay in sorted(vocabulary.sums):
                digest.update(f"{name}\t{assay}\t{vocabulary.cells[assay]}\n".encode())
                digest.update(vocabulary.sums[assay].astype("<i8").tobytes())
                digest.update(vocabulary.nonzero[assay].astype("<i8").tobytes())
        return digest.hexdigest()

    def rank(self, modality: str, counts: sp.csr_matrix, total: np.ndarray, assays: Sequence[str]) -> Counts:
        """Tokens of the cells of `counts` [cells, features of the vocabulary], raw counts.

        Within a cell, features come by falling count over the non-zero mean of the cell's
        assay, as float32 product of count and 1 / mean; ties keep id order. `assays` names the
        assay of each cell. A total-count factor cannot change a within-cell rank, so counts are
        ranked as they are.
        Source: Theodoris 2023, doi:10.1038/s41586-023-06139-9; means here, medians there.
        """
        from cellray.data import compiled  # numba, which only ingest needs

        counts = counts.tocsr()
        if not counts.has_canonical_format or not counts.data.all():
            counts = counts.astype(np.int64)
            counts.sum_duplicates()
            counts.eliminate_zeros()
        offsets, ids, data = compiled.ranked(
            counts.indptr.astype(np.int64),
            counts.indices,
            counts.data.astype(np.uint32),
            *self.weights(modality, assays),
        )
        return Counts(offsets, ids, data, np.asarray(total, np.int64))

    def weights(self, modality: str, assays: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """1 / non-zero mean, float32 [assays there are, features], and the row of it of each cell, int64."""
        names, codes = np.unique(np.asarray(assays, dtype=str), return_inverse=True)
        vocabulary = self.vocabularies[modality]
        means = [vocabulary.means(str(name)) for name in names] or [np.ones(len(vocabulary))]
        return (1 / np.stack(means)).astype(np.float32), codes.astype(np.int64)

    def to_arrow(self) -> pa.Table:
        """The tokenizer as one table; `from_arrow` reads it back, hash and all."""
        rows: dict[str, list[object]] = {k: [] for k in ("modality", "id", "symbol", "sums", "nonzero")}
        facts = []
        for name, vocabulary in self.vocabularies.items():
            assays = sorted(vocabulary.sums)
            rows["modality"] += [name] * len(vocabulary)
            rows["id"] += vocabulary.ids
            rows["symbol"] += vocabulary.symbols
            rows["sums"] += np.stack([vocabulary.sums[a] for a in assays], axis=1).tolist()
            rows["nonzero"] += np.stack([vocabulary.nonzero[a] for a in assays], axis=1).tolist()
            cells = {assay: int(vocabulary.cells[assay]) for assay in assays}
            facts.append({"modality": asdict(vocabulary.modality), "cells": cells})
        about = {"version": VERSION, "hash": self.hash, "vocabularies": facts}
        columns = [
            pa.array(rows["modality"], pa.string()),
            pa.array(rows["id"], pa.string()),
            pa.array(rows["symbol"], pa.string()),
            pa.array(rows["sums"], pa.list_(pa.int64())),
            pa.array(rows["nonzero"], pa.list_(pa.int64())),
        ]
        return pa.table(columns, names=list(rows)).replace_schema_metadata(
            {"cellray": json.dumps(about, sort_keys=True)}
        )

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "Tokenizer":
        """The tokenizer that `to_arrow` wrote. ValueError if the table is of another kind or changed."""
        meta = (table.schema.metadata or {}).get(b"cellray")
        if meta is None:
            raise ValueError("this Arrow file is no cellray vocabulary: its schema has no 'cellray' entry")
        about = json.loads(meta)
        if about["version"] != VERSION:
            raise ValueError(
                f"vocabulary of version {about['version']}, this cellray reads version {VERSION}: "
                "use the cellray release that wrote it, or ingest again"
            )
        vocabularies = {}
        names = np.asarray(table["modality"].to_pylist(), dtype=object)
        for fact in about["vocabularies"]:
            modality = Modality(**fact["modality"])
            part = table.filter(pa.array(names == modality.name))
            assays = sorted(fact["cells"])

            def by_assay(column: str, part: pa.Table = part, assays: list[str] = assays) -> dict:
                flat = part[column].combine_chunks().flatten().to_numpy().reshape(-1, len(assays))
                return {assay: flat[:, i].copy() for i, assay in enumerate(assays)}

            vocabularies[modality.name] = Vocabulary(
                modality,
                tuple(part["id"].to_pylist()),
                tuple(part["symbol"].to_pylist()),
                by_assay("sums"),
                by_assay("nonzero"),
                fact["cells"],
            )
        tokenizer = cls(vocabularies)
        if tokenizer.hash != about["hash"]:
            raise ValueError(
                f"the vocabulary's content has hash {tokenizer.hash[:12]}, its header says "
                f"{about['hash'][:12]}: the file was changed; fetch it again"
            )
        return tokenizer


def narrow(size: int) -> type[np.unsignedinteger]:
    """The narrowest unsigned integer that holds 0 … size - 1."""
    return np.uint8 if size <= 1 << 8 else np.uint16 if size <= 1 << 16 else np.uint32
