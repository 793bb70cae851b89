import numpy as np
import pytest

from cellray.tasks import inputs
from cellray.tasks.inputs import Cohort, cohort, resamples
from tests.scored import made


def labelled(scored, **settings):
    found = cohort(scored, "paired", scored.labelled("paired"), **settings)
    assert isinstance(found, Cohort)
    return found


def test_resamples_draw_units_then_cells():
    codes = np.repeat([0, 1, 2], [50, 30, 20])
    drawn = resamples(codes, 300)
    assert (drawn[0] == 1).all()
    whole = np.stack([drawn[1:, codes == u].sum(axis=1) for u in range(3)], axis=1)
    assert (whole % [50, 30, 20] == 0).all()
    assert ((whole / [50, 30, 20]).sum(axis=1) == 3).all()
    one = drawn[1:][whole[:, 0] == 50][:, codes == 0]
    assert (one == 0).any(axis=1).all()


def test_resamples_of_one_unit_draw_its_cells():
    drawn = resamples(np.zeros(40, int), 100)
    assert (drawn.sum(axis=1) == 40).all()
    assert drawn[1:].std(axis=0).min() > 0.5


def test_units_give_wider_intervals_than_cells():
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(4), 100)
    values = rng.normal(size=400) + rng.normal(size=4)[codes]
    over_units, over_cells = (
        (w[1:] @ values / w[1:].sum(axis=1)).std()
        for w in (resamples(codes, 300), resamples(np.arange(400), 300))
    )
    assert over_units > 2 * over_cells


def test_a_cohort_fits_on_training_cells_and_scores_held_out_donors():
    scored = made()
    found = labelled(scored, seeds=3, bootstrap=5)
    held = scored.cells["test"].to_numpy()
    assert held[found.test].all()
    assert not held[found.train].any()
    assert found.split == f"2 held-out donors, {held.sum()} cells; intervals over donors"
    assert all(len(draw) == round(0.9 * len(found.train)) for draw in found.draws)
    assert len({tuple(draw) for draw in found.draws}) == 3
    assert found.weights.shape == (6, len(found.test))


def test_the_split_says_when_intervals_are_over_cells():
    by_cell = made(unit="cell")
    found = labelled(by_cell, seeds=1, bootstrap=2)
    assert found.split.endswith("held-out cells; intervals over cells")
    alone = made()
    alone.cells["test"] = alone.cells["donor"] == "d0"
    found = labelled(alone, seeds=1, bootstrap=2)
    assert found.split.startswith("1 held-out donor, ")
    assert found.split.endswith("; intervals over cells")


def test_large_data_sets_are_subsampled_the_same_way_and_say_so(monkeypatch):
    monkeypatch.setattr(inputs, "FIT_CELLS", 100)
    monkeypatch.setattr(inputs, "TEST_CELLS", 60)
    scored = made()
    one, two = (labelled(scored, seeds=1, bootstrap=2) for _ in range(2))
    assert (len(one.train), len(one.test)) == (100, 60)
    np.testing.assert_array_equal(one.test, two.test)
    assert ", 60 of them scored;" in one.split


def test_too_few_cells_are_a_reason_not_an_error():
    scored = made()
    none = np.zeros(len(scored.cells), bool)
    assert cohort(scored, "paired", none, seeds=1, bootstrap=2) == (
        "0 training and 0 held-out cells; 50 and 20 are needed"
    )


def test_genes_are_chosen_by_their_variance_over_training_cells(monkeypatch):
    monkeypatch.setattr(inputs, "GENES", 10)
    scored = made()
    found = labelled(scored, seeds=1, bootstrap=2)
    dense = scored.counts["rna"].toarray()
    log = np.log1p(dense / scored.totals["rna"][:, None] * 1e4)
    wanted = np.sort(np.argsort(-log[found.train].var(axis=0))[:10])
    np.testing.assert_allclose(found.profiles[1], log[found.test][:, wanted], rtol=1e-5)
    np.testing.assert_array_equal(found.genes[0], dense[found.train][:, wanted])


def test_the_teacher_is_kept_from_labels_of_another_modality_only():
    assert made(label_from={"paired": "protein"}).leak("paired") == "protein"
    assert made(label_from={"paired": "rna"}).leak("paired") == ""
    assert made().leak("paired") == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"label_from": {"paired": "proteins"}}, "'proteins', which is none of the modalities"),
        (lambda s: {"cells": s.cells.drop(columns="donor")}, r"lack the columns \['donor'\]"),
        (lambda s: {"cells": s.cells.iloc[1:]}, "700 rows for 699 cells"),
        (lambda s: {"embeddings": {"student": s.embeddings["student"]}}, "each of student, teacher"),
        (
            lambda s: {"embeddings": {**s.embeddings, "teacher": s.embeddings["teacher"][:, :4]}},
            "at one width",
        ),
        (lambda s: {"targets": s.targets.drop(columns="cell_id")}, "targets lack the column cell_id"),
        (lambda s: {"targets": s.targets.iloc[[0, 1, 1]]}, r"twice, as \['paired:c1'\]"),
        (lambda s: {"targets": s.targets.assign(cell_id="c1").iloc[:1]}, "share no cell with the store"),
        (lambda s: {"translate": {}}, "student and random are needed"),
        (lambda s: {"present": {"rna": s.present["rna"]}}, r"present to score hold \['rna'\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        made(**change(made()))
