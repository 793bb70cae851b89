from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data import encodings
from cellray.data.tokens import Counts


def cells(*counts, dtype=np.uint32, extra=0):
    """Cells with these counts, ids 0, 1, …; `extra` counts outside the vocabulary in each."""
    lengths = [len(c) for c in counts]
    return Counts(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate([np.arange(n) for n in lengths]).astype(np.uint16),
        np.concatenate([np.asarray(c, dtype) for c in counts]).astype(dtype),
        np.array([sum(c) + extra for c in counts], np.int64),
    )


def drawn(number=300, seed=0, most=4):
    rng = np.random.default_rng(seed)
    found = [rng.geometric(rng.uniform(0.02, 0.7), rng.integers(1, 400)) for _ in range(number)]
    return cells(*(c * rng.integers(1, 10 ** rng.integers(1, most)) for c in found))


def loop(counts, bins):
    """The usual way: quantiles of log1p(counts per million) of each cell, and between which a value lies."""
    found = []
    for first, last, total in zip(counts.offsets[:-1], counts.offsets[1:], counts.total, strict=True):
        x = np.log1p(counts.counts[first:last].astype(np.float64) * 1e6 / total)
        found.append(np.digitize(x, np.quantile(x, np.linspace(0, 1, bins - 1))))
    return np.concatenate(found)


def exact(counts, bins):
    """The same with ranks as fractions."""
    found = []
    for first, last in zip(counts.offsets[:-1], counts.offsets[1:], strict=True):
        x = sorted(int(c) for c in counts.counts[first:last])
        edges = []
        if not x:
            continue
        for k in range(bins - 1):
            rank = Fraction(k * (len(x) - 1), bins - 2)
            low, high = x[int(rank)], x[min(int(rank) + 1, len(x) - 1)]
            edges.append(low + (high - low) * (rank - int(rank)))
        found += [sum(edge <= int(c) for edge in edges) for c in counts.counts[first:last]]
    return np.array(found, int)


@pytest.mark.parametrize("bins", [3, 11, 51, 300])
def test_bins_are_those_of_quantiles_with_exact_ranks(bins):
    counts = drawn(60, seed=bins)
    found = encodings.bins(counts, bins)
    assert (counts.counts > 255).any()
    assert np.array_equal(found, exact(counts, bins))
    assert found.min() >= 1
    assert found.max() == bins - 1


def test_bins_are_those_of_the_loop_over_log_cpm():
    counts = drawn()
    mine, usual = encodings.bins(counts), loop(counts, 51)
    # Where a rank k (n - 1) / 49 is whole, floating point may put numpy's edge just above its count.
    whole = np.repeat(np.gcd(counts.lengths - 1, 49) > 1, counts.lengths)
    assert 0.05 < whole.mean() < 0.5
    assert np.array_equal(mine[~whole], usual[~whole])
    assert (mine[whole] == usual[whole]).mean() > 0.99


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 700), max_size=40), min_size=1, max_size=6),
    st.integers(3, 60),
    st.sampled_from([np.uint16, np.uint32]),
)
def test_any_counts_are_binned_exactly(counts, bins, dtype):
    counts = cells(*counts, dtype=dtype)
    assert np.array_equal(encodings.bins(counts, bins), exact(counts, bins))


def test_the_width_of_counts_changes_no_bin():
    counts = cells([1, 1, 2, 200], [7], [255, 255, 1])
    wide = encodings.bins(counts)
    for dtype in (np.uint8, np.uint16):
        narrow = Counts(counts.offsets, counts.ids, counts.counts.astype(dtype), counts.total)
        assert np.array_equal(encodings.bins(narrow), wide)


def test_the_ends_and_ties_of_bins():
    assert encodings.bins(cells([5])).tolist() == [50]
    assert encodings.bins(cells([3, 3, 3])).tolist() == [50, 50, 50]
    assert encodings.bins(cells([1, 2])).tolist() == [1, 50]
    # Half of the counts are 1: they hold the edges up to the middle.
    assert encodings.bins(cells([1, 1, 1, 2, 3])).tolist() == [25, 25, 25, 37, 50]
    assert len(encodings.bins(cells([], []))) == 0
    with pytest.raises(ValueError, match="at least 3"):
        encodings.bins(cells([1]), 2)


def test_rank_tokens_are_a_prefix():
    counts = cells([9, 8, 7], [], [5], [4, 3, 2, 1])
    first = encodings.prefix(counts, 2)
    assert first.offsets.tolist() == [0, 2, 2, 3, 5]
    assert first.counts.tolist() == [9, 8, 5, 4, 3]
    assert encodings.rank_ids(counts, 3).tolist() == [[0, 1, 2], [-1, -1, -1], [0, -1, -1], [0, 1, 2]]
    whole = encodings.prefix(counts, 9)
    assert np.array_equal(whole.counts, counts.counts)


def test_continuous_values_are_of_the_whole_depth():
    counts = cells([1, 3], [6], extra=4)
    wanted = np.log1p(np.array([1, 3, 6]) * 1e4 / np.array([8, 8, 10]))
    np.testing.assert_allclose(encodings.values(counts, "log1p_cp10k"), wanted, rtol=1e-6)
    np.testing.assert_allclose(encodings.values(counts, "log1p"), np.log1p([1, 3, 6]), rtol=1e-6)
