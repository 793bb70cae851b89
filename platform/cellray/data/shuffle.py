"""The order of the cells in a store: each by a hash of its id, so that no cell's place hangs on another's."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from cellray.data.atlas import FIELDS
from cellray.data.group import Group
from cellray.data.qc import KEPT
from cellray.data.units import UNKNOWN
from cellray.data.verdicts import Verdicts


def order(
    groups: Sequence[Group], verdicts: Verdicts, shards: int
) -> tuple[pa.Table, dict[str, np.ndarray], np.ndarray]:
    """The cells that stay in the order of the store, each data set's places in it, and the shards' bounds.

    A cell's shard is hash mod shards, its place in the shard by hash. Other cells have place
    UNKNOWN. Bounds are int64 [shards + 1].
    """
    tables, hashes = [], []
    for group in groups:
        stay = np.flatnonzero(verdicts.cells[group.name] == KEPT)
        ids = [f"{group.name}:{cell}" for cell in group.cells[stay]]
        hashes.append(
            np.frombuffer(b"".join(hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids), "<u8")
        )
        columns = {"cell_id": pa.array(ids, pa.string())}
        columns["dataset"] = _coded(np.full(len(ids), group.name, object))
        for name in FIELDS:
            columns[name] = _coded(group.about[name][stay])
        columns["digest"] = pa.array(verdicts.digests[group.name][stay])
        tables.append(pa.table(columns))
    whole = np.concatenate(hashes)
    shard = whole % np.uint64(shards)
    ranked = np.lexsort((whole, shard))
    table = pa.concat_tables(tables).unify_dictionaries().take(pa.array(ranked))
    bounds = np.searchsorted(shard[ranked], np.arange(shards + 1, dtype=np.uint64))
    spot = np.empty(len(whole), np.int64)
    spot[ranked] = np.arange(len(whole))
    places = {}
    for group, own in zip(groups, np.split(spot, np.cumsum([len(h) for h in hashes])[:-1]), strict=True):
        places[group.name] = np.full(len(group.cells), UNKNOWN, np.int64)
        places[group.name][verdicts.cells[group.name] == KEPT] = own
    return table, places, bounds


def _coded(values: np.ndarray) -> pa.DictionaryArray:
    return pa.array(values, pa.string()).dictionary_encode()
