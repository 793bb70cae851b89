"""The order of the cells in a store: each by a hash of its id, so that no cell's place hangs on another's."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cellray.data.group import Group
from cellray.data.qc import KEPT
from cellray.data.shards import ABOUT
from cellray.data.texts import Texts, common
from cellray.data.tokens import narrow
from cellray.data.units import UNKNOWN
from cellray.data.verdicts import Verdicts

CHUNK = 1 << 16
"""Cells whose ids are Python strings at a time."""
AFTER = 32
"""Cells behind a shard that are made with it. Arrow pads the ids of a part of an array to 64 bytes with what
follows there, and the padding stays in the shard: a store's bytes are those of all ids in one array."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The cells that stay, in the order of the store."""

    groups: Sequence[Group]
    digests: Mapping[str, np.ndarray]
    """Those of `Verdicts`."""
    starts: np.ndarray
    """Number of each data set's first cell, all cells numbered through, and the end, int64 [groups + 1]."""
    cells: np.ndarray
    """Number of the cell at each place, int32 or, of an atlas too large for that, int64 [cells that stay]."""
    bounds: np.ndarray
    """First place of each shard, and the end, int64 [shards + 1]."""

    def places(self) -> dict[str, np.ndarray]:
        """Data set -> the place of each of its cells, of the type of `cells`; UNKNOWN for those that go."""
        found = np.full(self.starts[-1], UNKNOWN, self.cells.dtype)
        found[self.cells] = np.arange(len(self.cells), dtype=self.cells.dtype)
        own = np.split(found, self.starts[1:-1])
        return {group.name: places for group, places in zip(self.groups, own, strict=True)}

    def shards(self) -> pa.RecordBatchReader:
        """`cell_id`, ABOUT and `digest` of the cells, a record batch a shard, each made when it is read.

        Coded strings have the same dictionary in all of them, as an Arrow file wants it.
        """
        datasets = [Texts.full(len(group.cells), group.name) for group in self.groups]
        about = [group.about | {"dataset": own} for group, own in zip(self.groups, datasets, strict=True)]
        known = {name: common([own[name] for own in about]) for name in ABOUT}
        words = {name: pa.array(own, pa.string()) for name, (own, _) in known.items()}
        kinds = [pa.dictionary(pa.from_numpy_dtype(narrow(len(words[name]))), pa.string()) for name in ABOUT]
        types = [pa.string(), *kinds, pa.uint64()]
        schema = pa.schema(zip(["cell_id", *ABOUT, "digest"], types, strict=True))

        def piece(number: int, rows: np.ndarray) -> pa.RecordBatch:
            """Cells `rows` of one data set."""
            group = self.groups[number]
            names = group.cells.take(pa.array(rows)).cast(pa.string())
            codes = {name: known[name][1][number][about[number][name].codes[rows]] for name in ABOUT}
            columns = [
                pc.binary_join_element_wise(group.name, names, ":"),
                *(pa.DictionaryArray.from_arrays(codes[name], words[name]) for name in ABOUT),
                pa.array(self.digests[group.name][rows]),
            ]
            return pa.RecordBatch.from_arrays(columns, schema=schema)

        def shard(first: int, stop: int) -> pa.RecordBatch:
            """The cells at places first … stop - 1."""
            cells = self.cells[first : stop + AFTER]
            sort = np.argsort(cells)
            rows = np.split(cells[sort], np.searchsorted(cells[sort], self.starts[1:-1]))
            pieces = [piece(i, own - self.starts[i]) for i, own in enumerate(rows) if len(own) or not i]
            return pa.concat_batches(pieces).take(pa.array(np.argsort(sort))).slice(0, stop - first)

        shards = itertools.starmap(shard, itertools.pairwise(self.bounds.tolist()))
        return pa.RecordBatchReader.from_batches(schema, shards)


def order(groups: Sequence[Group], verdicts: Verdicts, shards: int) -> Order:
    """The order of the cells that stay: a cell's shard is hash mod shards, its place in it by hash.

    Takes about 30 bytes a cell while it runs, and keeps 4.
    """
    starts = np.cumsum([0, *(len(group.cells) for group in groups)])
    size = sum(int(np.count_nonzero(verdicts.cells[group.name] == KEPT)) for group in groups)
    cells = np.empty(size, np.int32 if starts[-1] < 1 << 31 else np.int64)
    hashes = np.empty(size, np.uint64)
    done = 0
    for group, start in zip(groups, starts[:-1], strict=True):
        own = np.flatnonzero(verdicts.cells[group.name] == KEPT)
        cells[done : done + len(own)] = start + own
        for first in range(0, len(own), CHUNK):
            names = group.cells.take(pa.array(own[first : first + CHUNK])).to_pylist()
            hashes[done : done + len(names)] = _hashes(f"{group.name}:{name}" for name in names)
            done += len(names)
    shard = (hashes % np.uint64(shards)).astype(narrow(shards))
    ranked = np.lexsort((hashes, shard))
    firsts = np.searchsorted(shard[ranked], np.arange(shards, dtype=shard.dtype))
    bounds = np.append(firsts, size)
    return Order(groups=groups, digests=verdicts.digests, starts=starts, cells=cells[ranked], bounds=bounds)


def _hashes(ids: Iterable[str]) -> np.ndarray:
    """A hash of each id, uint64 [ids], the same everywhere."""
    joined = b"".join(hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids)
    return np.frombuffer(joined, "<u8")
