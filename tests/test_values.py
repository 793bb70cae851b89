import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data import encodings
from cellray.data.programmes import Groups
from cellray.data.tokens import Counts
from cellray.model.encoder import Encoder, Tokens
from cellray.model.teacher import some_cells
from cellray.model.values import (
    BINS,
    ENCODINGS,
    FIRST,
    OCTAVE,
    OCTAVES,
    Binned,
    Ranked,
    Scaled,
    bucket,
    ranks,
)
from cellray.train.batches import kept, masked_tokens, plain_tokens
from cellray.train.feed import Share
from cellray.train.fit import adamw, step
from cellray.train.masks import Grouped
from cellray.train.recipe import Network, Optim
from cellray.train.stages import Joint, Unimodal
from tests import stores
from tests.attentive import attentive

KEYS = (1, 2)
HIDDEN = torch.full((32,), 0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return stores.run(tmp_path_factory.mktemp("run"))


def encoder(encoding, features=120):
    torch.manual_seed(0)
    return attentive(Encoder(features, 32, layers=1, heads=2, context=40, encoding=encoding))


def masked(run, counts, encoding, mask=(0.3, 0.5)):
    rna, rows = run.tokenizer.vocabularies["rna"], np.arange(len(counts))
    return masked_tokens(
        counts, rows, rna.modality, len(rna), mask=mask, zeros=0.5, keys=KEYS, encoding=encoding
    )


def some_tokens(hidden, lengths):
    count = int(np.sum(lengths))
    g = torch.Generator().manual_seed(0)
    return Tokens(
        torch.randint(120, (count,), generator=g),
        torch.randint(1, BINS, (count,), generator=g).float(),
        torch.as_tensor(hidden, dtype=torch.bool),
        torch.tensor([0, *np.cumsum(lengths)]),
        torch.ones(len(lengths)),
    )


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.lists(st.booleans(), max_size=30), min_size=1, max_size=6))
def test_ranks_are_counted_among_the_visible_tokens_of_a_cell(cells):
    tokens = some_tokens([h for cell in cells for h in cell], [len(cell) for cell in cells])
    wanted, visible = [], []
    for cell in cells:
        seen = 0
        for hidden in cell:
            wanted.append(seen)
            seen += not hidden
        visible += [seen] * len(cell)
    rank, found = ranks(tokens)
    assert rank.tolist() == wanted
    assert found.tolist() == visible


def test_a_rank_has_a_vector_of_its_own_or_shares_one_within_an_eighth_of_a_doubling():
    found = bucket(torch.arange(70_000)).numpy()
    assert found[:FIRST].tolist() == list(range(FIRST))
    assert (np.diff(found) >= 0).all()
    for rank in (16, 17, 31, 32, 33, 100, 1023, 1024, 65_535):
        edges = [FIRST * 2 ** (k / OCTAVE) for k in range(OCTAVE * OCTAVES)]
        assert found[rank] == FIRST + sum(edge <= rank for edge in edges) - 1, rank
    assert found[-1] == found[65_536] == FIRST + OCTAVE * OCTAVES - 1
    assert set(np.diff(found[FIRST:]).tolist()) <= {0, 1, 2}


