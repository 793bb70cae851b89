import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data.modalities import ATAC, RNA
from cellray.data.tokens import POOLED, Counts, Tokenizer, Vocabulary, gather, narrow


def matrix(cells=30, features=12, seed=0):
    return sp.csr_matrix(np.random.default_rng(seed).poisson(0.8, (cells, features)).astype(np.int64))


def words(modality=RNA, features=12, seed=0, assays=("v2", "v3")):
    rng = np.random.default_rng(seed)
    sums = {assay: rng.integers(0, 500, features) for assay in assays}
    nonzero = {assay: np.minimum(sums[assay], rng.integers(1, 90, features)) for assay in assays}
    sums[POOLED], nonzero[POOLED] = sum(sums.values()), sum(nonzero.values())
    ids = tuple(f"{modality.name}{i:02d}" for i in range(features))
    symbols = tuple(f"S{i}" if i % 2 else "" for i in range(features))
    return Vocabulary(modality, ids, symbols, sums, nonzero, dict.fromkeys(sums, 100))


def tokenizer():
    return Tokenizer({"rna": words(), "atac": words(ATAC, 5, seed=1)})


def reference(row, means):
    """Ids and counts of one cell in rank order, one comparison after the other."""
    weight = (1 / means).astype(np.float32)
    found = [(-(np.float32(count) * weight[i]), i, count) for i, count in enumerate(row) if count > 0]
    return [(i, count) for _, i, count in sorted(found)]


def test_ranks_equal_a_plain_sort_of_each_cell():
    counts, vocabulary = matrix(), words()
    assays = ["v2", "v3", "unseen"] * 10
    ranked = Tokenizer({"rna": vocabulary}).rank("rna", counts, np.arange(30), assays)
    for cell in range(30):
        start, stop = ranked.offsets[cell : cell + 2]
        found = list(zip(ranked.ids[start:stop].tolist(), ranked.counts[start:stop].tolist(), strict=True))
        assert found == reference(counts.toarray()[cell], vocabulary.means(assays[cell]))
    np.testing.assert_array_equal(ranked.total, np.arange(30))
    np.testing.assert_array_equal(ranked.matrix(12).toarray(), counts.toarray())


def test_ties_keep_id_order():
    flat = Vocabulary(
        RNA, tuple("abcd"), ("",) * 4, {POOLED: np.ones(4, int)}, {POOLED: np.ones(4, int)}, {POOLED: 1}
    )
    ranked = Tokenizer({"rna": flat}).rank("rna", sp.csr_matrix([[2, 3, 2, 3]]), np.array([10]), [""])
    assert ranked.ids.tolist() == [1, 3, 0, 2]


def test_cells_do_not_change_each_others_ranks():
    counts, assays = matrix(), ["v2", "v3"] * 15
    together = tokenizer().rank("rna", counts, np.zeros(30), assays)
    for cell in (0, 7, 29):
        alone = tokenizer().rank("rna", counts[cell], np.zeros(1), [assays[cell]])
        start, stop = together.offsets[cell : cell + 2]
        np.testing.assert_array_equal(alone.ids, together.ids[start:stop])


def test_no_cells_and_empty_cells_give_no_tokens():
    none = tokenizer().rank("rna", matrix()[:0], np.empty(0), [])
    assert (len(none), none.offsets.tolist(), len(none.ids)) == (0, [0], 0)
    empty = tokenizer().rank("rna", sp.csr_matrix((3, 12)), np.zeros(3), ["v2"] * 3)
    assert empty.lengths.tolist() == [0, 0, 0]


def test_stored_zeros_are_no_tokens():
    counts = sp.csr_matrix((np.array([0, 2]), np.array([0, 1]), np.array([0, 2])), (1, 12))
    assert tokenizer().rank("rna", counts, np.array([2]), ["v2"]).ids.tolist() == [1]


