from collections import Counter

import numpy as np
import pytest

from cellray.tasks import annotation, missing, report, translation
from cellray.tasks.inputs import cohort
from cellray.tasks.rows import Result
from cellray.tasks.score import numeric_targets, score
from cellray.train.recipe import Score
from tests.scored import made

SETTINGS = Score(seeds=2, bootstrap=60)


def quiet(text):
    pass


def values(rows, task, metric):
    return {r["model"]: r["value"] for r in rows if (r["task"], r["metric"]) == (task, metric)}


def one(rows, task, metric, model="student"):
    (row,) = [r for r in rows if (r["task"], r["metric"], r["model"]) == (task, metric, model)]
    return row


def cohort_of(scored, wanted):
    return cohort(scored, "paired", wanted, seeds=2, bootstrap=60)


@pytest.fixture(scope="module")
def rows():
    return score(made(), SETTINGS, quiet)


def test_every_score_stands_beside_its_baselines(rows):
    assert {row["task"] for row in rows} == {
        "annotation", "RNA to ATAC", "RNA to protein", "missing modality", "fidelity to the teacher",
    }  # fmt: skip
    for task, metric in {(row["task"], row["metric"]) for row in rows}:
        found = values(rows, task, metric)
        assert set(report.baselines(task, metric)) <= set(found), (task, metric)


def test_rows_are_json_values_and_intervals_hold_their_value(rows):
    for row in rows:
        assert set(report.ROW) < set(row)
        assert all(row[k] is None or type(row[k]) is float for k in ("value", "low", "high"))
        if row["low"] is not None:
            assert row["low"] <= row["value"] <= row["high"]
    counted = Counter(map(str, ((r["task"], r["metric"], r["model"]) for r in rows)))
    assert set(counted.values()) == {1}


def test_annotation_knows_groups_from_noise(rows):
    found = values(rows, "annotation", "accuracy")
    assert found["student, linear probe"] > 0.95
    assert found["MLP"] > 0.8
    assert found["logistic regression on genes"] > 0.8
    assert found["denoising autoencoder, linear probe"] > 0.7
    for blind in ("majority", "collapsed embedding"):
        assert found[blind] < 0.5
    assert found["random weights, linear probe"] < 0.5


def test_a_student_that_predicts_the_truth_beats_the_baselines(rows):
    assert one(rows, "RNA to ATAC", "AUROC")["verdict"] == "beats"
    assert one(rows, "RNA to ATAC", "AUROC")["value"] == pytest.approx(1)
    assert one(rows, "RNA to protein", "Pearson")["value"] > 0.99
    assert values(rows, "RNA to ATAC", "AUROC")["mean of training cells"] == pytest.approx(0.5)
    assert 0.55 < values(rows, "RNA to ATAC", "AUROC")["MLP"] < 0.95
    assert values(rows, "RNA to protein", "Pearson")["ridge on PCA"] > 0.3


def test_at_one_depth_no_guess_of_the_depth_is_scored():
    plain = made()
    guess, told = np.random.default_rng(0).normal(size=(700, 1)), plain.translate["student"]

    def translate(modality, rows, features, level):
        return told(modality, rows, features, level) + (0 if level else 50 * guess[rows])

    scored = made(translate={**plain.translate, "student": translate})
    atac = plain.modalities[1]
    models = ("student", "RNA depth alone", "ridge on PCA", "MLP")
    found = translation.results(cohort_of(scored, plain.paired("paired", "atac")), atac, 40, models, quiet)
    adjusted, level = (
        {result.model: result.values[metric][0] for result in found}
        for metric in ("AUROC, depth-adjusted", "AUROC at one depth")
    )
    assert level["student"] == 1
    assert adjusted["student"] < 0.7
    assert level["RNA depth alone"] == 0.5 != adjusted["RNA depth alone"]
    assert level["ridge on PCA"] == adjusted["ridge on PCA"]
    assert 0.55 < level["MLP"] != adjusted["MLP"]


