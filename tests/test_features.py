import numpy as np
import pytest
import scipy.sparse as sp

from cellray.data.features import Tally, merge_columns, targets, vocabulary
from cellray.data.modalities import RNA
from cellray.data.tokens import POOLED


def counts(cells=40, features=9, seed=0):
    return sp.csr_matrix(np.random.default_rng(seed).poisson(0.5, (cells, features)).astype(np.int64))


def tally(counts, assays):
    found = Tally(counts.shape[1])
    dense, assays = counts.toarray(), np.asarray(assays, dtype=str)
    for assay in sorted(set(assays.tolist())):
        mine = dense[assays == assay]
        found.add(assay, mine.sum(0), (mine > 0).sum(0), len(mine))
    return found


def test_merged_columns_equal_a_matrix_product():
    whole = counts()
    target = np.array([2, -1, 0, 2, 4, 4, -1, 1, 2], np.int32)
    onto = np.zeros((9, 5), np.int64)
    for column, to in enumerate(target):
        if to >= 0:
            onto[column, to] = 1
    merged = merge_columns(whole, target, 5)
    assert merged.has_canonical_format
    np.testing.assert_array_equal(merged.toarray(), whole.toarray() @ onto)


def test_tallies_add_up_in_any_order():
    whole, assays = counts(), np.array(["v2", "v3", ""])[np.arange(40) % 3]
    found = tally(whole, assays)
    again = Tally(9)
    for first in (35, 14, 0, 28, 7, 21):
        again.update(tally(whole[first : first + 7], assays[first : first + 7]))
    assert again.cells == found.cells == {"v2": 14, "v3": 13, "": 13}
    for assay in found.sums:
        np.testing.assert_array_equal(again.sums[assay], found.sums[assay])
        np.testing.assert_array_equal(again.nonzero[assay], found.nonzero[assay])


def two_files(min_cells):
    one, other = counts(20, 3, seed=1), counts(30, 2, seed=2)
    names = [np.array(["g2", "g0", "g9"], object), np.array(["g0", "g1"], object)]
    symbols = [np.array(["", "zero", "nine"], object), np.array(["other", ""], object)]
    words = vocabulary(RNA, names, symbols, [tally(one, ["v2"] * 20), tally(other, ["v3"] * 30)], min_cells)
    return words, one.toarray(), other.toarray()


def test_a_vocabulary_is_the_sorted_union_with_statistics_by_assay_and_pooled():
    words, one, other = two_files(1)
    assert words.ids == ("g0", "g1", "g2", "g9")
    assert words.symbols == ("zero", "", "", "nine")
    np.testing.assert_array_equal(words.sums["v2"], [one[:, 1].sum(), 0, one[:, 0].sum(), one[:, 2].sum()])
    np.testing.assert_array_equal(words.sums["v3"], [other[:, 0].sum(), other[:, 1].sum(), 0, 0])
    np.testing.assert_array_equal(words.sums[POOLED], words.sums["v2"] + words.sums["v3"])
    np.testing.assert_array_equal(words.nonzero[POOLED], words.nonzero["v2"] + words.nonzero["v3"])
    assert words.cells == {"v2": 20, "v3": 30, POOLED: 50}


def test_features_in_too_few_cells_are_left_out():
    every = two_files(1)[0]
    least = int(np.sort(every.nonzero[POOLED])[2])
    words = two_files(least)[0]
    keep = every.nonzero[POOLED] >= least
    assert words.ids == tuple(np.array(every.ids)[keep])
    with pytest.raises(ValueError, match="rna: no feature is counted in 1,000 cells or more"):
        two_files(1000)


def test_cells_without_an_assay_count_in_the_pooled_statistics_once():
    words = vocabulary(
        RNA, [np.array(["a"], object)], [np.array([""], object)], [tally(counts(5, 1), [""] * 5)], 1
    )
    assert words.cells == {POOLED: 5}
    np.testing.assert_array_equal(words.sums[POOLED], counts(5, 1).toarray().sum(0))


def test_targets_are_by_id_alone():
    words = two_files(1)[0]
    assert targets(np.array(["g9", "zero", "zz", "", "g0"], object), words).tolist() == [3, -1, -1, -1, 0]
