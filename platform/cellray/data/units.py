"""The units of an ingest, each a function of its inputs alone that leaves files behind.

Four kinds, in this order; a unit needs all of the kind before it:

* `read`: some rows of one file -> their counts by feature, and what quality control asks of each cell.
* `count`: what some of these units of one file read -> statistics of the features of cells that stay.
* `tokenize`: what one of them read -> tokens, one record batch for each shard of the store.
* `assemble`: one shard, out of what all pieces hold for it, its cells in their final order.

A file is read once, however many passes there are. A unit's files appear whole or not at all, the
one that says it is done comes last, and a unit that is done again writes the same bytes.
"""

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from fsspec.implementations.local import LocalFileSystem

from cellray.data import arrow, compiled, storage
from cellray.data.atlas import File
from cellray.data.features import Tally
from cellray.data.qc import Metrics, measure
from cellray.data.reading import open_source
from cellray.data.shards import ABOUT, cell_table, encode_shard, index_of
from cellray.data.texts import Texts
from cellray.data.tokens import Counts, Tokenizer, narrow

UNKNOWN = -1
"""Place of a cell that is not in the store."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the counts of some units are, and what their columns mean."""

    file: File
    columns: np.ndarray
    """Feature of each column of the file, -1 for none, int32 [columns]."""
    names: np.ndarray
    """Hash of the name of each feature, uint64 [features]."""
    mito: np.ndarray
    """Features of the mitochondrial genome, bool [features]."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows start … stop - 1 of an origin: what one task reads."""

    number: int
    origin: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Some:
    """Units of one origin that are counted together, and which of their cells. Arrays are [rows of them]."""

    number: int
    origin: int
    units: tuple[int, ...]
    assays: tuple[str, ...]
    group: np.ndarray
    """Which of `assays` each cell is of, -1 for a cell that does not stay, of a narrow signed type."""

    def __len__(self) -> int:
        return len(self.group)


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A unit's cells in the store. Arrays are [rows]."""

    number: int
    origin: int
    modality: str
    assays: Texts
    """Assay of each cell."""
    places: np.ndarray
    """Row of each cell in the order of the store, UNKNOWN for one that does not stay, int32 or int64."""

    def __len__(self) -> int:
        return len(self.places)


KINDS = {"label": "labels", "donor": "donors", "batch": "batches", "assay": "assays"}
"""What the report counts cells by, and the name it gives to that."""


def counts_path(parts: str, number: int) -> str:
    return storage.join(parts, f"counts-{number:06d}.arrow")


def metrics_path(parts: str, number: int) -> str:
    return storage.join(parts, f"metrics-{number:06d}.arrow")


def tally_path(parts: str, number: int) -> str:
    return storage.join(parts, f"tally-{number:06d}.arrow")


def piece_path(parts: str, number: int) -> str:
    return storage.join(parts, f"tokens-{number:06d}.arrow")


def shard_path(parts: str, number: int) -> str:
    return storage.join(parts, f"shard-{number:06d}.json")


def cells_path(parts: str) -> str:
    return storage.join(parts, "cells.arrow")


def read(rows: Rows, origin: Origin, parts: str) -> None:
    """The rows' counts in the features of the file, and the metrics of each cell."""
    file = origin.file
    with open_source(file.url, modality=file.modality, layer=file.layer, names=file.names) as source:
        raw = source.rows(rows.start, rows.stop)
    found = int(raw.data.sum(dtype=np.int64))
    indptr, ids, counts = compiled.projected(
        raw.indptr.astype(np.int64),
        raw.indices.astype(np.int32, copy=False),
        raw.data.astype(np.uint32, copy=False),
        origin.columns,
    )
    matrix = sp.csr_matrix((counts, ids, indptr), shape=(len(rows), len(origin.names)))
    cells = measure(matrix, origin.names, origin.mito)
    most = int(counts.max(initial=0))
    width = np.uint8 if most < 1 << 8 else np.uint16 if most < 1 << 16 else np.uint32
    offsets = pa.array(indptr.astype(np.int32))
    batch = pa.record_batch(
        {
            "ids": pa.ListArray.from_arrays(offsets, pa.array(ids.astype(narrow(len(origin.names))))),
            "counts": pa.ListArray.from_arrays(offsets, pa.array(counts.astype(width))),
        }
    )
    _save(counts_path(parts, rows.number), [batch], batch.schema)
    facts = {"counts_in": found, "unmapped": found - int(cells.counts.sum()), "most": most}
    metrics = pa.record_batch(vars(cells)).replace_schema_metadata({"facts": json.dumps(facts)})
    _save(metrics_path(parts, rows.number), [metrics], metrics.schema)


