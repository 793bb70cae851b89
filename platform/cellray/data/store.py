"""The token store: shuffled Arrow IPC shards, a vocabulary, and a manifest that is written last.

STORE/store.json                     the manifest; a folder without it is no store
STORE/vocabulary-<sha256>.arrow      the tokenizer
STORE/shards/<number>-<sha256>.arrow one row is one cell, zstd, record batches of BATCH cells
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pyarrow as pa

from cellray.data import storage
from cellray.data.modalities import Modality
from cellray.data.tokens import Counts, Tokenizer, narrow

VERSION = 1
BATCH = 1024
"""Cells in one record batch of a shard."""
ABOUT = ("dataset", "donor", "batch", "assay", "species", "tissue", "label")
"""What is known of a cell, "" where it is not. Dictionary-coded strings in a shard."""


def schema(modalities: Sequence[Modality], sizes: dict[str, int]) -> pa.Schema:
    """The columns of a shard. `sizes` holds the number of features of each modality."""
    fields = [pa.field("cell_id", pa.string())]
    fields += [pa.field(name, pa.dictionary(pa.int32(), pa.string())) for name in ABOUT]
    fields.append(pa.field("present", pa.uint32()))
    for m in modalities:
        ids = pa.from_numpy_dtype(np.dtype(narrow(sizes[m.name])))
        fields += [
            pa.field(f"{m.name}.ids", pa.list_(ids)),
            pa.field(f"{m.name}.counts", pa.list_(pa.uint32())),
            pa.field(f"{m.name}.total", pa.int64()),
            pa.field(f"{m.name}.length", pa.int32()),
        ]
    return pa.schema(fields)


def cell_table(
    tokenizer: Tokenizer,
    cell_ids: Sequence[str],
    about: Mapping[str, Sequence[str]],
    present: np.ndarray,
    counts: dict[str, Counts],
) -> pa.Table:
    """Rows of a shard. `present` is a bitmask [cells], bit i for the i-th modality of the tokenizer.

    A cell that lacks a modality has no tokens and depth 0 in it.
    """
    sizes = {name: len(v) for name, v in tokenizer.vocabularies.items()}
    form = schema(tokenizer.modalities, sizes)
    columns: list[pa.Array] = [pa.array(cell_ids, pa.string())]
    columns += [pa.array(about[name], pa.string()).dictionary_encode() for name in ABOUT]
    columns.append(pa.array(present.astype(np.uint32)))
    for name in tokenizer.vocabularies:
        c = counts[name]
        offsets = pa.array(c.offsets.astype(np.int32))
        columns += [
            pa.ListArray.from_arrays(offsets, pa.array(c.ids, form.field(f"{name}.ids").type.value_type)),
            pa.ListArray.from_arrays(offsets, pa.array(c.counts.astype(np.uint32))),
            pa.array(c.total.astype(np.int64)),
            pa.array(c.lengths.astype(np.int32)),
        ]
    return pa.Table.from_arrays(columns, schema=form)


def encode_shard(table: pa.Table) -> bytes:
    """`table` as an Arrow IPC file: zstd, record batches of BATCH rows. The same rows give the same bytes."""
    table = table.combine_chunks().unify_dictionaries()
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=3))
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=BATCH)
    return sink.getvalue()


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard as the manifest lists it."""

    name: str
    sha256: str
    bytes: int
    rows: int


@dataclass(frozen=True)
class Batch:
    """Some cells of the store, decoded."""

    rows: np.ndarray
    """Their rows in store order, int64 [cells]."""
    counts: dict[str, Counts]
    """Modality name -> tokens. Cells without the modality have none."""
    present: np.ndarray
    """Bitmask of modalities, uint32 [cells]."""

    def take(self, picked: np.ndarray) -> "Batch":
        counts = {name: c.take(picked) for name, c in self.counts.items()}
        return Batch(self.rows[picked], counts, self.present[picked])


