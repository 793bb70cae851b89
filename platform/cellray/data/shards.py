"""A shard of the store: its columns, its bytes, and the index by which parts of it are read and checked.

A shard is an Arrow IPC file, zstd, one row a cell, record batches of BATCH cells. In a record batch
the tokens come first and what is known of the cells last:

    metadata | m.ids, m.counts, m.high, … | present, m.total, … | m.length, …, digest, ABOUT, cell_id
    ^----------------------------- front -----------------------^
    ^------^                      and      ^--------------------------- back ---------------------------^

Most counts are small, and a few are not: `m.counts` may hold a byte each, and `m.high` those above 255.
A byte takes 0.6 times as long to unpack as two, and a feed unpacks more than it does anything else.

The feed reads fronts, planning reads backs, neither the other. Both are read as exact byte ranges with
a checksum each in the manifest, so that no reader ever decodes, or returns, bytes that were not written.
"""

import hashlib
import io
import os
import re
import struct
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from cellray.data.modalities import Modality
from cellray.data.tokens import Counts, Tokenizer, narrow

BATCH = 1024
"""Cells in one record batch of a shard."""
ABOUT = ("dataset", "donor", "batch", "assay", "species", "tissue", "label")
"""What is known of a cell, "" where it is not. Dictionary-coded strings in a shard."""
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
"""Names of files in a manifest, which comes from outside: none leads out of the store."""
WIDTH = b"width"
"""Metadata of `m.counts`: the type that holds the counts as they are."""
FEW = 0.01
"""Share of counts above 255 up to which they are best stored by themselves: each takes eight bytes."""
NONE = np.zeros(0, np.uint64)
START = 8
"""Where the messages of an Arrow file begin, after its magic bytes."""


def schema(
    modalities: Sequence[Modality],
    sizes: Mapping[str, int],
    widths: Mapping[str, np.dtype] | None = None,
    apart: Container[str] = (),
) -> pa.Schema:
    """The columns of a shard. `sizes` holds the number of features of each modality, `widths` the type of
    its counts, uint32 where nothing is said; those of the modalities `apart` are bytes, and `high`."""
    tokens, totals, lengths = [], [], []
    for m in modalities:
        ids = pa.from_numpy_dtype(np.dtype(narrow(sizes[m.name])))
        width = (widths or {}).get(m.name, np.dtype(np.uint32))
        counts = pa.uint8() if m.name in apart else pa.from_numpy_dtype(width)
        tokens += [
            pa.field(f"{m.name}.ids", pa.list_(ids)),
            pa.field(f"{m.name}.counts", pa.list_(counts), metadata={WIDTH: str(width)}),
            pa.field(f"{m.name}.high", pa.list_(pa.uint64())),
        ]
        totals.append(pa.field(f"{m.name}.total", pa.int64()))
        lengths.append(pa.field(f"{m.name}.length", pa.int32()))
    about = [pa.field(name, pa.dictionary(pa.int32(), pa.string())) for name in ABOUT]
    return pa.schema(
        [
            *tokens,
            pa.field("present", pa.uint32()),
            *totals,
            *lengths,
            pa.field("digest", pa.uint64()),
            *about,
            pa.field("cell_id", pa.string()),
        ]
    )


def cell_table(
    tokenizer: Tokenizer,
    cell_ids: Sequence[str],
    about: Mapping[str, Sequence[str] | pa.DictionaryArray],
    present: np.ndarray,
    counts: Mapping[str, Counts],
    *,
    digests: np.ndarray | None = None,
    apart: Container[str] = (),
) -> pa.Table:
    """Rows of a shard. `present` is a bitmask [cells], bit i for the i-th modality of the tokenizer.

    A cell that lacks a modality has no tokens and depth 0 in it. Counts keep their type (uint8, uint16
    or uint32); of the modalities `apart` those above 255 are stored by themselves, which saves where
    they are few. `digests` are hashes of the cells' content, uint64 [cells]; 0 where there is none.
    """
    sizes = {name: len(v) for name, v in tokenizer.vocabularies.items()}
    widths = {name: counts[name].counts.dtype for name in sizes}
    for name, width in widths.items():
        assert width in (np.uint8, np.uint16, np.uint32), f"counts of {name} are {width}"
    form = schema(tokenizer.modalities, sizes, widths, apart)
    columns: dict[str, pa.Array] = {
        "cell_id": pa.array(cell_ids, pa.string()),
        "present": pa.array(present.astype(np.uint32)),
        "digest": pa.array(np.zeros(len(present), np.uint64) if digests is None else digests, pa.uint64()),
    }
    columns |= {name: coded(about[name]) for name in ABOUT}
    for name in sizes:
        c = counts[name]
        offsets = pa.array(c.offsets.astype(np.int32))
        ids = pa.array(c.ids, form.field(f"{name}.ids").type.value_type)
        columns[f"{name}.ids"] = pa.ListArray.from_arrays(offsets, ids)
        low, ends, high = parted(c) if name in apart else (c.counts, np.zeros_like(c.offsets), NONE)
        columns[f"{name}.counts"] = pa.ListArray.from_arrays(offsets, pa.array(low))
        columns[f"{name}.high"] = pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(high))
        columns[f"{name}.total"] = pa.array(c.total.astype(np.int64))
        columns[f"{name}.length"] = pa.array(c.lengths.astype(np.int32))
    return pa.Table.from_arrays([columns[field.name] for field in form], schema=form)


