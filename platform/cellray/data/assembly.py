"""One shard of a store, out of what units read of its cells: their tokens, ranked, in their final order.

What was read is loaded at once, as it is, and ranked and packed a record batch at a time, so that
a shard takes little more memory than its tokens.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cellray.data import compiled, pieces, storage
from cellray.data.shards import ABOUT, BATCH, FEW, cell_table, coded, index_of, pack
from cellray.data.tokens import Counts, Tokenizer, narrow
from cellray.data.units import UNKNOWN, cells_path, counts_path, shard_path

KINDS = {"label": "labels", "donor": "donors", "batch": "batches", "assay": "assays"}
"""What the report counts cells by, and the name it gives to that."""


@dataclass(frozen=True, kw_only=True)
class Making:
    """What all shards are made of."""

    origins: np.ndarray
    """Origin of each unit, int [units]."""
    onto: list[np.ndarray]
    """For each origin, the vocabulary index of each feature, -1 for none, int32 [features]; they rise."""
    tokenizer: Tokenizer
    widths: Mapping[str, str]
    """Modality -> type of its counts; uint8 for those without any."""
    store: str
    read_in: str
    """Folder of what the units read."""

    def __post_init__(self) -> None:
        assert all(compiled.rising(own) for own in self.onto), "targets do not rise"


def assemble(shard: int, room: Mapping[str, int], making: Making, parts: str) -> None:
    """The shard, written under the name of its content, and what it holds by data set.

    By modality, `room` is no fewer than the tokens that were read of the cells of the shard, those that
    do not stay too. Cells without a token are left out.
    """
    with pa.ipc.open_file(pa.BufferReader(storage.read_bytes(cells_path(parts, shard)))) as file:
        cells = file.get_batch(0)
    loaded = {name: _load(cells, name, room[name], making) for name in making.tokenizer.vocabularies}
    present = np.zeros(cells.num_rows, np.uint32)
    for bit, own in enumerate(loaded.values()):
        some = compiled.known(own.offsets, own.ids, own.rows, own.target, own.base)
        present |= some.astype(np.uint32) << bit
    kept = np.flatnonzero(present)
    cells, present = cells.take(pa.array(kept)), present[kept]
    loaded = {name: own.take(kept) for name, own in loaded.items()}
    groups = _holdings(cells, present, list(loaded))
    entry: dict[str, Any] = {"rows": len(kept), "groups": groups}
    if len(kept):
        apart = {name for name, own in loaded.items() if own.high() <= FEW}
        batches = _batches(cells, present, loaded, making.tokenizer, groups, apart)
        about = {name: {"cells": own["cells"], "donors": own["donors"]} for name, own in groups.items()}
        lineage = {"lineage": json.dumps(about, sort_keys=True)}
        first = next(batches)
        data = pack(itertools.chain([first], batches), first.schema.with_metadata(lineage))
        digest = storage.sha256(data)
        entry |= {"name": f"{shard:05d}-{digest}.arrow", "sha256": digest, "bytes": len(data)}
        entry["index"] = index_of(data)
        storage.write_bytes(storage.join(making.store, "shards", entry["name"]), data)
    storage.write_bytes(shard_path(parts, shard), json.dumps(entry, sort_keys=True).encode())


@dataclass(frozen=True)
class _Loaded:
    """One modality of some cells, in the features of the files."""

    offsets: np.ndarray
    ids: np.ndarray
    counts: np.ndarray
    """Ragged rows: those of the cells, maybe others between them, and one without tokens."""
    target: np.ndarray
    """`Making.onto`, of all origins one after another."""
    rows: np.ndarray
    """Row of each cell, int64 [cells]."""
    base: np.ndarray
    """Where the cell's origin begins in `target`, int64 [cells]."""

    def take(self, cells: np.ndarray) -> "_Loaded":
        return _Loaded(self.offsets, self.ids, self.counts, self.target, self.rows[cells], self.base[cells])

    def high(self) -> float:
        """The share of the cells' counts that is above 255."""
        owners = np.searchsorted(self.offsets, np.flatnonzero(self.counts > 255), side="right") - 1
        tokens = int((self.offsets[self.rows + 1] - self.offsets[self.rows]).sum())
        return float(np.isin(owners, self.rows).sum() / max(1, tokens))