def measured(parts: str, numbers: Sequence[int]) -> tuple[Metrics, dict[str, int]]:
    """What `read` found in units `numbers`: metrics of their cells, one after the other, and facts."""
    tables, facts = [], {"counts_in": 0, "unmapped": 0, "most": 0}
    for table in every([metrics_path(parts, number) for number in numbers]):
        own = json.loads(table.schema.metadata[b"facts"])
        facts = {
            "counts_in": facts["counts_in"] + own["counts_in"],
            "unmapped": facts["unmapped"] + own["unmapped"],
            "most": max(facts["most"], own["most"]),
        }
        tables.append(table.replace_schema_metadata())
    whole = pa.concat_tables(tables)
    return Metrics(**{name: whole[name].to_numpy() for name in whole.column_names}), facts


def count(some: Some, origin: Origin, read_in: str, parts: str) -> None:
    """Statistics of the cells that stay."""
    shape = (len(some.assays), len(origin.names))
    sums, nonzero = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    first = 0
    for number in some.units:
        indptr, ids, counts = _counts(read_in, number)
        group = some.group[first : first + len(indptr) - 1]
        compiled.tally(indptr, ids, counts, group, sums, nonzero)
        first += len(group)
    cells = np.bincount(some.group[some.group >= 0], minlength=len(some.assays)).tolist()
    facts = {"assays": some.assays, "cells": cells}
    columns = [pa.array(row) for row in (*sums, *nonzero)]
    names = [f"{kind}.{i}" for kind in ("sums", "nonzero") for i in range(len(some.assays))]
    table = pa.table(columns, names=names).replace_schema_metadata({"facts": json.dumps(facts)})
    _save(tally_path(parts, some.number), table.to_batches(), table.schema)


def counted(parts: str, number: int, features: int) -> Tally:
    """What `count` found for `number`: statistics [features]."""
    table = _table(tally_path(parts, number))
    facts = json.loads(table.schema.metadata[b"facts"])
    found = Tally(features)
    for i, (assay, cells) in enumerate(zip(facts["assays"], facts["cells"], strict=True)):
        found.add(assay, table[f"sums.{i}"].to_numpy(), table[f"nonzero.{i}"].to_numpy(), cells)
    return found


def tokenize(
    rows: Placed,
    target: np.ndarray,
    tokenizer: Tokenizer,
    bounds: np.ndarray,
    width: str,
    read_in: str,
    parts: str,
) -> None:
    """The rows' tokens, a record batch a shard.

    `target` is the vocabulary index of each feature, -1 for none; `bounds` are the first places of
    the shards, and the end; `width` is the type of the counts.
    """
    offsets, ids, counts = _counts(read_in, rows.number)
    depth = compiled.sums(offsets, counts)
    kept = np.flatnonzero(rows.places != UNKNOWN)
    kept = kept[np.argsort(rows.places[kept])]
    weights, codes = tokenizer.weights(rows.modality, rows.assays[kept].tolist())
    indptr, ids, counts = compiled.ranked(offsets, ids, counts, weights, codes, rows=kept, target=target)
    some = np.diff(indptr) > 0
    places = rows.places[kept][some]
    cuts = pa.array(np.concatenate([[0], indptr[1:][some]]).astype(np.int32))
    whole = pa.record_batch(
        {
            "place": pa.array(places),
            "total": pa.array(depth[kept][some]),
            "ids": pa.ListArray.from_arrays(cuts, pa.array(ids)),
            "counts": pa.ListArray.from_arrays(cuts, pa.array(counts.astype(width, copy=False))),
        }
    )
    batches = [whole.slice(a, b - a) for a, b in itertools.pairwise(np.searchsorted(places, bounds))]
    _save(piece_path(parts, rows.number), batches, whole.schema)


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
        counts[modality] = _gather(pieces, first, size) if pieces else _nothing(size)
        present |= (counts[modality].lengths > 0).astype(np.uint32) << bit
    kept = np.flatnonzero(present)
    if len(kept) < size:
        counts = {name: c.take(kept) for name, c in counts.items()}
        cells, present = cells.take(pa.array(kept)), present[kept]
    groups = _holdings(cells, present, counts)
    entry: dict[str, Any] = {"rows": len(kept), "groups": groups}
    if len(kept):
        table = cell_table(
            tokenizer,
            cells["cell_id"],
            {name: cells[name].cast(pa.string()) for name in ABOUT},
            present,
            counts,
            digests=cells["digest"].to_numpy(),
        )
        about = {name: {"cells": own["cells"], "donors": own["donors"]} for name, own in groups.items()}
        data = encode_shard(table.replace_schema_metadata({"lineage": json.dumps(about, sort_keys=True)}))
        digest = storage.sha256(data)
        entry |= {"name": f"{shard:05d}-{digest}.arrow", "sha256": digest, "bytes": len(data)}
        entry["index"] = index_of(data)
        storage.write_bytes(storage.join(store, "shards", entry["name"]), data)
    storage.write_bytes(shard_path(parts, shard), json.dumps(entry, sort_keys=True).encode())