def parted(counts: Counts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The counts, uint8 [tokens], 255 for more; by cell where those begin, [cells + 1]; and they.

    They are uint64: the place of the token in its cell, and in the lower half its count.
    """
    at = np.flatnonzero(counts.counts > 255)
    firsts = counts.offsets[np.searchsorted(counts.offsets, at, side="right") - 1]
    low = counts.counts.astype(np.uint8)
    low[at] = 255
    high = (at - firsts).astype(np.uint64) << np.uint64(32) | counts.counts[at]
    return low, np.searchsorted(at, counts.offsets), high


def joined(
    offsets: np.ndarray, low: np.ndarray, width: np.dtype, ends: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The counts that were `parted`, of type `width` [tokens]; `low` itself if it is."""
    if low.dtype == width:
        return low
    found = low.astype(width)
    high = high[ends[0] : ends[-1]]
    if len(high):
        firsts = np.repeat(offsets[:-1], np.diff(ends))
        found[firsts + (high >> np.uint64(32)).astype(np.int64)] = high & np.uint64(0xFFFFFFFF)
    return found


def coded(values: Sequence[str] | pa.Array) -> pa.DictionaryArray:
    """`values` as a column of ABOUT, those that are coded already as they are."""
    if isinstance(values, pa.DictionaryArray):
        return values
    return pa.array(values, pa.string()).dictionary_encode()


def codec() -> pa.Codec:
    """What shards are packed with.

    Against level 3, level 1 takes 4 to 9 % more bytes, half the time to write, a tenth of an ingest, and
    three quarters to read; level -1 7 % more of deep cells, 20 % of shallow ones, and half to read. A feed
    at level 3 is far ahead of any training, so bytes are what counts.
    """
    return pa.Codec("zstd", compression_level=3)


def encode_shard(table: pa.Table) -> bytes:
    """`table` as an Arrow IPC file: zstd, record batches of BATCH rows. The same rows give the same bytes."""
    table = table.combine_chunks().unify_dictionaries()
    return pack(table.to_batches(max_chunksize=BATCH), table.schema)


def pack(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> bytes:
    """The file of these record batches, BATCH rows each but the last; coded strings have one dictionary."""
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=codec())
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


LISTS = ("rows", "offset", "bytes", "meta", "front", "back", "front_sum", "back_sum")


@dataclass(frozen=True, kw_only=True)
class Index:
    """Where the record batches of a shard are. Lists have an item for each of them."""

    head: int
    """Bytes of the schema and the dictionaries, from START on."""
    head_sum: str
    rows: list[int]
    offset: list[int]
    """First byte in the file."""
    bytes: list[int]
    meta: list[int]
    """Bytes of the metadata at the front."""
    front: list[int]
    """Bytes of the front, metadata included."""
    back: list[int]
    """Where the back begins, from the first byte of the record batch."""
    front_sum: list[str]
    back_sum: list[str]
    tokens: dict[str, list[int]]
    """Modality -> tokens."""
    widths: dict[str, str]
    """Modality -> type of its counts, such as "uint8"."""

    def __post_init__(self) -> None:
        lists = [*(getattr(self, name) for name in LISTS), *self.tokens.values()]
        if any(len(part) != len(self.rows) for part in lists):
            raise ValueError("the index of a shard has lists of different lengths: the manifest is damaged")


def index_of(data: bytes) -> dict[str, Any]:
    """The index of the shard `data`, for the manifest: the keywords of `Index`, ready for JSON."""
    source = pa.BufferReader(data)
    source.seek(START)
    form = pa.ipc.read_schema(pa.ipc.read_message(source))
    modalities = [name.removesuffix(".ids") for name in form.names if name.endswith(".ids")]
    found: dict[str, list[Any]] = {name: [] for name in LISTS}
    tokens: dict[str, list[int]] = {name: [] for name in modalities}
    # Buffers: four of a list (validity, offsets, and both of its items), two of a number.
    present = 12 * len(modalities)
    after = present + 2 * (1 + len(modalities))
    head = len(data)
    while (message := _next(source)) is not None:
        if message.type != "record batch":
            continue
        offset = source.tell() - 8 - len(message.metadata) - len(message.body)
        head = min(head, offset - START)
        whole = memoryview(data)[offset : source.tell()]
        meta = 8 + len(message.metadata)
        about = memoryview(message.metadata)
        front, back = (meta + _described(about, BUFFERS, n) for n in (after, present))
        facts = {
            "rows": _described(about, NODES, 0),
            "offset": offset,
            "bytes": len(whole),
            "meta": meta,
            "front": front,
            "back": back,
            "front_sum": checksum(whole[:front]),
            "back_sum": checksum(bytes(whole[:meta]) + bytes(whole[back:])),
        }
        for name, value in facts.items():
            found[name].append(value)
        for number, name in enumerate(modalities):
            # Two nodes of a list: its rows, and its items.
            tokens[name].append(_described(about, NODES, 6 * number + 1))
    sums = {"head": head, "head_sum": checksum(memoryview(data)[START : START + head])}
    widths = {name: form.field(f"{name}.counts").metadata[WIDTH].decode() for name in modalities}
    return found | sums | {"tokens": tokens, "widths": widths}


def _next(source: pa.BufferReader) -> pa.ipc.Message | None:
    try:
        return pa.ipc.read_message(source)
    except EOFError:
        return None


def _front_schema(form: pa.Schema, modalities: Sequence[str]) -> pa.Schema:
    return pa.schema([form.field(i) for i in range(4 * len(modalities) + 1)])


NODES, BUFFERS = 1, 2
"""Fields of the flatbuffer that describes a record batch: lengths of arrays, and where buffers are."""


def _described(meta: memoryview, kind: int, number: int) -> int:
    """The length of array `number` of a record batch, or where buffer `number` begins in its body."""

    def field(table: int, slot: int) -> int:
        entries = table - struct.unpack_from("<i", meta, table)[0]
        return table + int(struct.unpack_from("<H", meta, entries + 4 + 2 * slot)[0])

    def follow(at: int) -> int:
        return at + int(struct.unpack_from("<I", meta, at)[0])

    batch = follow(field(follow(0), 2))
    # Both are lists of pairs of 64-bit numbers.
    return int(struct.unpack_from("<q", meta, follow(field(batch, kind)) + 4 + 16 * number)[0])


def both_sums(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the rows and of the columns of a table of words, both uint64 and modulo 2^64."""
    return table.sum(axis=1, dtype=np.uint64), table.sum(axis=0, dtype=np.uint64)


def checksum(
    data: bytes | memoryview, sums: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] = both_sums
) -> str:
    """64 bits in hex that tell `data` from what it may turn into by accident: 20 GB/s, where zlib.crc32
    does 4 and sha256 below 2, which would be a quarter of what decoding costs.

    `data` as rows of 384 words of 64 bits: the sums of the rows and those of the columns are hashed,
    with the rest as it is. A change that keeps them all alters four words at the least. `sums` may be
    another `both_sums`, such as `sums.one_pass`.
    """
    words = np.frombuffer(data, "<u8", len(data) // 8)
    table = words[: len(words) // 384 * 384].reshape(-1, 384)
    digest = hashlib.sha256(len(data).to_bytes(8, "little"))
    for found in sums(table):
        digest.update(found.astype("<u8", copy=False).tobytes())
    digest.update(memoryview(data)[8 * table.size :])
    return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard as the manifest lists it."""

    name: str
    sha256: str
    bytes: int
    rows: int
    index: dict[str, Any]

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"the manifest lists a shard {self.name!r}, which is no name of a file")

    @cached_property
    def batches(self) -> Index:
        return Index(**self.index)


class Part:
    """Decodes some columns of the record batches of one shard."""

    _first: bytes
    """What a stream has before its record batches."""
    _options: pa.ipc.IpcReadOptions

    def space(self, size: int) -> tuple[np.ndarray, memoryview]:
        """Room for a record batch of `size` bytes, and the place in it to read to."""
        room = np.empty(len(self._first) + size, np.uint8)
        room[: len(self._first)] = np.frombuffer(self._first, np.uint8)
        return room, room.data[len(self._first) :]

    def decode(self, room: np.ndarray) -> pa.RecordBatch:
        """The columns, of a record batch that was read to `room`: no byte of the others is touched."""
        return pa.ipc.open_stream(pa.py_buffer(room), options=self._options).read_next_batch()


class Front(Part):
    """Decodes fronts: tokens, presence and depth."""

    def __init__(self, head: bytes, modalities: Sequence[str]) -> None:
        form = _front_schema(pa.ipc.read_schema(pa.py_buffer(head)), modalities)
        self._first = form.serialize().to_pybytes()
        self._options = pa.ipc.IpcReadOptions(use_threads=False)


class Back(Part):
    """Decodes the columns `names` of backs."""

    def __init__(self, head: bytes, names: Sequence[str]) -> None:
        form = pa.ipc.read_schema(pa.py_buffer(head))
        self._first = head
        wanted = [form.get_field_index(name) for name in names]
        self._options = pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)


def read_local(path: str, places: Sequence[tuple[int, memoryview]]) -> bool:
    """Fill each of `places` from its offset of a local file; False where the file ends before.

    Not by a memory map: touching a page that is no longer in the file kills the process.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        for offset, into in places:
            done = 0
            while done < len(into):
                got = os.preadv(file, [into[done:]], offset + done)
                if not got:
                    return False
                done += got
    finally:
        os.close(file)
    return True
