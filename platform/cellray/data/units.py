"""The units of an ingest, each a function of its inputs alone that leaves files behind.

Three kinds, in this order; a unit needs all of the kind before it, the last is in `assembly`:

* `read`: some rows of one file -> their counts by feature, and what quality control asks of each cell.
* `count`: what some of these units of one file read -> statistics of the features of cells that stay.
* `assemble`: one shard, out of what was read of its cells: their tokens, ranked, in their final order.

`read` leaves its cells in the order that they will have in the store, before anybody knows which of them
stay and how many shards there are: those of one shard are neighbours, so that `assemble` reads no others.
A file is read once, however many passes there are. A unit's files appear whole or not at all, the
one that says it is done comes last, and a unit that is done again writes the same bytes.
"""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from cellray.data import arrow, compiled, pieces, storage
from cellray.data.atlas import File
from cellray.data.features import Tally
from cellray.data.qc import Metrics
from cellray.data.reading import open_source

UNKNOWN = -1
"""Unit of a cell that was read by none, or is not to be in the store."""


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
    together: int
    """Rows to read at a time."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows start … stop - 1 of an origin: what one task reads."""

    number: int
    origin: int
    start: int
    stop: int
    order: np.ndarray
    """These rows, counted from `start`, in the order of the store, int [rows]."""

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
    """Which of `assays` each cell is of, -1 for a cell that does not stay, of a narrow signed type. The
    cells of each unit in the order that they were left in."""

    def __len__(self) -> int:
        return len(self.group)


def counts_path(parts: str, number: int) -> str:
    return storage.join(parts, f"counts-{number:06d}.bin")


def metrics_path(parts: str, number: int) -> str:
    return storage.join(parts, f"metrics-{number:06d}.arrow")


def tally_path(parts: str, number: int) -> str:
    return storage.join(parts, f"tally-{number:06d}.arrow")


def shard_path(parts: str, number: int) -> str:
    return storage.join(parts, f"shard-{number:06d}.json")


def cells_path(parts: str, number: int) -> str:
    return storage.join(parts, f"cells-{number:06d}.arrow")


def read(rows: Rows, origin: Origin, parts: str) -> None:
    """The rows' counts in the features of the file, and the metrics of each cell."""
    file, found, total = origin.file, [], 0
    with open_source(file.url, modality=file.modality, layer=file.layer, names=file.names) as source:
        step = source.step(origin.together)
        for start in range(rows.start, rows.stop, step):
            raw = source.rows(start, min(start + step, rows.stop))
            total += int(raw.data.sum(dtype=np.int64))
            found.append(
                compiled.measured(
                    raw.indptr.astype(np.int64, copy=False),
                    raw.indices.astype(np.int32, copy=False),
                    raw.data.astype(np.uint32, copy=False),
                    origin.columns,
                    origin.names,
                    origin.mito,
                )
            )
    lengths = np.concatenate([np.diff(offsets) for offsets, _, _, _ in found])
    cells = Metrics.joined(metrics for _, _, _, metrics in found)
    offsets, ids, counts = compiled.taken(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([ids for _, ids, _, _ in found]),
        np.concatenate([counts for _, _, counts, _ in found]),
        rows.order,
    )
    storage.write_bytes(counts_path(parts, rows.number), pieces.encode(offsets, ids, counts))
    facts = {
        "counts_in": total,
        "unmapped": total - int(cells.counts.sum()),
        "most": int(counts.max(initial=0)),
    }
    table = pa.record_batch(vars(cells)).replace_schema_metadata({"facts": json.dumps(facts)})
    _save(metrics_path(parts, rows.number), [table], table.schema)


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
        offsets, ids, counts = pieces.decode(storage.read_bytes(counts_path(read_in, number)))
        group = some.group[first : first + len(offsets) - 1]
        compiled.tally(offsets, ids, counts, group, sums, nonzero)
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


def write_cells(shards: Iterable[pa.RecordBatch], parts: str) -> None:
    """What is known of every cell, a file a shard."""
    for number, batch in enumerate(shards):
        _save(cells_path(parts, number), [batch], batch.schema)


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


def _table(url: str) -> pa.Table:
    return arrow.decode(storage.read_bytes(url))


def every(urls: Sequence[str]) -> Iterator[pa.Table]:
    """The Arrow files at `urls`, in order; of an object store several are fetched at a time."""
    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(_table, urls)
