import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data.texts import Texts, common

SOME = st.lists(st.sampled_from(["", "a", "b", "a b", "β", "a\0"]))


def same(one, other):
    codes = one.codes.dtype == other.codes.dtype and one.codes.tolist() == other.codes.tolist()
    return codes and one.values == other.values


@settings(derandomize=True, max_examples=50, deadline=None)
@given(SOME, st.data())
def test_texts_are_read_as_an_array_of_strings_is(strings, data):
    texts, plain = Texts.of(strings), np.array(strings, object)
    assert texts.tolist() == list(texts) == np.asarray(texts).tolist() == strings
    assert texts.values == tuple(sorted(set(strings)))
    size = len(strings)
    rows = np.array(data.draw(st.lists(st.integers(0, size - 1)) if size else st.just([])), np.int64)
    mask = rows % 2 == 0
    assert texts[rows].tolist() == plain[rows].tolist()
    assert texts[rows][mask].tolist() == plain[rows][mask].tolist()
    assert texts[1:].tolist() == strings[1:]


@settings(derandomize=True, max_examples=50, deadline=None)
@given(SOME)
def test_the_same_strings_are_the_same_texts_however_they_were_made(strings):
    texts = Texts.of(strings)
    doubled = Texts.of(["z", *strings, "0"])[1:-1]
    words = ["unused", *reversed(texts.values), *texts.values]
    assert same(doubled, texts)
    assert same(Texts.coded(len(words) - len(texts.values) + texts.codes.astype(int), words), texts)
    assert same(Texts.full(len(strings), "a"), Texts.of(["a"] * len(strings)))


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(SOME, min_size=1))
def test_several_texts_have_one_numbering_in_common(several):
    words, numbers = common([Texts.of(strings) for strings in several])
    assert words == tuple(sorted({text for strings in several for text in strings}))
    for strings, own in zip(several, numbers, strict=True):
        assert [words[number] for number in own[Texts.of(strings).codes]] == strings


@pytest.mark.parametrize(("kinds", "size"), [(1, 1), (256, 1), (257, 2), (65_537, 4)])
def test_a_string_takes_no_more_bytes_than_the_number_of_kinds_wants(kinds, size):
    assert Texts.of([str(i) for i in range(kinds)]).codes.itemsize == size
    assert Texts.of([str(i) for i in range(kinds)])[:1].codes.itemsize == 1


def test_some_of_many_are_sent_without_the_others():
    many = Texts.of([str(i) for i in range(5_000)])
    assert len(pickle.dumps(many)) > 20_000
    assert len(pickle.dumps(many[:5])) < 500
    assert same(pickle.loads(pickle.dumps(many)), many)  # noqa: S301, our own


def test_a_missing_string_is_no_string():
    with pytest.raises(AssertionError, match="a string is missing"):
        Texts.of(np.array(["a", None], object))
