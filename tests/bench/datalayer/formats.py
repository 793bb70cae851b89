"""The cells of a token store in the formats of others: the same cells, tokens and order.

That order is shuffled already, which is what webdataset and Ray Data advise for files that are
then shuffled a buffer at a time.
"""

import io
import itertools
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellray.data.shards import codec
from cellray.data.store import Store
from tests.bench.datalayer.synthetic import source_rows

ROWS = 1_024
"""Cells written at a time."""
SHARDS = 8
"""Files of a format that wants several."""

SCHEMA = pa.schema([("row", pa.int64()), ("ids", pa.list_(pa.uint16())), ("counts", pa.list_(pa.uint16()))])
"""Source row of a cell, its genes in rank order, their counts."""


def batches(store: Store) -> Iterator[pa.RecordBatch]:
    """All cells in the order of the store, ROWS at a time."""
    rows = source_rows(store.cells["cell_id"].to_pylist())
    for first in range(0, len(store), ROWS):
        here = np.arange(first, min(first + ROWS, len(store)))
        counts = store.read(here).counts["rna"]
        assert counts.counts.max(initial=0) < 1 << 16
        offsets = pa.array(counts.offsets.astype(np.int32))
        lists = [
            pa.ListArray.from_arrays(offsets, pa.array(values.astype(np.uint16)))
            for values in (counts.ids, counts.counts)
        ]
        yield pa.record_batch([pa.array(rows[here]), *lists], schema=SCHEMA)


def raw(store: Store, folder: Path, *, codec: pa.Codec | None = None) -> None:
    """One Arrow IPC file, without compression by default."""
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_file(str(folder / "cells.arrow"), SCHEMA, options=options) as writer:
        for batch in batches(store):
            writer.write_batch(batch)


def packed(store: Store, folder: Path) -> None:
    """The same with the compression of our shards, and two bytes for each count."""
    raw(store, folder, codec=codec())


def huggingface(store: Store, folder: Path) -> None:
    """One Arrow IPC stream, as `datasets` memory-maps it."""
    with pa.ipc.new_stream(str(folder / "cells.arrow"), SCHEMA) as writer:
        for batch in batches(store):
            writer.write_batch(batch)


def shards(store: Store) -> Iterator[tuple[int, Iterator[pa.RecordBatch]]]:
    """First row and batches of each of SHARDS files of like size."""
    each = -(-len(store) // SHARDS // ROWS)
    numbered = enumerate(batches(store))
    for number, group in itertools.groupby(numbered, key=lambda item: item[0] // each):
        yield number * each * ROWS, (batch for _, batch in group)


def parquet(store: Store, folder: Path) -> None:
    """Parquet with list columns, snappy, which reads fastest."""
    for first, group in shards(store):
        with pq.ParquetWriter(folder / f"{first:09d}.parquet", SCHEMA, compression="snappy") as writer:
            for batch in group:
                writer.write_batch(batch)


def tars(store: Store, folder: Path) -> None:
    """Tar files, a member a cell: its genes, then their counts, uint16 each."""
    for first, group in shards(store):
        with tarfile.open(folder / f"{first:09d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for batch in group:
                offsets = batch["ids"].offsets.to_numpy()
                ids, counts = (batch[name].flatten().to_numpy() for name in ("ids", "counts"))
                for i, row in enumerate(batch["row"].to_pylist()):
                    own = slice(offsets[i], offsets[i + 1])
                    data = ids[own].tobytes() + counts[own].tobytes()
                    member = tarfile.TarInfo(f"{row:09d}.bin")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def made(folder: Path, write: Callable[[Path], object]) -> Path:
    """`folder`, filled by `write` unless it is there; it appears whole or not at all."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write(part)
        os.replace(part, folder)
    return folder
