"""The units of an ingest, each a function of its inputs alone that leaves one file behind.

Three kinds, in this order; a unit needs all of the kind before it:

* `count`: some rows of one file -> statistics of its features, what was dropped.
* `tokenize`: the same rows -> their tokens, one record batch for each shard of the store.
* `assemble`: one shard, out of what all pieces hold for it, its cells in their final order.

A file appears whole or not at all, and a unit that is done again writes the same bytes.
"""

import io
import itertools
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from cellray.data import storage
from cellray.data.atlas import File
from cellray.data.features import Tally, merge_columns, tally
from cellray.data.reading import open_source
from cellray.data.store import ABOUT, cell_table, encode_shard
from cellray.data.tokens import Counts, Tokenizer

UNKNOWN = -1
"""Place of a cell that is not in the store."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the counts of some units are, and what their columns mean."""

    file: File
    columns: np.ndarray
    """Feature of each column of the file, int32 [columns]."""
    features: int
    """Features there are in the file."""
    min_features: int
    """Cells with fewer features lose this modality."""
    targets: np.ndarray
    """Vocabulary index of each feature, -1 for none, int32 [features]. Empty while counting."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A unit that reads: rows start … stop - 1 of an origin. Arrays are [rows]."""

    number: int
    origin: int
    start: int
    stop: int
    dropped: np.ndarray
    """Cells dropped for their label, bool."""
    assays: np.ndarray
    """Assay of each cell, str."""
    places: np.ndarray
    """Row of each cell in the order of the store, int64. Empty while counting."""


KINDS = {"label": "labels", "donor": "donors", "batch": "batches", "assay": "assays"}
"""What the report counts cells by, and the name it gives to that."""


def count_path(parts: str, number: int) -> str:
    return storage.join(parts, f"counts-{number:06d}.arrow")


def piece_path(parts: str, number: int) -> str:
    return storage.join(parts, f"tokens-{number:06d}.arrow")


def shard_path(parts: str, number: int) -> str:
    return storage.join(parts, f"shard-{number:06d}.json")


def cells_path(parts: str) -> str:
    return storage.join(parts, "cells.arrow")


def _read(rows: Rows, origin: Origin) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Counts [rows, features of the file], rows that stay, rows that have too few features."""
    file = origin.file
    with open_source(file.url, modality=file.modality, layer=file.layer, names=file.names) as source:
        counts = source.rows(rows.start, rows.stop)
    counts = merge_columns(counts, origin.columns, origin.features)
    few = ~rows.dropped & (np.diff(counts.indptr) < origin.min_features)
    return counts, ~rows.dropped & ~few, few


def count(rows: Rows, origin: Origin, parts: str) -> None:
    """Statistics of the rows that stay, and how many counts and cells do not."""
    counts, keep, few = _read(rows, origin)
    depth = np.asarray(counts.sum(1)).ravel()
    found = tally(counts[np.flatnonzero(keep)], rows.assays[keep])
    assays = sorted(found.sums)
    facts = {
        "counts_in": int(depth.sum()),
        "counts_dropped": {
            "label": int(depth[rows.dropped].sum()),
            "too_few_features": int(depth[few].sum()),
        },
        "cells_dropped": {"label": int(rows.dropped.sum()), "too_few_features": int(few.sum())},
        "cells": [found.cells[assay] for assay in assays],
        "assays": assays,
        "tokens": int(np.diff(counts.indptr)[keep].sum()),
    }
    columns = [pa.array(found.sums[assay]) for assay in assays]
    columns += [pa.array(found.nonzero[assay]) for assay in assays]
    names = [f"{kind}.{i}" for kind in ("sums", "nonzero") for i in range(len(assays))]
    table = pa.table(columns, names=names).replace_schema_metadata({"facts": json.dumps(facts)})
    storage.write_bytes(count_path(parts, rows.number), encode(table.to_batches(), table.schema))


def counted(parts: str, number: int, features: int) -> tuple[Tally, dict[str, Any]]:
    """What `count` found for unit `number`: statistics [features], and facts."""
    table = pa.ipc.open_file(storage.read_bytes(count_path(parts, number))).read_all()
    facts = json.loads(table.schema.metadata[b"facts"])
    found = Tally(features)
    for i, (assay, cells) in enumerate(zip(facts["assays"], facts["cells"], strict=True)):
        found.add(assay, table[f"sums.{i}"].to_numpy(), table[f"nonzero.{i}"].to_numpy(), cells)
    return found, facts


def tokenize(rows: Rows, origin: Origin, tokenizer: Tokenizer, bounds: np.ndarray, parts: str) -> None:
    """The rows' tokens, a record batch a shard; `bounds` are the first places of the shards, and the end."""
    counts, keep, _ = _read(rows, origin)
    modality = origin.file.modality
    vocabulary = tokenizer.vocabularies[modality]
    total = np.asarray(counts.sum(1)).ravel()
    known = merge_columns(counts, origin.targets, len(vocabulary))
    keep &= np.diff(known.indptr) > 0
    kept = np.flatnonzero(keep)
    kept = kept[np.argsort(rows.places[kept])]
    ranked = tokenizer.rank(modality, known[kept], total[kept], rows.assays[kept].tolist())
    offsets = pa.array(ranked.offsets.astype(np.int32))
    places = rows.places[kept]
    whole = pa.record_batch(
        {
            "place": pa.array(places),
            "total": pa.array(ranked.total),
            "ids": pa.ListArray.from_arrays(offsets, pa.array(ranked.ids)),
            "counts": pa.ListArray.from_arrays(offsets, pa.array(ranked.counts)),
        }
    )
    cuts = np.searchsorted(places, bounds)
    batches = [whole.slice(a, b - a) for a, b in itertools.pairwise(cuts)]
    storage.write_bytes(piece_path(parts, rows.number), encode(batches, whole.schema))


