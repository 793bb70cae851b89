import hashlib
import tracemalloc

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data import shuffle
from cellray.data.atlas import FIELDS
from cellray.data.group import Group
from cellray.data.qc import EMPTY, KEPT
from cellray.data.shards import ABOUT
from cellray.data.shuffle import hashed, order
from cellray.data.texts import Texts
from cellray.data.units import cells_path, write_cells
from cellray.data.verdicts import Verdicts


def group(name, labels):
    size = len(labels)
    about = {field: Texts.full(size, f"{field} of {name}") for field in FIELDS} | {"label": Texts.of(labels)}
    names = pa.array([f"c{i}" for i in range(size)], pa.large_string())
    return Group(name=name, cells=names, about=about, species="", species_from="", parts=(), label_from="")


def ordered(groups, stay, shards):
    """The order in which the cells are that `stay`; the digest of a cell is 100 times its row."""
    cells = {g.name: np.where(own, KEPT, EMPTY).astype(np.uint8) for g, own in zip(groups, stay, strict=True)}
    digests = {g.name: np.arange(len(g.cells), dtype=np.uint64) * 100 for g in groups}
    hashes = {g.name: hashed(g) for g in groups}
    return order(groups, Verdicts(rows=[], cells=cells, digests=digests, judged=[]), shards, hashes)


def homes(found):
    """Of every cell but each third, unit and row: made of its number."""
    number = np.arange(found.starts[-1], dtype=np.int32)
    return {"rna": (np.where(number % 3, number // 5, -1).astype(np.int32), number % 5)}


def plain(groups, stay, shards):
    """Rows of each shard, cell by cell."""
    found: list[list[tuple[int, dict]]] = [[] for _ in range(shards)]
    before = 0
    for own, kept in zip(groups, stay, strict=True):
        about = {name: texts.tolist() for name, texts in own.about.items()}
        for row in np.flatnonzero(kept).tolist():
            at = before + row
            cell = f"{own.name}:c{row}"
            number = int.from_bytes(hashlib.blake2b(cell.encode(), digest_size=8).digest(), "little")
            known = {name: values[row] for name, values in about.items()}
            entry = {"cell_id": cell, "dataset": own.name, **known, "digest": 100 * row}
            entry |= {"rna.unit": at // 5 if at % 3 else -1, "rna.row": at % 5}
            found[number * shards >> 64].append((number, entry))
        before += len(kept)
    return [[entry for _, entry in sorted(shard, key=lambda pair: pair[0])] for shard in found]


KEPT_AND_LABELS = st.lists(st.tuples(st.booleans(), st.sampled_from(["", "b", "a"])), min_size=1, max_size=20)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.lists(KEPT_AND_LABELS, min_size=1, max_size=4), st.integers(1, 9))
def test_shards_are_those_that_cells_sorted_one_by_one_would_give(sets, shards):
    groups = [group(f"d{i}", [label for _, label in own]) for i, own in enumerate(sets)]
    stay = [np.array([kept for kept, _ in own]) for own in sets]
    found, expected = ordered(groups, stay, shards), plain(groups, stay, shards)
    batches = list(found.shards(homes(found)))
    assert [batch.to_pylist() for batch in batches] == expected
    assert np.diff(found.bounds).tolist() == [len(shard) for shard in expected]


def test_every_shard_is_a_file_even_one_without_cells(tmp_path):
    groups = [group("a", ["x"] * 5), group("b", ["y"] * 4)]
    stay = [np.ones(5, bool), np.zeros(4, bool)]
    found = ordered(groups, stay, 12)
    write_cells(found.shards(homes(found)), str(tmp_path))
    batches = []
    for number in range(12):
        with pa.ipc.open_file(cells_path(str(tmp_path), number)) as file:
            batches.append(file.get_batch(0))
    assert [batch.to_pylist() for batch in batches] == plain(groups, stay, 12)
    assert 0 in np.diff(found.bounds)
    assert {str(batch.schema.field(name).type.index_type) for batch in batches for name in ABOUT} == {"uint8"}


def test_the_order_of_a_data_set_hangs_on_no_other():
    groups = [group("a", ["x"] * 50), group("b", ["y"] * 30)]
    stay = [np.arange(50) % 7 > 0, np.arange(30) % 7 > 0]
    both, alone = ordered(groups, stay, 4), ordered(groups[1:], stay[1:], 4)
    (ids, own) = (
        [i for batch in o.shards(homes(o)) for i in batch["cell_id"].to_pylist()] for o in (both, alone)
    )
    assert own == [i for i in ids if i.startswith("b:")]


def test_names_are_hashed_a_few_at_a_time(monkeypatch):
    size = 20_000
    own = group("a", ["x"] * size)
    whole = hashed(own)
    monkeypatch.setattr(shuffle, "CHUNK", 100)
    tracemalloc.start()
    try:
        found = hashed(own)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(found, whole)
    assert peak < 20 * size