def test_what_rna_does_not_know_is_not_predicted_within_label(rows):
    within = values(rows, "RNA to protein", "Pearson within label")
    assert within["student"] > 0.95
    assert all(abs(within[m]) < 0.2 for m in ("ridge on PCA", "MLP", "mean of training cells"))


def test_recovery_is_the_share_of_the_teachers_gain(rows):
    metric = "Pearson of state within label"
    found = values(rows, "missing modality", metric)
    row = one(rows, "missing modality", f"recovery of {metric}")
    gain = found["teacher"] - found["RNA-only model"]
    assert gain > 0.5
    assert row["value"] == pytest.approx((found["student"] - found["RNA-only model"]) / gain)
    assert 0.5 < row["low"] < row["value"] < row["high"] < 1.2
    assert one(rows, "missing modality", metric)["verdict"] == "beats"


def test_fidelity_shows_what_a_collapsed_embedding_scores(rows):
    cosine = values(rows, "fidelity to the teacher", "cosine")
    assert cosine["student"] > cosine["collapsed embedding"] > cosine["random weights"]
    assert values(rows, "fidelity to the teacher", "spread")["collapsed embedding"] < 1e-6
    assert values(rows, "fidelity to the teacher", "foscttm")["collapsed embedding"] == pytest.approx(
        0.5, abs=0.02
    )
    overlap = values(rows, "fidelity to the teacher", "knn overlap")
    assert overlap["student"] > overlap["RNA-only model"] > overlap["random weights"]


def test_scores_are_the_same_every_time(rows):
    assert score(made(), SETTINGS, quiet) == rows


@pytest.fixture(scope="module")
def several():
    """Rows, and what was said, of a paired data set labelled from protein, one of ATAC, one of bare RNA."""
    plain = made(number=1200)
    names = np.array(["paired", "paired", "atac", "rna"])[np.arange(1200) % 4]
    present = {
        "rna": names != "atac",
        "atac": (names == "atac") | (names == "paired"),
        "protein": names == "paired",
    }
    frame = plain.cells.assign(dataset=names, label=np.where(names == "rna", "", plain.cells["label"]))
    scored = made(
        number=1200,
        cells=frame,
        units=dict.fromkeys(names, "donor"),
        present=present,
        label_from={"paired": "protein"},
    )
    said: list[str] = []
    return score(scored, Score(seeds=1, bootstrap=10), said.append), said


def test_data_sets_are_scored_on_what_they_have(several):
    rows, _said = several
    assert {row["dataset"] for row in rows} == {"paired"}


def test_an_embedding_that_saw_the_protein_is_not_scored_on_labels_from_it(several):
    rows, _ = several
    for row in rows:
        saw = row["model"].startswith("teacher") and row["metric"] in (*annotation.METRICS, *missing.LABEL)
        if saw:
            assert row["value"] is None
            assert row["reason"] == "the labels were made from protein, which the teacher saw"
    assert one(rows, "missing modality", "recovery of accuracy of label")["value"] is None
    assert one(rows, "missing modality", "accuracy of label")["value"] > 0.9
    assert one(rows, "missing modality", "R2 of state", "teacher")["value"] > 0.5


def test_recovery_is_undefined_where_the_teacher_equals_the_control():
    plain = made()
    scored = made(embeddings={**plain.embeddings, "teacher": plain.embeddings["rna_only"]})
    values_ = scored.targets["state"].to_numpy()
    found = missing.target_recovery(cohort_of(scored, scored.paired("paired")), "state", values_)
    row = one(found, "missing modality", "recovery of R2 of state")
    assert row["value"] is None
    assert row["reason"].startswith("undefined")


def test_recovery_is_told_with_a_warning_where_the_teacher_loses():
    plain = made()
    scored = made(embeddings={**plain.embeddings, "teacher": plain.embeddings["random"]})
    values_ = scored.targets["state"].to_numpy()
    found = missing.target_recovery(cohort_of(scored, scored.paired("paired")), "state", values_)
    row = one(found, "missing modality", "recovery of R2 of state")
    names = (missing.STUDENT, missing.CONTROL, missing.TEACHER)
    models = [one(found, "missing modality", "R2 of state", m)["value"] for m in names]
    student, control, teacher = models
    assert row["value"] == pytest.approx((student - control) / (teacher - control))
    assert row["low"] is None
    assert row["reason"].startswith(missing.NO_GAIN)