def _nothing(size: int) -> Counts:
    none = np.zeros(size + 1, np.int64)
    return Counts(none, np.empty(0, np.uint8), np.empty(0, np.uint8), none[1:])


def _gather(pieces: list[pa.RecordBatch], first: int, size: int) -> Counts:
    """Tokens of the `size` cells from place `first` on, out of pieces that hold some of them each."""
    lengths, total = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for piece in pieces:
        place = piece["place"].to_numpy() - first
        assert not lengths[place].any(), "a cell has a modality twice"
        lengths[place] = piece["ids"].value_lengths().to_numpy()
        total[place] = piece["total"].to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    found = []
    for name in ("ids", "counts"):
        out = np.empty(offsets[-1], pieces[0][name].type.value_type.to_pandas_dtype())
        for piece in pieces:
            own, values = _list(piece[name])
            compiled.placed(own, values, offsets[piece["place"].to_numpy() - first], out)
        found.append(out)
    return Counts(offsets, found[0], found[1], total)


def _holdings(cells: pa.RecordBatch, present: np.ndarray, counts: dict[str, Counts]) -> dict[str, Any]:
    """By data set: cells, labels, donors, assays, combinations of modalities, cells and counts of each."""
    dataset = np.asarray(cells["dataset"].to_pylist(), dtype=object)
    names = list(counts)
    sums = {name: compiled.sums(c.offsets, c.counts) for name, c in counts.items()}
    found = {}
    for group in sorted(set(dataset)):
        mine = np.flatnonzero(dataset == group)
        part = cells.take(pa.array(mine))
        bits = Counter(present[mine].tolist())
        found[group] = {
            "cells": len(mine),
            **{name: _counter(part[kind]) for kind, name in KINDS.items()},
            "present": {
                "+".join(n for i, n in enumerate(names) if int(b) >> i & 1): k for b, k in bits.items()
            },
            "modalities": {
                name: {
                    "cells": int((c.lengths[mine] > 0).sum()),
                    "counts": int(sums[name][mine].sum()),
                    "tokens": int(c.lengths[mine].sum()),
                }
                for name, c in counts.items()
            },
        }
    return found


def _counter(values: pa.Array) -> dict[str, int]:
    """How often each string is there."""
    return {str(entry["values"]): entry["counts"] for entry in values.value_counts().to_pylist()}


def write_cells(shards: pa.RecordBatchReader, parts: str) -> None:
    """What is known of every cell, in the order of the store, a record batch a shard."""
    _save(cells_path(parts), shards, shards.schema)


def _save(url: str, batches: list[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write a part: as it is on a local disk, which is quicker than to pack it, and packed for a network."""
    local = isinstance(storage.locate(url)[0], LocalFileSystem)
    storage.write_bytes(url, encode(batches, schema, packed=not local))


def encode(batches: list[pa.RecordBatch], schema: pa.Schema, *, packed: bool = True) -> bytes:
    """An Arrow file of `batches`, lz4 if `packed`. The same batches give the same bytes."""
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="lz4" if packed else None)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def _counts(parts: str, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, ids and counts that `read` left."""
    table = _table(counts_path(parts, number))
    offsets, ids = _list(table["ids"].combine_chunks())
    return offsets, ids, _list(table["counts"].combine_chunks())[1]


def _list(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and items of a list array."""
    offsets = column.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[:1], column.flatten().to_numpy()


def _table(url: str) -> pa.Table:
    return arrow.decode(storage.read_bytes(url))


def every(urls: Sequence[str]) -> Iterator[pa.Table]:
    """The Arrow files at `urls`, in order; of an object store several are fetched at a time."""
    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(_table, urls)


def _batch(url: str, number: int) -> pa.RecordBatch:
    """Record batch `number` of an Arrow file, reading no other."""
    with storage.open_blocks(url) as file:
        return pa.ipc.open_file(pa.PythonFile(file, mode="r")).get_batch(number)
