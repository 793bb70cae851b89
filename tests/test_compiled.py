import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data import compiled


def csr(cells=30, features=12, *, mean=0.8, seed=0):
    matrix = sp.csr_matrix(np.random.default_rng(seed).poisson(mean, (cells, features)))
    return matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data.astype(np.uint32)


def dense(indptr, ids, counts, features):
    return sp.csr_matrix((counts.astype(np.int64), ids, indptr), shape=(len(indptr) - 1, features)).toarray()


MEANS = {
    "some": lambda rng, shape: rng.choice([1.0, 1.5, 2.0, 1e-3, 3e5], shape),
    "any": lambda rng, shape: rng.lognormal(0, 2, shape),
    "all but equal": lambda rng, shape: 1 + rng.integers(0, 50, shape) / 1e6,
}


@given(
    st.integers(0, 10_000),
    st.sampled_from([1, 40, 2_000]),
    st.sampled_from([0.1, 1.0, 30.0]),
    st.sampled_from([1, 2**32 - 1]),
    st.sampled_from(sorted(MEANS)),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_ranks_equal_a_plain_sort(seed, features, mean, most, means):
    rng = np.random.default_rng(seed)
    indptr, ids, counts = csr(8, features, mean=mean, seed=seed)
    counts[:1] = most  # which makes the digits that are sorted by coarser
    weights = (1 / MEANS[means](rng, (2, features))).astype(np.float32)
    assay = rng.integers(0, 2, 8)
    offsets, *found = compiled.ranked(indptr, ids, counts, weights, assay)
    np.testing.assert_array_equal(offsets, indptr)
    for cell in range(8):
        own = slice(indptr[cell], indptr[cell + 1])
        ratio = counts[own].astype(np.float32) * weights[assay[cell], ids[own]]
        order = np.lexsort((ids[own], -ratio))
        np.testing.assert_array_equal(found[0][own], ids[own][order])
        np.testing.assert_array_equal(found[1][own], counts[own][order])


@pytest.mark.parametrize("size", [7, 3000, 5_000_000])
def test_projection_equals_a_matrix_product(size):
    rng = np.random.default_rng(size)
    indptr, ids, counts = csr(20, 30, seed=size)
    for target in (np.sort(rng.integers(-1, size, 30)), rng.integers(-1, size, 30), np.full(30, -1)):
        found = compiled.projected(indptr, ids, counts, target.astype(np.int32))
        kept = target >= 0
        places, at = np.unique(target[kept], return_inverse=True)
        onto = np.zeros((30, len(places)), np.int64)
        onto[np.flatnonzero(kept), at] = 1
        expected = dense(indptr, ids, counts, 30) @ onto
        got = sp.csr_matrix((found[2].astype(np.int64), found[1], found[0]), shape=(20, size))
        assert got.has_canonical_format
        assert got.nnz == (expected > 0).sum()
        np.testing.assert_array_equal(got[:, places].toarray(), expected)


def test_projection_leaves_zeros_out_and_refuses_what_overflows():
    indptr, ids = np.array([0, 2]), np.array([0, 1], np.int32)
    none = compiled.projected(indptr, ids, np.array([0, 3], np.uint32), np.array([0, 1], np.int32))
    assert [part.tolist() for part in none] == [[0, 1], [1], [3]]
    with pytest.raises(ValueError, match="4,294,967,295"):
        compiled.projected(indptr, ids, np.array([2**32 - 1, 1], np.uint32), np.zeros(2, np.int32))


def test_a_tally_adds_the_cells_of_each_group():
    indptr, ids, counts = csr()
    group = np.arange(30) % 3 - 1
    sums, nonzero = np.zeros((2, 2, 12), np.int64)
    compiled.tally(indptr, ids, counts, group, sums, nonzero)
    whole = dense(indptr, ids, counts, 12)
    for g in (0, 1):
        np.testing.assert_array_equal(sums[g], whole[group == g].sum(0))
        np.testing.assert_array_equal(nonzero[g], (whole[group == g] > 0).sum(0))


def test_ranks_of_some_rows_and_features_are_those_of_what_was_projected_first():
    rng = np.random.default_rng(3)
    indptr, ids, counts = csr(30, 12, mean=1.5)
    target = np.where(rng.random(12) < 0.3, -1, np.sort(rng.choice(40, 12, replace=False))).astype(np.int32)
    weights = rng.random((2, 40)).astype(np.float32) + 0.1
    rows, assay = rng.permutation(30)[:17], rng.integers(0, 2, 17)
    narrowed = ids.astype(np.uint16), counts.astype(np.uint8)
    found = compiled.ranked(indptr, *narrowed, weights, assay, rows=rows, target=target)
    slow = sp.csr_matrix((counts, ids, indptr), shape=(30, 12))[rows]
    moved = compiled.projected(slow.indptr.astype(np.int64), slow.indices, slow.data, target)
    for one, other in zip(found, compiled.ranked(*moved, weights, assay), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(AssertionError, match="rise"):
        compiled.ranked(indptr, ids, counts, weights, assay, rows=rows, target=target[::-1].copy())


def test_row_sums_are_those_of_a_matrix():
    indptr, ids, counts = csr(mean=3.0)
    np.testing.assert_array_equal(compiled.sums(indptr, counts), dense(indptr, ids, counts, 12).sum(1))


def test_rows_of_several_files_are_ranked_each_with_its_own_features():
    rng = np.random.default_rng(4)
    indptr, ids, counts = csr(30, 12, mean=1.5)
    onto = [np.where(rng.random(12) < 0.3, -1, np.sort(rng.choice(40, 12, replace=False))) for _ in range(3)]
    target = np.concatenate(onto).astype(np.int32)
    weights = rng.random((2, 40)).astype(np.float32) + 0.1
    rows, assay, file = rng.permutation(30)[:17], rng.integers(0, 2, 17), rng.integers(0, 3, 17)
    offsets, *found = compiled.ranked(
        indptr, ids, counts, weights, assay, rows=rows, target=target, base=12 * file
    )
    for i in range(17):
        alone = {"rows": rows[i : i + 1], "target": onto[file[i]].astype(np.int32)}
        _, *expected = compiled.ranked(indptr, ids, counts, weights, assay[i : i + 1], **alone)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one[offsets[i] : offsets[i + 1]], other)
    some = compiled.known(indptr, ids, rows, np.where(target > 30, target, -1), 12 * file)
    whole = dense(indptr, ids, counts, 12)[rows] > 0
    assert some.tolist() == [bool((whole[i] & (onto[file[i]] > 30)).any()) for i in range(17)]
    assert some.any()
    assert not some.all()


@pytest.mark.parametrize("sorted_already", [True, False])
@pytest.mark.parametrize("most", [3, 300, 70_000])
def test_measured_cells_are_those_projected(sorted_already, most):
    rng = np.random.default_rng(most)
    indptr, ids, counts = csr(20, 12, mean=1.2)
    counts[5] = most
    target = np.arange(12) * 2 if sorted_already else rng.integers(-1, 24, 12)
    target[3] = -1
    mito, hashes = np.arange(24) < 9, rng.integers(1, 1 << 60, 24, dtype=np.uint64)
    asked = target.astype(np.int32), hashes, mito
    offsets, features, found, cells = compiled.measured(indptr, ids, counts, *asked)
    moved = dense(*compiled.projected(indptr, ids, counts, asked[0]), 24)
    np.testing.assert_array_equal(dense(offsets, features, found, 24), moved)
    assert found.dtype == {3: np.uint8, 300: np.uint16, 70_000: np.uint32}[most]
    np.testing.assert_array_equal(cells.counts, moved.sum(1))
    np.testing.assert_array_equal(cells.features, (moved > 0).sum(1))
    np.testing.assert_array_equal(cells.mito, moved[:, :9].sum(1))


def test_rows_taken_are_those_of_a_matrix_in_the_order_asked_for():
    indptr, ids, counts = csr(20, 12, mean=1.2)
    rows = np.random.default_rng(0).permutation(20)[:13].astype(np.int32)
    found = compiled.taken(indptr, ids.astype(np.uint16), counts.astype(np.uint8), rows)
    assert (found[1].dtype, found[2].dtype) == (np.uint16, np.uint8)
    np.testing.assert_array_equal(dense(*found, 12), dense(indptr, ids, counts, 12)[rows])
