import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data.ranking import by_rank, pooled_weight
from cellray.data.tokens import Counts
from tests import tiny


def same(a, b):
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("offsets", "ids", "counts", "total"))


def ranked(cells, seed=0, assay=""):
    matrix = tiny.counts(cells, seed=seed)
    return tiny.tokenizer().rank("rna", matrix, matrix.sum(axis=1).A1, [assay] * cells)


def shuffled(counts, seed):
    """The same cells, the tokens of each in any order."""
    cells = np.repeat(np.arange(len(counts)), counts.lengths)
    order = np.lexsort((np.random.default_rng(seed).random(len(cells)), cells))
    return Counts(counts.offsets, counts.ids[order], counts.counts[order], counts.total)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_any_order_becomes_that_of_the_tokenizer(cells, seed):
    wanted, weight = ranked(cells, seed), pooled_weight(tiny.tokenizer(), "rna")
    assert same(by_rank(shuffled(wanted, seed), weight), wanted)
    assert same(by_rank(ranked(cells, seed, assay="10x"), weight), wanted)


def test_what_is_in_order_comes_back_as_it_is():
    wanted = ranked(5)
    assert by_rank(wanted, pooled_weight(tiny.tokenizer(), "rna")) is wanted
    none = wanted.take(np.empty(0, np.int64))
    assert by_rank(none, pooled_weight(tiny.tokenizer(), "rna")) is none


def test_ties_come_in_id_order():
    cells = Counts(np.array([0, 3, 5]), np.array([2, 0, 1, 1, 0]), np.full(5, 2), np.array([6, 4]))
    assert by_rank(cells, np.ones(3, np.float32)).ids.tolist() == [0, 1, 2, 0, 1]