def test_unseen_assays_and_uncounted_features_take_the_pooled_mean():
    v = Vocabulary(
        RNA, ("a", "b"), ("", ""),
        {"x": np.array([6, 0]), POOLED: np.array([8, 9])},
        {"x": np.array([2, 0]), POOLED: np.array([4, 3])},
        {"x": 2, POOLED: 9},
    )  # fmt: skip
    assert v.means("x").tolist() == [3.0, 3.0]
    assert v.means("new").tolist() == [2.0, 3.0]


def test_features_counted_nowhere_rank_by_their_count():
    sums, nonzero = np.array([8, 0, 0]), np.array([4, 0, 0])
    v = Vocabulary(RNA, tuple("abc"), ("",) * 3, {POOLED: sums}, {POOLED: nonzero}, {POOLED: 4})
    assert v.means("").tolist() == [2.0, 1.0, 1.0]
    ranked = Tokenizer({"rna": v}).rank("rna", sp.csr_matrix([[6, 2, 5]]), np.array([13]), [""])
    assert ranked.ids.tolist() == [2, 0, 1]


def test_ids_are_as_narrow_as_the_vocabulary_allows():
    assert tokenizer().rank("rna", matrix(), np.zeros(30), ["v2"] * 30).ids.dtype == np.uint8
    assert [narrow(n) for n in (256, 257, 65_536, 65_537)] == [np.uint8, np.uint16, np.uint16, np.uint32]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=8), st.data())
def test_taking_rows_equals_taking_lists(lists, data):
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in lists])]).astype(np.int64)
    flat = np.array([x for row in lists for x in row], np.uint8)
    counts = Counts(offsets, flat, flat.astype(np.uint32), np.arange(len(lists)))
    rows = np.array(data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=10)), np.int64)
    taken = counts.take(rows)
    cut = [taken.ids[a:b].tolist() for a, b in zip(taken.offsets[:-1], taken.offsets[1:], strict=True)]
    assert cut == [lists[row] for row in rows]
    assert taken.total.tolist() == rows.tolist()
    assert gather(offsets, rows)[0].tolist() == taken.offsets.tolist()


def test_symbols_find_features_unless_ambiguous_and_ids_win():
    same = {POOLED: np.ones(4, int)}
    v = Vocabulary(RNA, ("g1", "g2", "g3", "A"), ("A", "B", "B", ""), same, same, {POOLED: 1})
    assert v.index["A"] == 3
    assert "B" not in v.index
    assert v.index["g2"] == 1


def test_a_tokenizer_comes_back_from_arrow_whole():
    before = tokenizer()
    sink = pa.BufferOutputStream()
    table = before.to_arrow()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    after = Tokenizer.from_arrow(pa.ipc.open_file(sink.getvalue()).read_all())
    assert after.hash == before.hash
    assert after.modalities == before.modalities
    for name, vocabulary in before.vocabularies.items():
        assert after.vocabularies[name].symbols == vocabulary.symbols
        assert after.vocabularies[name].cells == vocabulary.cells
        for assay in vocabulary.sums:
            np.testing.assert_array_equal(after.vocabularies[name].sums[assay], vocabulary.sums[assay])


def test_whatever_decides_a_token_changes_the_hash():
    base = tokenizer()
    changed = [
        Tokenizer({"rna": words()}),
        Tokenizer({"rna": words(seed=2), "atac": base.vocabularies["atac"]}),
        Tokenizer({"rna": words(features=11), "atac": base.vocabularies["atac"]}),
        Tokenizer({"rna": words(assays=("v2", "v4")), "atac": base.vocabularies["atac"]}),
    ]
    assert len({t.hash for t in (base, *changed)}) == 5
    assert tokenizer().hash == base.hash


def test_a_changed_vocabulary_is_refused():
    table = tokenizer().to_arrow()
    ids = table["id"].to_pylist()
    ids[0] = "swapped"
    other = table.set_column(table.schema.get_field_index("id"), "id", pa.array(ids))
    with pytest.raises(ValueError, match="the file was changed"):
        Tokenizer.from_arrow(other)
    with pytest.raises(ValueError, match="no cellray vocabulary"):
        Tokenizer.from_arrow(pa.table({"id": ["a"]}))