def test_recovery_has_no_interval_where_the_gain_is_not_clear():
    scored = made()
    rng = np.random.default_rng(0)
    drawn = {
        "student": 0.84 + rng.normal(0, 0.001, 201),
        "teacher": 0.85 + rng.normal(0, 0.02, 201),
        "RNA-only model": np.full(201, 0.8),
    }
    for values_, middle in zip(drawn.values(), (0.84, 0.81, 0.8), strict=True):
        values_[0] = middle
    results = {model: Result(model, "baseline", {"R2": values_}) for model, values_ in drawn.items()}
    cells = cohort_of(scored, scored.paired("paired"))
    clear = missing._recovery(cells, "R2", results | {"teacher": results["student"]}, "")
    assert clear["value"] == clear["low"] == clear["high"] == pytest.approx(1)
    drawn["teacher"][1:] -= 0.04
    unclear = missing._recovery(cells, "R2", results, "")
    assert unclear["value"] == pytest.approx(4)
    assert (unclear["low"], unclear["high"]) == (None, None)
    assert unclear["reason"] == "no interval: the teacher's gain is not clear of zero"


def test_a_constant_target_and_a_single_label_are_not_run():
    scored = made()
    cells = cohort_of(scored, scored.paired("paired"))
    found = missing.target_recovery(cells, "state", np.ones(len(scored.cells)))
    assert {row["reason"] for row in found} == {"state is the same for all cells"}
    scored.cells["label"] = "T"
    alike = cohort_of(scored, scored.labelled("paired"))
    assert {row["reason"] for row in annotation.annotation(alike, quiet)} == {"all cells have the label 'T'"}


def test_cells_without_a_modality_are_left_out_and_rare_peaks_too():
    plain = made()
    half = np.arange(len(plain.cells)) % 2 == 0
    scored = made(present={**plain.present, "atac": half})
    atac = scored.modalities[1]
    cells = cohort_of(scored, scored.paired("paired", "atac"))
    assert half[np.concatenate([cells.train, cells.test])].all()
    rare = plain.counts["atac"].tolil()
    rare[:, 3] = 0
    rare[:5, 3] = 1
    scored.counts["atac"] = rare.tocsr()
    assert 3 not in translation._features(cells, atac, 5000)
    assert len(translation._features(cells, atac, 7)) <= 7


def test_without_rna_there_is_nothing_to_score():
    plain = made()
    scored = made(present={**plain.present, "rna": np.zeros(len(plain.cells), bool)})
    with pytest.raises(ValueError, match="no held-out cell was measured in RNA"):
        score(scored, SETTINGS, quiet)


def test_nothing_held_out_is_an_error():
    scored = made()
    scored.cells["test"] = False
    with pytest.raises(ValueError, match="no cell is held out"):
        score(scored, SETTINGS, quiet)


def test_a_small_data_set_says_why_it_was_not_scored():
    small = score(made(number=60), SETTINGS, quiet)
    assert all(row["value"] is None and "are needed" in row["reason"] for row in small)
    for task, metric in {(row["task"], row["metric"]) for row in small}:
        assert set(report.baselines(task, metric)) <= set(values(small, task, metric))


def test_targets_are_joined_by_cell_id():
    targets = made().targets
    shuffled = targets.sample(frac=1, random_state=0).assign(note="text is not probed").iloc[10:]
    ((name, found),) = numeric_targets(made(targets=shuffled))
    assert name == "state"
    known = ~np.isnan(found)
    assert known.sum() == len(targets) - 10
    np.testing.assert_array_equal(found[known], targets["state"].to_numpy()[known])
    assert list(numeric_targets(made(targets=None))) == []