def _load(cells: pa.RecordBatch, modality: str, room: int, making: Making) -> _Loaded:
    """What was read of `cells`, at most `room` tokens."""
    unit, row = (cells[f"{modality}.{kind}"].to_numpy() for kind in ("unit", "row"))
    starts = np.cumsum([0, *(len(own) for own in making.onto)])
    by_unit = np.argsort(unit, kind="stable")
    by_unit = by_unit[unit[by_unit] != UNKNOWN]
    numbers, firsts = np.unique(unit[by_unit], return_index=True)
    wide = max((len(making.onto[making.origins[number]]) for number in numbers), default=0)
    ids, counts = np.empty(room, narrow(wide)), np.empty(room, making.widths.get(modality, "uint8"))
    offsets = [np.zeros(1, np.int64)]
    rows, base = np.empty(len(unit), np.int64), np.zeros(len(unit), np.int64)
    filled = done = 0
    for number, own in zip(numbers.tolist(), np.split(by_unit, firsts)[1:], strict=True):
        first, stop = int(row[own[0]]), int(row[own[-1]]) + 1
        with pieces.opened(counts_path(making.read_in, number)) as piece:
            cuts = piece.offsets[first : stop + 1] - piece.offsets[first] + filled
            end = int(cuts[-1])
            assert end <= room, f"there is no room for the tokens of unit {number}"
            piece.read(first, stop, ids[filled:end], counts[filled:end])
        rows[own] = row[own] - first + done
        base[own] = starts[making.origins[number]]
        offsets.append(cuts[1:])
        filled, done = end, done + stop - first
    rows[unit == UNKNOWN] = done
    offsets.append(np.array([filled]))
    target = np.concatenate([np.empty(0, np.int32), *making.onto])
    return _Loaded(np.concatenate(offsets), ids[:filled], counts[:filled], target, rows, base)


def _batches(
    cells: pa.RecordBatch,
    present: np.ndarray,
    loaded: Mapping[str, _Loaded],
    tokenizer: Tokenizer,
    groups: dict[str, Any],
    apart: set[str],
) -> Iterator[pa.RecordBatch]:
    """The record batches of the shard; what each of them holds is added to `groups`, by modality.

    Counts above 255 of the modalities `apart` are stored by themselves.
    """
    about = {name: coded(cells[name].cast(pa.string())) for name in ABOUT}
    digests = cells["digest"].to_numpy()
    names, dataset = np.unique(np.asarray(cells["dataset"].cast(pa.string())), return_inverse=True)
    weights = {name: tokenizer.weights(name, cells["assay"].to_pylist()) for name in loaded}
    depth = {name: compiled.sums(own.offsets, own.counts)[own.rows] for name, own in loaded.items()}
    for first in range(0, len(present), BATCH):
        some = slice(first, first + BATCH)
        counts = {}
        for name, own in loaded.items():
            scale, kind = weights[name]
            offsets, ids, values = compiled.ranked(
                own.offsets,
                own.ids,
                own.counts,
                scale,
                kind[some],
                rows=own.rows[some],
                target=own.target,
                base=own.base[some],
            )
            counts[name] = Counts(offsets, ids, values, depth[name][some])
            sums = compiled.sums(offsets, values)
            lengths = counts[name].lengths
            for number in np.unique(dataset[some]).tolist():
                mine = dataset[some] == number
                held = groups[str(names[number])]["modalities"][name]
                held["cells"] += int((lengths[mine] > 0).sum())
                held["counts"] += int(sums[mine].sum())
                held["tokens"] += int(lengths[mine].sum())
        known = {name: values[some] for name, values in about.items()}
        table = cell_table(
            tokenizer,
            cells["cell_id"][some],
            known,
            present[some],
            counts,
            digests=digests[some],
            apart=apart,
        )
        (batch,) = table.to_batches()
        yield batch


def _holdings(cells: pa.RecordBatch, present: np.ndarray, modalities: list[str]) -> dict[str, Any]:
    """By data set: cells, labels, donors, assays, combinations of modalities; of each of them nothing yet."""
    dataset = np.asarray(cells["dataset"].cast(pa.string()))
    found = {}
    for group in sorted(set(dataset)):
        mine = np.flatnonzero(dataset == group)
        part = cells.take(pa.array(mine))
        bits = Counter(present[mine].tolist())
        found[str(group)] = {
            "cells": len(mine),
            **{name: _counter(part[kind]) for kind, name in KINDS.items()},
            "present": {
                "+".join(n for i, n in enumerate(modalities) if int(b) >> i & 1): k for b, k in bits.items()
            },
            "modalities": {name: {"cells": 0, "counts": 0, "tokens": 0} for name in modalities},
        }
    return found


def _counter(values: pa.Array) -> dict[str, int]:
    """How often each string is there."""
    return {str(entry["values"]): entry["counts"] for entry in values.value_counts().to_pylist()}