def assemble(
    shard: int,
    bounds: np.ndarray,
    sources: list[tuple[int, str]],
    tokenizer: Tokenizer,
    store: str,
    parts: str,
) -> None:
    """The shard, written under the name of its content, and what it holds by data set.

    `sources` are the number and modality of every piece. Cells without a token are left out.
    """
    cells = _batch(cells_path(parts), shard)
    first, size = int(bounds[shard]), cells.num_rows
    counts = {}
    present = np.zeros(size, np.uint32)
    for bit, modality in enumerate(tokenizer.vocabularies):
        pieces = [_batch(piece_path(parts, number), shard) for number, name in sources if name == modality]
        counts[modality] = _gather(pieces, first, size)
        present |= (counts[modality].lengths > 0).astype(np.uint32) << bit
    kept = np.flatnonzero(present)
    counts = {name: c.take(kept) for name, c in counts.items()}
    cells, present = cells.take(pa.array(kept)), present[kept]
    about = {name: cells[name] for name in ABOUT}
    entry: dict[str, Any] = {"rows": len(kept)}
    if len(kept):
        data = encode_shard(cell_table(tokenizer, cells["cell_id"], about, present, counts))
        digest = storage.sha256(data)
        entry |= {"name": f"{shard:05d}-{digest}.arrow", "sha256": digest, "bytes": len(data)}
        storage.write_bytes(storage.join(store, "shards", entry["name"]), data)
    entry["groups"] = _holdings(cells, present, counts)
    storage.write_bytes(shard_path(parts, shard), json.dumps(entry, sort_keys=True).encode())


def _gather(pieces: list[pa.RecordBatch], first: int, size: int) -> Counts:
    """Tokens of the `size` cells from place `first` on, out of pieces that hold some of them each."""
    table = pa.Table.from_batches(pieces).combine_chunks()
    places = table["place"].to_numpy() - first
    lengths = table["ids"].combine_chunks().value_lengths().to_numpy().astype(np.int64)
    assert len(np.unique(places)) == len(places), "a cell has a modality twice"
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = table["ids"].combine_chunks().flatten().to_numpy()
    data = table["counts"].combine_chunks().flatten().to_numpy()
    found = Counts(offsets, ids, data, table["total"].to_numpy())
    ordered = found.take(np.argsort(places))
    every = np.zeros(size + 1, np.int64)
    every[places + 1] = lengths
    total = np.zeros(size, np.int64)
    total[places] = found.total
    return Counts(np.cumsum(every), ordered.ids, ordered.counts, total)


def _holdings(cells: pa.RecordBatch, present: np.ndarray, counts: dict[str, Counts]) -> dict[str, Any]:
    """By data set: cells, labels, donors, assays, combinations of modalities, cells and counts of each."""
    dataset = np.asarray(cells["dataset"].to_pylist(), dtype=object)
    names = list(counts)
    sums = {
        name: np.add.reduceat(np.append(c.counts, 0).astype(np.int64), c.offsets[:-1]) * (c.lengths > 0)
        for name, c in counts.items()
    }
    found = {}
    for group in sorted(set(dataset)):
        mine = np.flatnonzero(dataset == group)
        part = cells.take(pa.array(mine))
        bits = Counter(present[mine].tolist())
        found[group] = {
            "cells": len(mine),
            **{name: Counter(part[kind].to_pylist()) for kind, name in KINDS.items()},
            "present": {
                "+".join(n for i, n in enumerate(names) if int(b) >> i & 1): k for b, k in bits.items()
            },
            "modalities": {
                name: {"cells": int((c.lengths[mine] > 0).sum()), "counts": int(sums[name][mine].sum())}
                for name, c in counts.items()
            },
        }
    return found


def write_cells(cells: pa.Table, bounds: np.ndarray, parts: str) -> None:
    """What is known of every cell, in the order of the store, a record batch a shard."""
    batch = cells.combine_chunks().to_batches()[0] if len(cells) else None
    batches = [batch.slice(a, b - a) for a, b in itertools.pairwise(bounds)] if batch else []
    storage.write_bytes(cells_path(parts), encode(batches, cells.schema))


def encode(batches: list[pa.RecordBatch], schema: pa.Schema) -> bytes:
    """An Arrow file of `batches`, lz4. The same batches give the same bytes."""
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def _batch(url: str, number: int) -> pa.RecordBatch:
    """Record batch `number` of an Arrow file, reading no other."""
    fs, path = storage.locate(url)
    with fs.open(path, "rb") as file:
        return pa.ipc.open_file(pa.PythonFile(file, mode="r")).get_batch(number)
