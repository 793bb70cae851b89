"""Tensors of a batch against the plainest way to make them, number for number."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data.modalities import RNA, scaled
from cellray.data.tokens import Counts
from cellray.model.encoder import Encoder
from cellray.train import batches
from cellray.train.batches import asked_features, kept, masked_tokens, targets
from cellray.train.feed import mix, stir, uniform
from tests.attentive import attentive

FEATURES = 40


def cells(lengths, seed):
    """Cells that count so many of the features, in any order."""
    random = np.random.default_rng(seed)
    ids = [random.permutation(FEATURES)[:n] for n in lengths]
    offsets = np.cumsum([0, *lengths])
    counts = random.integers(1, 9, offsets[-1]).astype(np.uint16)
    total = np.add.reduceat(np.append(counts, 0), offsets[:-1]).astype(np.int64) + 3
    flat = np.concatenate([np.empty(0, np.int64), *ids]).astype(np.uint16)
    return Counts(offsets.astype(np.int64), flat, counts, total)


def masked_one(counts, i, row, context, mask, zeros, keys):
    """(feature, value, asked) of cell i in order, one by one."""
    mine = slice(counts.offsets[i], counts.offsets[i + 1])
    ids, n = counts.ids[mine].tolist(), counts.lengths[i]
    values = scaled(counts.counts[mine], np.repeat(counts.total[i], n), "log1p_cp10k").tolist()
    share = mask[0] + (mask[1] - mask[0]) * float(uniform(*keys, row, 0))
    hidden = [float(uniform(*keys, 1, row, feature)) < share for feature in ids]
    drawn = {int(mix(*keys, row, turn, 2) % np.uint64(FEATURES)) for turn in range(int(np.ceil(zeros * n)))}
    absent = [(feature, 0.0) for feature in sorted(drawn - set(ids))]
    asked = absent + [(f, v) for f, v, h in zip(ids, values, hidden, strict=True) if h]
    asked.sort(key=lambda token: float(uniform(*keys, row, token[0], 3)))
    seen = [(f, v, False) for f, v, h in zip(ids, values, hidden, strict=True) if not h]
    asked = [(f, v, True) for f, v in asked]
    return [*asked[: context // 2], *seen, *asked[context // 2 :]]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    lengths=st.lists(st.integers(0, FEATURES), min_size=1, max_size=6),
    context=st.integers(1, 30),
    mask=st.sampled_from([(0.0, 0.0), (0.2, 0.6), (0.9, 0.95)]),
    zeros=st.sampled_from([0.0, 0.25, 1.0]),
    seed=st.integers(0, 99),
)
def test_masked_tokens_are_those_made_cell_by_cell(lengths, context, mask, zeros, seed):
    counts, rows = cells(lengths, seed), np.random.default_rng(seed).permutation(1_000)[: len(lengths)]
    modality, keys = dataclasses.replace(RNA, context=context), (7, seed)
    tokens, at, truth = masked_tokens(counts, rows, modality, FEATURES, mask=mask, zeros=zeros, keys=keys)
    every = [masked_one(counts, i, row, context, mask, zeros, keys) for i, row in enumerate(rows.tolist())]
    flat = [token for cell in every for token in cell]
    assert tokens.ids.tolist() == [feature for feature, _, _ in flat]
    assert tokens.values.tolist() == [value for _, value, _ in flat]
    assert tokens.hidden.tolist() == [asked for _, _, asked in flat]
    assert tokens.offsets.tolist() == np.cumsum([0, *map(len, every)]).tolist()
    asked = [first + i for first, cell in zip(tokens.offsets.tolist(), every, strict=False)
             for i in range(min(len(cell), context)) if cell[i][2]]  # fmt: skip
    assert at.tolist() == asked
    assert truth.tolist() == [flat[i][1] for i in asked]


@pytest.mark.parametrize("last", [3, 5_000])
def test_tokens_that_draw_alike_stay_as_they_come(last):
    random = np.random.default_rng(0)
    cell = np.append(random.integers(0, 3, 400), last)
    draw = random.integers(0, 5, 401).astype(np.uint64) << np.uint64(40)
    assert np.array_equal(batches._sorted(cell, draw), np.lexsort((draw, cell)))


def test_tokens_are_dropped_by_their_own_draw_alone():
    counts, rows, share = cells([9, 0, 30], 1), np.array([4, 90, 17]), np.array([0.2, 0.5, 0.8])
    found = kept(counts, rows, share, 11, 12)
    for i, row in enumerate(rows.tolist()):
        mine = slice(counts.offsets[i], counts.offsets[i + 1])
        plain = [float(uniform(11, 12, row, f)) >= share[i] for f in counts.ids[mine].tolist()]
        assert found[mine].tolist() == plain


def test_keys_can_be_mixed_one_after_the_other():
    rows, ids = np.array([3, 1 << 40]), np.arange(5, dtype=np.uint16)
    for row in rows:
        assert np.array_equal(stir(mix(9, row), ids), mix(9, int(row), ids))
    assert int(stir(mix(1), 2)) == int(mix(1, 2))
    assert [int(mix(1, 2, 3)), int(mix(-1))] == [7702586659592502839, 16490336266968443936]


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(2, 300), st.integers(1, 299), st.integers(0, 9))
def test_features_asked_are_those_that_draw_least(features, most, seed):
    asked = asked_features(features, most, seed)
    if features <= most:
        assert asked is None
    else:
        draws = [int(mix(seed, feature)) for feature in range(features)]
        assert asked is not None
        assert asked.tolist() == sorted(sorted(range(features), key=draws.__getitem__)[:most])
        counts = cells([20, 3], seed)
        if features == FEATURES:
            dense = counts.matrix(features).toarray()
            assert np.array_equal(targets(counts, features, asked), dense[:, asked])


@pytest.mark.parametrize("context", [8, 64])
def test_states_asked_for_are_those_of_their_tokens_with_the_same_gradients(context):
    torch.manual_seed(0)
    encoder, withheld = attentive(Encoder(FEATURES, 8, 1, 2, context)), torch.randn(8)
    modality = dataclasses.replace(RNA, context=context)
    counts = cells([30, 4, 0, 17, 40], 2)
    tokens, at, _ = masked_tokens(
        counts, np.arange(5), modality, FEATURES, mask=(0.3, 0.3), zeros=0.2, keys=(1, 2)
    )
    weight = torch.randn(len(at), 8)
    found = []
    for few in (True, False):
        encoder.zero_grad()
        encoded = encoder(tokens, withheld)
        states = encoded.at(at) if few else encoded.states[at]
        (states * weight).sum().backward()
        found.append([states, *(p.grad for p in encoder.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
