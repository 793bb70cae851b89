import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data.modalities import RNA
from cellray.data.programmes import Groups
from cellray.data.tokens import Counts
from cellray.train.batches import kept, masked_tokens
from cellray.train.feed import uniform
from cellray.train.masks import Grouped, Independent, mask_of, notes
from cellray.train.recipe import Recipe, Unimodal, override
from cellray.train.run import Run
from tests import stores

KEYS = (11, 3)
FEATURES = 60


def cells(number, seed=0, most=40):
    rng = np.random.default_rng(seed)
    ids = [rng.permutation(FEATURES)[: rng.integers(0, most)] for _ in range(number)]
    offsets = np.cumsum([0, *map(len, ids)])
    count = int(offsets[-1])
    total = np.full(number, 5000)
    return Counts(
        offsets, np.concatenate(ids).astype(np.uint8), rng.integers(1, 9, count).astype(np.uint8), total
    )


def some_groups(seed=0, number=12, most=12):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, most, number)
    return Groups.of({f"g{i}": rng.choice(FEATURES, n, replace=False) for i, n in enumerate(sizes)}, FEATURES)


def by_loop(groups, share, counts, rows, keys):
    """Groups one after another in the order of their draws, a cell at a time."""
    found = []
    sets = [set(part.tolist()) for part in np.split(groups.members, groups.offsets[1:-1])]
    for i, row in enumerate(rows.tolist()):
        ids = counts.ids[counts.offsets[i] : counts.offsets[i + 1]].tolist()
        wanted = (share[0] + (share[1] - share[0]) * float(uniform(*keys, row, 0))) * len(ids)
        order = sorted(range(len(sets)), key=lambda g: float(uniform(*keys, 6, row, g)))
        hidden: set[int] = set()
        for g in order:
            more = (sets[g] & set(ids)) - hidden
            if not more:
                continue
            if len(hidden) + len(more) >= wanted:
                if float(uniform(*keys, 5, row)) < (wanted - len(hidden)) / len(more):
                    hidden |= more
                break
            hidden |= more
        else:
            left = [f for f in ids if f not in hidden]
            chance = (wanted - len(hidden)) / max(len(left), 1)
            hidden |= {f for f in left if float(uniform(*keys, 1, row, f)) < chance}
        found += [f in hidden for f in ids]
    return np.array(found, bool)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(0, 99), st.sampled_from([(0.0, 0.0), (0.15, 0.4), (0.3, 0.9)]), st.integers(1, 12))
def test_groups_are_hidden_as_by_the_loop(seed, share, number):
    counts, groups = cells(12, seed), some_groups(seed, number)
    rows = np.random.default_rng(seed).permutation(1000)[:12]
    hidden = Grouped(groups, share, 1.0)(counts, rows, KEYS)
    assert np.array_equal(hidden, by_loop(groups, share, counts, rows, KEYS))


def test_independent_masking_is_what_is_not_kept():
    counts, rows = cells(30), np.arange(30) + 7
    share = 0.15 + 0.25 * uniform(*KEYS, rows, 0)
    assert np.array_equal(Independent((0.15, 0.4))(counts, rows, KEYS), ~kept(counts, rows, share, *KEYS, 1))


@pytest.mark.parametrize("number", [2, 12, 40])
def test_as_much_is_hidden_by_groups_as_by_tokens(number):
    """Mean of thousands of draws, within four standard errors: 2 groups hold less than is wanted, 40 more."""
    counts, groups, rows = cells(400, most=50), some_groups(1, number, 20), np.arange(400)
    masks = Independent((0.2, 0.5)), Grouped(groups, (0.2, 0.5), 1.0)
    drawn = [[mask(counts, rows, (step, 0)).mean() for step in range(30)] for mask in masks]
    (single, _), (whole, spread) = [(np.mean(d), np.std(d) / math.sqrt(30)) for d in drawn]
    assert spread < 0.005
    assert abs(whole - single) < 4 * spread + 0.002


def test_a_cell_hides_groups_or_tokens_and_its_groups_whole():
    counts, groups, rows = cells(300), some_groups(2, 30, 6), np.arange(300)
    cell = np.repeat(rows, counts.lengths)
    mask = Grouped(groups, (0.3, 0.3), 0.4)
    hidden, single = mask(counts, rows, KEYS), Independent((0.3, 0.3))(counts, rows, KEYS)
    grouped = np.isin(rows, mask._picked(rows, KEYS))
    assert 0.3 < grouped.mean() < 0.5
    assert np.array_equal(hidden[~grouped[cell]], single[~grouped[cell]])
    sets = np.split(groups.members, groups.offsets[1:-1])
    for i in rows[grouped]:
        own = slice(counts.offsets[i], counts.offsets[i + 1])
        here, gone = counts.ids[own], set(counts.ids[own][hidden[own]].tolist())
        whole = [g for g in sets if gone and set(np.intersect1d(g, here).tolist()) <= gone]
        in_some = set(itertools.chain.from_iterable(g.tolist() for g in sets))
        assert {f for f in gone if f in in_some} <= set(
            itertools.chain.from_iterable(g.tolist() for g in whole)
        )