def test_scaled_counts_are_read_as_they_always_were():
    torch.manual_seed(0)
    reading, tokens = Scaled(32), some_tokens([True, False, False, True, False], [3, 2])
    codes, weights = reading.read(tokens, torch.tensor(2.0))
    wanted = torch.where(tokens.hidden, 0.0, tokens.values / 2)
    assert torch.equal(weights, wanted)
    plain = reading[2](reading[1](reading[0](wanted[:, None])))  # of few rows, which round as they like
    torch.testing.assert_close(reading(codes), plain, atol=1e-6, rtol=1e-5)
    assert set(Scaled(32).state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_bins_and_ranks_weigh_features_by_themselves():
    tokens = some_tokens([True, False, False, False, True, False], [4, 2])
    tokens.values[:] = torch.tensor([9.0, 50, 25, 1, 7, 50])
    codes, weights = Binned(8).read(tokens, torch.tensor(3.0))
    assert codes.tolist() == [0, 50, 25, 1, 0, 50]
    torch.testing.assert_close(weights, torch.tensor([0, 2.0, 1.0, 0.04, 0, 2.0]))
    codes, weights = Ranked(8).read(tokens, torch.tensor(3.0))
    assert codes.tolist() == [0, 0, 1, 2, 0, 0]
    torch.testing.assert_close(weights, torch.tensor([0, 5 / 3, 1, 1 / 3, 0, 1.0]))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_stands_at_a_hidden_place_is_not_read(run, encoding):
    tokens = masked(run, run.store.read(np.arange(40)).counts["rna"], encoding)[0]
    strange = torch.where(tokens.hidden, math.nan, tokens.values)
    other = Tokens(tokens.ids, strange, tokens.hidden, tokens.offsets, tokens.depth)
    model = encoder(encoding)
    with torch.inference_mode():
        a, b = model(tokens, HIDDEN), model(other, HIDDEN)
    assert torch.isfinite(a.states).all()
    assert torch.equal(a.summary, b.summary)
    assert torch.equal(a.states, b.states)


GROUPS = Groups.of({f"g{i}": np.arange(i * 7, i * 7 + 12) for i in range(15)}, 120)


@pytest.mark.parametrize("mask", [(0.3, 0.5), Grouped(GROUPS, (0.3, 0.5), 0.7)], ids=["tokens", "groups"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_another_count_at_a_hidden_place_changes_nothing_but_the_target(run, encoding, mask):
    rows, size = np.arange(40), len(run.tokenizer.vocabularies["rna"])
    counts = run.store.read(rows).counts["rna"]
    cell = np.repeat(rows, counts.lengths)
    tokens, at, truth = masked(run, counts, encoding, mask=mask)
    owner = np.repeat(rows, np.diff(tokens.offsets.numpy()))
    hidden = np.zeros((40, size), bool)
    hidden[owner, tokens.ids.numpy()] = tokens.hidden.numpy()
    raised = np.where(hidden[cell, counts.ids], counts.counts.astype(np.int64) * 31 + 5, counts.counts)
    matrix = Counts(counts.offsets, counts.ids, raised, counts.total).matrix(size)
    # Stored anew, so that the changed counts move to where they rank now.
    stored = run.tokenizer.rank("rna", matrix, counts.total, [""] * 40)
    assert not np.array_equal(stored.ids, counts.ids)
    others, at_too, other_truth = masked(run, stored, encoding, mask=mask)
    assert torch.equal(tokens.ids, others.ids)
    assert torch.equal(at, at_too)
    assert (other_truth != truth).sum() == (truth > 0).sum() > 0
    model = encoder(encoding)
    with torch.inference_mode():
        a, b = model(tokens, HIDDEN), model(others, HIDDEN)
    assert torch.equal(a.summary, b.summary)
    assert torch.equal(a.states, b.states)


def test_what_is_asked_and_its_truth_are_the_same_for_every_encoding(run):
    counts = run.store.read(np.arange(60)).counts["rna"]
    first, *others = [masked(run, counts, encoding) for encoding in ENCODINGS]
    for tokens, at, truth in others:
        for name in ("ids", "hidden", "offsets", "depth"):
            assert torch.equal(getattr(tokens, name), getattr(first[0], name))
        assert torch.equal(at, first[1])
        assert torch.equal(truth, first[2])


def test_bins_are_those_of_a_cell_that_has_the_visible_counts_alone(run):
    counts = run.store.read(np.arange(20)).counts["rna"]
    hidden = ~kept(counts, np.arange(20), 0.4, *KEYS, 1)
    tokens = masked(run, counts, "bins", mask=(0.4, 0.4))[0]
    dropped = plain_tokens(counts, run.tokenizer.vocabularies["rna"].modality, keep=~hidden, encoding="bins")
    at = 0
    for i in range(20):
        own = slice(counts.offsets[i], counts.offsets[i + 1])
        seen = ~hidden[own]
        alone = Counts(
            np.array([0, seen.sum()]), counts.ids[own][seen], counts.counts[own][seen], counts.total[:1]
        )
        wanted = dict(zip(alone.ids.tolist(), encodings.bins(alone, BINS).tolist(), strict=True))
        span = slice(int(tokens.offsets[i]), int(tokens.offsets[i + 1]))
        shown = ~tokens.hidden[span]
        found = zip(tokens.ids[span][shown].tolist(), tokens.values[span][shown].tolist(), strict=True)
        assert dict(found) == wanted
        assert dropped.values[at : at + len(wanted)].tolist() == list(wanted.values())
        at += len(wanted)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_cell_alone_equals_the_cell_in_a_batch_whatever_the_encoding(run, encoding):
    tokens = masked(run, run.store.read(np.arange(30)).counts["rna"], encoding)[0]
    model = encoder(encoding)
    with torch.inference_mode():
        together = model(tokens, HIDDEN)
        for i in (0, 11, 29):
            alone = model(some_cells(tokens, torch.tensor([i])), HIDDEN)
            torch.testing.assert_close(alone.summary[0], together.summary[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoding", ["bins", "rank"])
def test_stages_train_everything_with_any_encoding(tmp_path, encoding):
    run = stores.run(tmp_path, **{"network.encoding": encoding})
    teacher, batch = run.teacher(), run.store.read(np.arange(48))
    rna = batch.take(np.flatnonzero(batch.present & 1))
    for stage, own in (
        (Unimodal(run.recipe.unimodal, teacher, run.tokenizer, "rna", seed=0, device="cpu"), rna),
        (Joint(run.recipe.joint, teacher, run.tokenizer, seed=0, device="cpu"), batch),
    ):
        parameters, optimizer = adamw(stage.trained(), Optim())
        before = [p.detach().clone() for p in parameters]
        losses = [step(stage, Share(n, 48, 0, own), parameters, optimizer, 1.0)["loss"] for n in range(4)]
        assert losses[-1] < losses[0]
        assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_an_encoding_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"network\.encoding has log; it may have value, bins, rank"):
        Network(encoding="log")  # type: ignore[arg-type]