class Store:
    """A committed store, read. Raises ValueError, naming the file, where it is not whole."""

    def __init__(self, url: str) -> None:
        self.url = url
        path = storage.join(url, "store.json")
        try:
            raw = storage.read_bytes(path)
        except FileNotFoundError:
            raise ValueError(
                f"no store at {url}: {path} does not exist. Ingest did not run or did not finish; "
                "run `python -m pipelines.ingest` again, it goes on where it stopped."
            ) from None
        self.manifest = json.loads(raw)
        if self.manifest.get("version") != VERSION:
            raise ValueError(
                f"{path} has version {self.manifest.get('version')!r}, this cellray reads {VERSION}"
            )
        self.hash = storage.sha256(raw)
        self.shards = [Shard(**entry) for entry in self.manifest["shards"]]

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        data = self._verified(self.manifest["vocabulary"]["name"], self.manifest["vocabulary"]["sha256"])
        return Tokenizer.from_arrow(pa.ipc.open_file(io.BytesIO(data)).read_all())

    @cached_property
    def cells(self) -> pa.Table:
        """What is known of every cell, in store order: all columns but the tokens."""
        wanted = ["cell_id", *ABOUT, "present"]
        for name in self.tokenizer.vocabularies:
            wanted += [f"{name}.total", f"{name}.length"]
        tables = []
        for i in range(len(self.shards)):
            fields = self._reader(i).schema
            options = pa.ipc.IpcReadOptions(included_fields=[fields.get_field_index(w) for w in wanted])
            table = pa.ipc.open_file(pa.BufferReader(self._shard_bytes(i)), options=options).read_all()
            plain = [table[w].cast(pa.string()) if w in ABOUT else table[w] for w in wanted]
            tables.append(pa.table(plain, names=wanted))
        return pa.concat_tables(tables).combine_chunks()

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of every record batch, and the number of rows at the end, int64 [batches + 1]."""
        sizes = [
            min(BATCH, shard.rows - first) for shard in self.shards for first in range(0, shard.rows, BATCH)
        ]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """Shard and number within it of every record batch."""
        return [
            (i, first // BATCH)
            for i, shard in enumerate(self.shards)
            for first in range(0, shard.rows, BATCH)
        ]

    def batch(self, number: int) -> Batch:
        """Record batch `number`, decoded."""
        shard, within = self._places[number]
        record = self._reader(shard).get_batch(within)
        counts = {}
        for name in self.tokenizer.vocabularies:
            ids, data = record[f"{name}.ids"], record[f"{name}.counts"]
            offsets = ids.offsets.to_numpy().astype(np.int64)
            counts[name] = Counts(
                offsets - offsets[0],
                ids.flatten().to_numpy(),
                data.flatten().to_numpy(),
                record[f"{name}.total"].to_numpy(),
            )
        first = self.starts[number]
        rows = np.arange(first, first + record.num_rows)
        return Batch(rows, counts, record["present"].to_numpy())

    def read(self, rows: np.ndarray, decode: Callable[[np.ndarray], list[Batch]] | None = None) -> Batch:
        """The cells at `rows` (store order), in that order. Decodes only the record batches they lie in.

        `decode` gives record batches by number, for a caller that keeps some at hand.
        """
        rows = np.asarray(rows, np.int64)
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        needed, inverse = np.unique(numbers, return_inverse=True)
        batches = decode(needed) if decode else [self.batch(int(n)) for n in needed]
        if not batches:
            return self.batch(0).take(rows)
        firsts = np.concatenate([[0], np.cumsum([len(b.rows) for b in batches])])[:-1]
        return concatenate(batches).take(firsts[inverse] + rows - self.starts[numbers])

    def _reader(self, shard: int) -> pa.ipc.RecordBatchFileReader:
        return pa.ipc.open_file(pa.BufferReader(self._shard_bytes(shard)))

    @cached_property
    def _shard_bytes(self):  # type: ignore[no-untyped-def]
        @lru_cache(maxsize=8)
        def fetch(shard: int) -> bytes:
            entry = self.shards[shard]
            return self._verified(storage.join("shards", entry.name), entry.sha256)

        return fetch

    def _verified(self, name: str, sha256: str) -> bytes:
        path = storage.join(self.url, name)
        try:
            data = storage.read_bytes(path)
        except FileNotFoundError:
            raise ValueError(
                f"{path} is listed in {self.url}/store.json but does not exist: the store was damaged "
                "after it was written. Restore the file or ingest into a new folder."
            ) from None
        found = storage.sha256(data)
        if found != sha256:
            raise ValueError(
                f"{path} has sha256 {found[:16]}…, the manifest says {sha256[:16]}…: the file was "
                "changed or is incomplete. Restore it or ingest into a new folder."
            )
        return data


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Several batches as one, in order."""
    counts = {}
    for name in batches[0].counts:
        parts = [b.counts[name] for b in batches]
        ends = np.cumsum([p.offsets[-1] for p in parts])
        shifts = np.concatenate([[0], ends[:-1]])
        counts[name] = Counts(
            np.concatenate([[0], *(p.offsets[1:] + s for p, s in zip(parts, shifts, strict=True))]).astype(
                np.int64
            ),
            np.concatenate([p.ids for p in parts]),
            np.concatenate([p.counts for p in parts]),
            np.concatenate([p.total for p in parts]),
        )
    return Batch(
        np.concatenate([b.rows for b in batches]),
        counts,
        np.concatenate([b.present for b in batches]),
    )
