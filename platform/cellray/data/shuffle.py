"""The order of the cells in a store: each by a hash of its id, so that no cell's place hangs on another's."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cellray.data.group import Group
from cellray.data.qc import KEPT
from cellray.data.shards import ABOUT
from cellray.data.texts import Texts, common
from cellray.data.tokens import narrow
from cellray.data.verdicts import Verdicts

CHUNK = 1 << 16
"""Cells whose ids are Python strings at a time."""

Homes = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Modality -> by number of the cell, the unit that read it and its row there, int32; UNKNOWN without."""


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

    def shard_of(self, hashes: np.ndarray) -> np.ndarray:
        """The shard in which cells of these `hashes` are, if they stay, int64."""
        return np.searchsorted(_firsts(len(self.bounds) - 1), hashes, side="right") - 1

    def shards(self, homes: Homes) -> Iterator[pa.RecordBatch]:
        """A record batch a shard: `cell_id`, ABOUT and `digest` of its cells, and where they were read to.

        For that each modality has `<modality>.unit` and `<modality>.row`, of `homes`.
        """
        datasets = [Texts.full(len(group.cells), group.name) for group in self.groups]
        about = [group.about | {"dataset": own} for group, own in zip(self.groups, datasets, strict=True)]
        known = {name: common([own[name] for own in about]) for name in ABOUT}
        words = {name: pa.array(own, pa.string()) for name, (own, _) in known.items()}
        kinds = [pa.dictionary(pa.from_numpy_dtype(narrow(len(words[name]))), pa.string()) for name in ABOUT]
        types = [pa.string(), *kinds, pa.uint64()]
        schema = pa.schema(zip(["cell_id", *ABOUT, "digest"], types, strict=True))
        read = {
            f"{name}.{kind}": own
            for name, home in homes.items()
            for kind, own in zip(("unit", "row"), home, strict=True)
        }

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
            cells = self.cells[first:stop]
            sort = np.argsort(cells)
            rows = np.split(cells[sort], np.searchsorted(cells[sort], self.starts[1:-1]))
            pieces = [piece(i, own - self.starts[i]) for i, own in enumerate(rows) if len(own) or not i]
            about = pa.concat_batches(pieces).take(pa.array(np.argsort(sort)))
            where = [pa.array(own[cells]) for own in read.values()]
            return pa.RecordBatch.from_arrays([*about.columns, *where], [*schema.names, *read])

        return itertools.starmap(shard, itertools.pairwise(self.bounds.tolist()))


def order(
    groups: Sequence[Group], verdicts: Verdicts, shards: int, hashes: Mapping[str, np.ndarray]
) -> Order:
    """The order of the cells that stay: by their `hashes`, and each shard an equal part of all there can be.

    So the cells of any unit that are in one shard are neighbours once they are sorted by hash.
    Takes about 30 bytes a cell while it runs, and keeps 4.
    """
    starts = np.cumsum([0, *(len(group.cells) for group in groups)])
    stay = [np.flatnonzero(verdicts.cells[group.name] == KEPT) for group in groups]
    kind = np.int32 if starts[-1] < 1 << 31 else np.int64
    cells = np.concatenate([(own + at).astype(kind) for own, at in zip(stay, starts[:-1], strict=True)])
    own = np.concatenate([hashes[group.name][rows] for group, rows in zip(groups, stay, strict=True)])
    ranked = np.argsort(own, kind="stable")
    bounds = np.append(np.searchsorted(own[ranked], _firsts(shards)), len(own))
    return Order(groups=groups, digests=verdicts.digests, starts=starts, cells=cells[ranked], bounds=bounds)


def _firsts(shards: int) -> np.ndarray:
    """The lowest hash of each shard, uint64 [shards]."""
    return np.array([-(-(number << 64) // shards) for number in range(shards)], np.uint64)


def hashed(group: Group) -> np.ndarray:
    """A hash of the id of each cell, uint64 [cells], the same everywhere."""
    found = [np.empty(0, np.uint64)]
    for first in range(0, len(group.cells), CHUNK):
        names = group.cells.slice(first, CHUNK).to_pylist()
        ids = (f"{group.name}:{name}".encode() for name in names)
        joined = b"".join(hashlib.blake2b(i, digest_size=8).digest() for i in ids)
        found.append(np.frombuffer(joined, "<u8"))
    return np.concatenate(found)
