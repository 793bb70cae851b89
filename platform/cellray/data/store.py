"""The token store: shuffled Arrow IPC shards, a vocabulary, and a manifest that is written last.

STORE/store.json                     the manifest; a folder without it is no store
STORE/store-000002.json …            later editions: each lists all its shards, most of them older ones
STORE/vocabulary-<sha256>.arrow      the tokenizer
STORE/shards/<number>-<sha256>.arrow one row is one cell; see `shards`
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from operator import getitem
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from cellray.data import storage
from cellray.data.cache import Cache
from cellray.data.cells import Cells
from cellray.data.faults import pause, retried
from cellray.data.shards import (
    ABOUT,
    BATCH,
    NAME,
    START,
    Back,
    Front,
    Shard,
    cell_table,
    checksum,
    encode_shard,
    index_of,
    joined,
    read_local,
    schema,
)
from cellray.data.tokens import Counts, Tokenizer

__all__ = [
    "ABOUT",
    "BATCH",
    "VERSION",
    "Batch",
    "Shard",
    "Store",
    "cell_table",
    "collect",
    "concatenate",
    "edition_path",
    "editions",
    "encode_shard",
    "index_of",
    "schema",
]

VERSION = 3
WRONG = 4
"""How often bytes of a remote shard are read that are not those the manifest describes."""
EDITION = re.compile(r"store-(\d{6})\.json")


def edition_path(url: str, number: int) -> str:
    """The manifest of edition `number` of the store at `url`, from 1 on."""
    return storage.join(url, "store.json" if number == 1 else f"store-{number:06d}.json")


def editions(url: str) -> list[str]:
    """The manifests of the store at `url`, oldest first; none where there is no store. One listing."""
    names = storage.names(url)
    if "store.json" not in names:
        return []
    later = sorted(int(m[1]) for name in names if (m := EDITION.fullmatch(name)))
    return [edition_path(url, number) for number in (1, *later)]


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
        """The cells at `picked`, in that order; a cell may come more than once."""
        return collect([self], np.zeros(len(picked), np.int64), np.asarray(picked, np.int64))


class Stored(NamedTuple):
    """Tokens of one modality as a shard has them; see `shards.parted`."""

    offsets: np.ndarray
    ids: np.ndarray
    low: np.ndarray
    """The counts, as bytes where those that are larger are in `high`."""
    ends: np.ndarray
    high: np.ndarray
    width: np.dtype
    """The type that holds all counts."""
    total: np.ndarray

    def counts(self) -> Counts:
        """The tokens with their counts as they are."""
        whole = joined(self.offsets, self.low, self.width, self.ends, self.high)
        return Counts(self.offsets, self.ids, whole, self.total)


class Record(NamedTuple):
    """A record batch: `rows` and `present` as of a Batch, and its tokens by modality."""

    rows: np.ndarray
    present: np.ndarray
    tokens: dict[str, Stored]


class Store:
    """A committed store, read. Raises ValueError, naming the file, where it is not whole.

    `url` opens the newest edition; with `hash`, the edition whose manifest has that sha256.
    `cache` keeps what is read of a remote store on a local disk. Every byte that is decoded was checked
    against the manifest after it was read.
    """

    def __init__(self, url: str, *, hash: str | None = None, cache: Cache | None = None) -> None:
        self.url = url
        found = editions(url)
        if not found:
            raise ValueError(
                f"no store at {url}: {storage.join(url, 'store.json')} does not exist. Ingest did not run "
                "or did not finish; run `python -m pipelines.ingest` again, it goes on where it stopped."
            )
        self.path, raw = _edition(url, found, hash)
        """The manifest that was opened."""
        try:
            self.manifest = json.loads(raw)
        except ValueError as error:
            raise ValueError(f"{self.path} is no manifest of a store: {error}. It was damaged.") from error
        if self.manifest.get("version") != VERSION:
            raise ValueError(
                f"{self.path} has version {self.manifest.get('version')!r}, this cellray reads {VERSION}: "
                "ingest the files again into a new folder, or use the cellray that wrote it"
            )
        self.hash = storage.sha256(raw)
        self.shards = [Shard(**entry) for entry in self.manifest["shards"]]
        self._fs, self._root = storage.locate(url)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._cache = None if self._local else cache
        # By shard and by columns, for as many as are read from at a time and many more.
        self._front = lru_cache(maxsize=4096)(lambda shard: Front(self._head(shard), self.names))

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        about = self.manifest["vocabulary"]
        if not NAME.fullmatch(about["name"]):
            raise ValueError(f"{self.path} lists a vocabulary {about['name']!r}, which is no name of a file")
        path = storage.join(self.url, about["name"])
        try:
            data = storage.read_bytes(path)
        except FileNotFoundError:
            raise self._gone(path, about["sha256"]) from None
        if storage.sha256(data) != about["sha256"]:
            raise self._changed(path, storage.sha256(data), about["sha256"])
        return Tokenizer.from_arrow(pa.ipc.open_file(io.BytesIO(data)).read_all())

    @property
    def names(self) -> list[str]:
        """The modalities."""
        return list(self.tokenizer.vocabularies)

    @cached_property
    def widths(self) -> dict[str, np.dtype]:
        """The type that holds the counts of each modality, whatever the shard."""
        every = [shard.batches.widths for shard in self.shards]
        return {name: np.result_type(*(width[name] for width in every)) for name in self.names}

    @cached_property
    def cells(self) -> Cells:
        """What is known of every cell, in store order: all columns but the tokens."""
        more = [f"{name}.{what}" for name in self.names for what in ("total", "length")]
        return Cells(["cell_id", *ABOUT, "present", "digest", *more], len(self), self._scan)

    def lengths(self, modality: str) -> np.ndarray:
        """Tokens of every cell in a modality, int32 [cells]."""
        return np.asarray(self.cells[f"{modality}.length"].to_numpy())

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of every record batch, and the number of rows at the end, int64 [batches + 1]."""
        sizes = [rows for shard in self.shards for rows in shard.batches.rows]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)

    @cached_property
    def _firsts(self) -> np.ndarray:
        """Number of the first record batch of every shard, int64 [shards]."""
        return np.cumsum([0, *(len(shard.batches.rows) for shard in self.shards)])[:-1]

    def batch(self, number: int) -> Batch:
        """Record batch `number`, decoded."""
        rows, present, tokens = self.record(number)
        return Batch(rows, {name: stored.counts() for name, stored in tokens.items()}, present)

    def record(self, number: int) -> Record:
        """Record batch `number`, unpacked."""
        from cellray.data.sums import one_pass  # numba, which those who read no tokens need not import

        shard = int(np.searchsorted(self._firsts, number, side="right")) - 1
        within = number - int(self._firsts[shard])
        front, index = self._front(shard), self.shards[shard].batches
        room, into = front.space(index.bytes[within])
        mine = into[: index.front[within]]
        check = partial(checksum, sums=one_pass)
        self._fill(shard, [(index.offset[within], mine)], index.front_sum[within], check)
        record = front.decode(room)
        tokens = {}
        for name in self.names:
            ids, data = record[f"{name}.ids"], record[f"{name}.counts"]
            offsets = ids.offsets.to_numpy().astype(np.int64)
            own = slice(offsets[0], offsets[-1])
            offsets -= offsets[0]
            high = record[f"{name}.high"]
            tokens[name] = Stored(
                offsets,
                ids.values.to_numpy()[own],  # (not flatten, which looks for lists that are null)
                data.values.to_numpy()[own],
                high.offsets.to_numpy(),
                high.values.to_numpy(),
                np.dtype(index.widths[name]),
                record[f"{name}.total"].to_numpy(),
            )
        first = self.starts[number]
        rows = np.arange(first, first + record.num_rows)
        return Record(rows, record["present"].to_numpy(), tokens)

    def read(self, rows: np.ndarray) -> Batch:
        """The cells at `rows` (store order), in that order. Decodes only the record batches they lie in."""
        rows = np.asarray(rows, np.int64)
        if not len(rows):
            return self.batch(0).take(rows)
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        cuts = np.flatnonzero(np.diff(numbers[order], prepend=-1, append=-1))
        parts: list[Batch] = []
        source, within = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for first, last in pairwise(cuts.tolist()):
            mine = order[first:last]
            number = int(numbers[mine[0]])
            source[mine], within[mine] = len(parts), np.arange(len(mine))
            parts.append(self.batch(number).take(rows[mine] - self.starts[number]))
        return collect(parts, source, within)

    def lineage(self, shard: int) -> dict[str, dict[str, Any]]:
        """Data set -> its `cells` and `donors` in shard number `shard`, and the `files` it was made from.

        A file is its `url` as the atlas has it and the `sha256` of its content, or an object store's `tag`.
        """
        form = pa.ipc.read_schema(pa.py_buffer(self._head(shard)))
        found: dict[str, dict[str, Any]] = json.loads(form.metadata[b"lineage"])
        for name, own in found.items():
            rows = [row for row in self.manifest["inputs"]["files"] if row["dataset"] == name]
            own["files"] = [{k: row[k] for k in ("url", "sha256", "tag") if k in row} for row in rows]
        return found

    def verify(self, shard: int) -> None:
        """Nothing, if the whole file of shard number `shard` has the sha256 of the manifest."""
        entry = self.shards[shard]
        path = storage.join(self.url, "shards", entry.name)
        try:
            found = self._sha256(path)
        except FileNotFoundError:
            raise self._gone(path, entry.sha256) from None
        if found != entry.sha256:
            raise self._changed(path, found, entry.sha256)

    def _scan(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """Columns of the backs, a table a shard."""
        for number, shard in enumerate(self.shards):
            back, index, records = Back(self._head(number), names), shard.batches, []
            for i in range(len(index.rows)):
                room, into = back.space(index.bytes[i])
                meta, last = into[: index.meta[i]], into[index.back[i] :]
                at = index.offset[i]
                self._fill(number, [(at, meta), (at + index.back[i], last)], index.back_sum[i])
                records.append(back.decode(room))
            yield pa.Table.from_batches(records).unify_dictionaries().combine_chunks()

    def _head(self, shard: int) -> bytes:
        index = self.shards[shard].batches
        head = bytearray(index.head)
        self._fill(shard, [(START, memoryview(head))], index.head_sum)
        return bytes(head)

    def _fill(
        self,
        shard: int,
        places: list[tuple[int, memoryview]],
        wanted: str,
        check: Callable[[bytes | memoryview], str] = checksum,
    ) -> None:
        """Read byte ranges of a shard to where they belong. ValueError if they are not what was written."""
        entry = self.shards[shard]
        path = storage.join(self.url, "shards", entry.name)
        for number in range(1 if self._local else WRONG):
            if number:
                pause(number)
            try:
                if self._local:
                    whole = read_local(self._at(entry), places)
                elif self._cache is None:
                    whole = _copied(self._ranges(entry, places), places)
                else:
                    key = f"{entry.sha256[:32]}-{places[0][0]}-{wanted}"
                    fetch = partial(self._ranges, entry, places)
                    whole = _copied(self._cache.get(key, fetch, lambda d: check(d) == wanted), places)
            except FileNotFoundError:
                raise self._gone(path, entry.sha256) from None
            if whole and check(b"".join(i for _, i in places) if places[1:] else places[0][1]) == wanted:
                return
        self.verify(shard)
        raise ValueError(
            f"{path} has the sha256 {entry.sha256[:16]}… that the manifest says, but the bytes at "
            f"{places[0][0]:,} are not those it describes: the manifest was damaged, or the file while it "
            "was read. Run again."
        )

    def _at(self, shard: Shard) -> str:
        """Path in the file system. (To find it from the URL takes as long as reading a record batch.)"""
        return storage.join(self._root, "shards", shard.name)

    def _ranges(self, shard: Shard, places: list[tuple[int, memoryview]]) -> bytes:
        """Byte ranges of a remote file, one behind the other."""
        path = self._at(shard)
        parts = [
            retried(path, partial(self._fs.cat_file, path, start=offset, end=offset + len(into)))
            for offset, into in places
        ]
        return b"".join(parts)

    def _sha256(self, path: str) -> str:
        digest = hashlib.sha256()
        with storage.open_blocks(path) as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
        return digest.hexdigest()

    def _gone(self, path: str, sha256: str) -> ValueError:
        return ValueError(
            f"{path} is listed in {self.path} with sha256 {sha256[:16]}…, but does not exist: the store was "
            "damaged after it was written. Restore the file or ingest into a new folder."
        )

    def _changed(self, path: str, found: str, sha256: str) -> ValueError:
        return ValueError(
            f"{path} has sha256 {found[:16]}…, the manifest says {sha256[:16]}…: the file was "
            "changed or is incomplete. Restore it or ingest into a new folder."
        )


def _edition(url: str, found: Sequence[str], hash: str | None) -> tuple[str, bytes]:
    """Path and content of the newest edition, or of the one with that hash."""
    if hash is None:
        return found[-1], storage.read_bytes(found[-1])
    seen = {}
    for path in reversed(found):
        raw = storage.read_bytes(path)
        seen[path.rpartition("/")[2]] = storage.sha256(raw)
        if seen[path.rpartition("/")[2]] == hash:
            return path, raw
    there = ", ".join(f"{name} {digest[:16]}…" for name, digest in sorted(seen.items()))
    raise ValueError(
        f"{url} has no edition with hash {hash[:16]}…; there are {there}. "
        "The store was replaced since: use the store of that time, or begin a new run."
    )


def _copied(data: bytes, places: Sequence[tuple[int, memoryview]]) -> bool:
    """Put `data` where it belongs; False if there is not enough of it."""
    if len(data) != sum(len(into) for _, into in places):
        return False
    at = 0
    for _, into in places:
        into[:] = data[at : at + len(into)]
        at += len(into)
    return True


def collect(batches: Sequence[Batch], source: np.ndarray, row: np.ndarray) -> Batch:
    """Cells of several batches as one: cell i is number `row[i]` of `batches[source[i]]`.

    The tokens of a cell are copied as one piece each. (Their indices would take eight bytes for
    each of three; numpy's own concatenate takes 0.25 µs a piece, joining bytes 0.03.)
    """
    bases = np.cumsum([0, *(len(b.rows) for b in batches)])[:-1]
    places = bases[source] + row
    owners = source.tolist()
    counts = {}
    for name in batches[0].counts:
        parts = [b.counts[name] for b in batches]
        firsts = np.concatenate([p.offsets[:-1] for p in parts])[places]
        lasts = np.concatenate([p.offsets[1:] for p in parts])[places]
        offsets = np.zeros(len(places) + 1, np.int64)
        np.cumsum(lasts - firsts, out=offsets[1:])
        pieces = list(map(slice, firsts.tolist(), lasts.tolist()))
        total = np.concatenate([p.total for p in parts])[places]
        ids = _joined([p.ids for p in parts], owners, pieces)
        counts[name] = Counts(offsets, ids, _joined([p.counts for p in parts], owners, pieces), total)
    return Batch(
        np.concatenate([b.rows for b in batches])[places],
        counts,
        np.concatenate([b.present for b in batches])[places],
    )


def _joined(arrays: Sequence[np.ndarray], owners: list[int], pieces: list[slice]) -> np.ndarray:
    """The pieces of the arrays with those numbers, one behind the other, in the widest type of all."""
    width = np.result_type(*arrays)
    views = [np.ascontiguousarray(a, width).data for a in arrays]
    one: Any = getitem
    return np.frombuffer(bytearray().join(map(one, map(views.__getitem__, owners), pieces)), width)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Several batches as one, in order."""
    sizes = [len(b.rows) for b in batches]
    row = np.concatenate([np.arange(size) for size in sizes])
    return collect(batches, np.repeat(np.arange(len(batches)), sizes), row)