def test_what_groups_hide_does_not_depend_on_the_batch():
    counts, mask = cells(60), Grouped(some_groups(), (0.15, 0.4), 0.6)
    whole = mask(counts, np.arange(60), KEYS)
    picked = np.array([41, 3, 17, 55])
    part = mask(counts.take(picked), picked, KEYS)
    wanted = [whole[counts.offsets[row] : counts.offsets[row + 1]] for row in picked]
    assert np.array_equal(part, np.concatenate(wanted))
    assert not np.array_equal(whole, mask(counts, np.arange(60), (11, 4)))


def test_absent_features_that_are_asked_for_are_of_the_groups_that_are_hidden():
    counts, rows, groups = cells(200), np.arange(200), some_groups(4, 10, 14)
    mask = Grouped(groups, (0.3, 0.3), 1.0)
    tokens, _, _ = masked_tokens(counts, rows, RNA, FEATURES, mask=mask, zeros=0.5, keys=KEYS)
    hidden, sets = mask(counts, rows, KEYS), np.split(groups.members, groups.offsets[1:-1])
    grouped = set(groups.members.tolist())
    asked = alone = 0
    for i in rows:
        own = slice(int(tokens.offsets[i]), int(tokens.offsets[i + 1]))
        absent = set(tokens.ids[own][tokens.hidden[own] & (tokens.values[own] == 0)].tolist())
        here = counts.ids[counts.offsets[i] : counts.offsets[i + 1]]
        gone = set(here[hidden[counts.offsets[i] : counts.offsets[i + 1]]].tolist())
        assert not absent & set(here.tolist())
        if not gone & grouped:
            alone += 1
            continue
        shown = set(here.tolist()) - gone
        whole = [set(g.tolist()) for g in sets if gone & set(g.tolist()) and not shown & set(g.tolist())]
        assert absent <= set().union(*whole)
        asked += len(absent)
    assert asked > 300
    assert alone < 100


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return stores.run(tmp_path_factory.mktemp("run"))


def gmt(run, folder):
    ids = run.tokenizer.vocabularies["rna"].ids
    path = folder / "sets.gmt"
    path.write_text("".join(f"P{i}\t\t" + "\t".join(ids[i * 10 : i * 10 + 10]) + "\n" for i in range(8)))
    return str(path)


def test_a_recipe_says_what_is_hidden_together(run, tmp_path):
    words = run.tokenizer.vocabularies
    setting = Unimodal(mask_by=("programme", "region"), programmes=gmt(run, tmp_path), region=4)
    genes, peaks = mask_of(setting, words["rna"]), mask_of(setting, words["atac"])
    assert isinstance(genes, Grouped)
    assert isinstance(peaks, Grouped)
    assert len(genes.groups) == 8
    # 7 peaks a chromosome, 3 on the last: two groups each, and one.
    assert len(peaks.groups) == 43
    assert mask_of(setting, words["protein"]) == Independent(setting.mask)
    assert mask_of(Unimodal(), words["rna"]) == Independent(setting.mask)
    said = dict(notes(setting, run.tokenizer))
    assert "80 of the 80 genes" in said["rna"]
    assert "on 22 chromosomes" in said["atac"]
    assert dict(notes(Unimodal(), run.tokenizer)) == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mask_by": ("programme",)}, "name a .gmt file"),
        ({"programmes": "a.gmt"}, "mask_by=token does not use"),
        ({"mask_by": ("gene",)}, r"unimodal\.mask_by has gene; it may have token, programme, region"),
        ({"region": 1}, r"unimodal\.region is 1"),
    ],
)
def test_masks_that_cannot_be_are_refused(run, changes, says):
    with pytest.raises(ValueError, match=says):
        mask_of(Recipe(unimodal=Unimodal(**changes)).unimodal, run.tokenizer.vocabularies["rna"])


def test_other_programmes_under_the_same_name_make_another_model(run, tmp_path):
    url = gmt(run, tmp_path)
    changes = {"unimodal.mask_by": "programme", "unimodal.programmes": url}
    before = Run(override(run.recipe, changes)).key("unimodal-rna", "")
    assert before == Run(override(run.recipe, changes)).key("unimodal-rna", "")
    with open(url, "a") as file:
        file.write("MORE\t\tG1\n")
    assert before != Run(override(run.recipe, changes)).key("unimodal-rna", "")
