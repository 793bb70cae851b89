import hashlib
import itertools
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
from cellray.data.shuffle import order
from cellray.data.texts import Texts
from cellray.data.units import UNKNOWN, cells_path, encode, write_cells
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
    return order(groups, Verdicts(rows=[], cells=cells, digests=digests, judged=[]), shards)


def plain(groups, stay, shards):
    """Rows of each shard, cell by cell."""
    found: list[list[tuple[int, dict]]] = [[] for _ in range(shards)]
    for own, kept in zip(groups, stay, strict=True):
        about = {name: texts.tolist() for name, texts in own.about.items()}
        for row in np.flatnonzero(kept).tolist():
            cell = f"{own.name}:c{row}"
            number = int.from_bytes(hashlib.blake2b(cell.encode(), digest_size=8).digest(), "little")
            known = {name: values[row] for name, values in about.items()}
            entry = {"cell_id": cell, "dataset": own.name, **known, "digest": 100 * row}
            found[number % shards].append((number, entry))
    return [[entry for _, entry in sorted(shard, key=lambda pair: pair[0])] for shard in found]


KEPT_AND_LABELS = st.lists(st.tuples(st.booleans(), st.sampled_from(["", "b", "a"])), min_size=1, max_size=20)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.lists(KEPT_AND_LABELS, min_size=1, max_size=4), st.integers(1, 9))
def test_shards_are_those_that_cells_sorted_one_by_one_would_give(sets, shards):
    groups = [group(f"d{i}", [label for _, label in own]) for i, own in enumerate(sets)]
    stay = [np.array([kept for kept, _ in own]) for own in sets]
    found, expected = ordered(groups, stay, shards), plain(groups, stay, shards)
    batches = list(found.shards())
    assert [batch.to_pylist() for batch in batches] == expected
    assert np.diff(found.bounds).tolist() == [len(shard) for shard in expected]
    ids = [entry["cell_id"] for shard in expected for entry in shard]
    places = found.places()
    for own, kept in zip(groups, stay, strict=True):
        names = [f"{own.name}:c{row}" for row in range(len(kept))]
        assert places[own.name].tolist() == [
            ids.index(name) if k else UNKNOWN for name, k in zip(names, kept, strict=True)
        ]


def test_every_shard_is_a_record_batch_of_the_file_even_one_without_cells(tmp_path):
    groups = [group("a", ["x"] * 5), group("b", ["y"] * 4)]
    stay = [np.ones(5, bool), np.zeros(4, bool)]
    found = ordered(groups, stay, 12)
    write_cells(found.shards(), str(tmp_path))
    with pa.ipc.open_file(cells_path(str(tmp_path))) as file:
        batches = [file.get_batch(i) for i in range(file.num_record_batches)]
    assert [batch.to_pylist() for batch in batches] == plain(groups, stay, 12)
    assert 0 in np.diff(found.bounds)
    assert {str(batch.schema.field(name).type.index_type) for batch in batches for name in ABOUT} == {"uint8"}


def test_ids_are_padded_in_the_file_as_those_of_one_array_would_be(tmp_path):
    groups = [group("a", ["x"] * 90), group("b", ["y"] * 90)]
    found = ordered(groups, [np.ones(90, bool)] * 2, 7)
    write_cells(found.shards(), str(tmp_path))
    ids = pa.array(
        [entry["cell_id"] for shard in plain(groups, [np.ones(90, bool)] * 2, 7) for entry in shard]
    )
    parts = [pa.record_batch({"cell_id": ids[a:b]}) for a, b in itertools.pairwise(found.bounds.tolist())]
    one = pa.ipc.open_file(encode(parts, parts[0].schema, packed=False))
    with pa.ipc.open_file(cells_path(str(tmp_path))) as file:
        for i in range(7):
            mine, theirs = file.get_batch(i)["cell_id"], one.get_batch(i)["cell_id"]
            assert mine.buffers()[2].to_pybytes() == theirs.buffers()[2].to_pybytes()


def test_the_order_of_a_data_set_hangs_on_no_other():
    groups = [group("a", ["x"] * 50), group("b", ["y"] * 30)]
    stay = [np.arange(50) % 7 > 0, np.arange(30) % 7 > 0]
    both, alone = ordered(groups, stay, 4), ordered(groups[1:], stay[1:], 4)
    (ids, own) = ([i for batch in o.shards() for i in batch["cell_id"].to_pylist()] for o in (both, alone))
    assert own == [i for i in ids if i.startswith("b:")]


def test_names_are_hashed_a_few_at_a_time(monkeypatch):
    size = 20_000
    groups, stay = [group("a", ["x"] * size)], [np.arange(size) % 3 > 0]
    whole = ordered(groups, stay, 5)
    monkeypatch.setattr(shuffle, "CHUNK", 100)
    tracemalloc.start()
    try:
        found = ordered(groups, stay, 5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(found.cells, whole.cells)
    assert found.cells.itemsize == 4
    assert peak < 45 * size
