"""The bench of real pairs does what it says: files, what is kept, what is scored apart, rows, goals."""

import csv
import json
from dataclasses import replace

import anndata
import numpy as np
import pytest

from cellray.tasks import annotation, translation
from cellray.tasks.inputs import DRAWN
from cellray.tasks.score import score
from cellray.train.recipe import Score
from tests.bench import pairs
from tests.bench.harness.rounds import ROOT
from tests.bench.paired import job
from tests.bench.paired.material import ALL, PBMC, SNARESEQ, Goal, subset
from tests.bench.paired.rows import CONTROL, STUDENT, TEACHER, Table, brief, recovery
from tests.scored import made

DATA = ROOT.parent / "shared" / "data"
SETTINGS = Score(seeds=1, bootstrap=10, features=10)


def quiet(text):
    pass


def values(*scores):
    """Figures of one model, [score, resamples]."""
    return {"kind": "ours", "seeds": 3, "reason": "", "values": {"accuracy": list(scores)}}


def run(student, control, teacher):
    linear = {STUDENT: student, CONTROL: control, TEACHER: teacher}
    results = {model: values(v, v - 0.01, v + 0.01) for model, v in linear.items()}
    losses = {"joint": {"first": {"loss": 4.0}, "last": {"loss": student}}}
    tasks = {"annotation": {"split": "", "results": results}}
    return {"tasks": tasks, "losses": losses, "cpu": {"joint": 10.0}, "measured": 1.0}


BASELINES = {
    "tasks": {
        "annotation": {
            "split": "",
            "results": {"majority": values(0.4, 0.4, 0.4), "MLP": values(0.85, 0.84, 0.86)},
        }
    },
    "measured": 5.0,
}
ONE = replace(SNARESEQ, goals=(Goal(task="annotation", metric="accuracy", value=0.915, model=STUDENT),))


def table(*seeds):
    return {row.what: row for row in Table(ONE, seeds, BASELINES).rows()}


def test_models_and_baselines_scored_apart_are_the_rows_of_the_report():
    scored = made(number=300)
    ours = job.figures(
        scored,
        SETTINGS,
        lambda cells, m: (
            annotation.models(cells, quiet)
            if m is None
            else translation.results(cells, m, SETTINGS.features, ("student",), quiet)
        ),
        drawn=DRAWN,
    )
    simple = job.figures(
        scored,
        SETTINGS,
        lambda cells, m: (
            annotation.simple(cells, quiet)
            if m is None
            else translation.results(cells, m, SETTINGS.features, translation.baseline_names(m), quiet)
        ),
        drawn=DRAWN,
    )
    assert set(ours) == set(simple) == {"annotation", "RNA to ATAC", "RNA to protein"}
    both = {task: brief({"tasks": ours})["tasks"][task]["results"] for task in ours}
    for task, about in brief({"tasks": simple})["tasks"].items():
        assert not set(both[task]) & set(about["results"])
        both[task] |= about["results"]
    whole = [row for row in score(scored, SETTINGS, quiet) if row["task"] in ours]
    assert len(whole) > 50
    for row in whole:
        found = both[row["task"]][row["model"]]["values"].get(row["metric"], {"value": np.nan})
        if row["value"] is None:
            assert not np.isfinite(found["value"])
        else:
            assert [found[k] for k in ("value", "low", "high")] == [row[k] for k in ("value", "low", "high")]


def test_a_value_is_the_mean_over_seeds_beside_the_best_baseline():
    found = table(run(0.92, 0.90, 0.94), run(0.93, 0.91, 0.94))
    row = found[f"snareseq: annotation, accuracy: {STUDENT}"]
    assert (row.value, row.goal, row.met) == (pytest.approx(0.925), 0.915, True)
    assert row.baseline == "MLP 0.850"
    assert row.note == "0.920, 0.930 by seed; 95 % 0.911 to 0.929 of the first; beats"
    assert found["snareseq: loss of joint"].value == pytest.approx(0.925)
    assert found["snareseq: scoring"].value == 7.0
    assert {row.what.rpartition(": ")[2] for row in found.values()} >= {"majority", "MLP"}


def test_gains_are_goals_and_recovery_is_of_the_means():
    found = table(run(0.92, 0.90, 0.94), run(0.92, 0.93, 0.91))
    name = "snareseq: annotation, accuracy"
    assert found[f"{name}: student - RNA-only model"].value == pytest.approx(0.005)
    assert found[f"{name}: student - RNA-only model"].met
    assert found[f"{name}: teacher - student"].value == pytest.approx(0.005)
    assert found[f"{name}: recovery"].value == pytest.approx(0.5)
    worse = table(run(0.92, 0.90, 0.89))
    assert worse[f"{name}: teacher - student"].met is False
    assert worse[f"{name}: recovery"].value == pytest.approx(-2)
    assert "gains nothing" in worse[f"{name}: recovery"].note
    same = np.array([[0.9]])
    assert recovery("", same + 0.1, same, same).value is None


def test_a_teacher_that_saw_the_labels_origin_is_no_row_with_a_value():
    leaked = run(0.92, 0.90, 0.94)
    leaked["tasks"]["annotation"]["results"][TEACHER] |= {"values": {}, "reason": "it saw protein"}
    found = table(leaked)
    for what in (TEACHER, "teacher - student", "recovery"):
        row = found[f"snareseq: annotation, accuracy: {what}"]
        assert (row.value, row.note) == (None, "not run: it saw protein")


def test_absent_data_are_said_to_be_absent(tmp_path):
    assert pairs.main(["--data", str(tmp_path), "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "pairs.json").read_text())
    goals = [goal.value for one in ALL.values() for goal in one.goals]
    assert [row["goal"] for row in written["rows"]] == goals
    assert all(row["value"] is None and "not run" in row["note"] for row in written["rows"])


def test_the_atlas_table_names_every_file_and_its_settings(tmp_path):
    PBMC.table(tmp_path, tmp_path / "atlas.csv")
    with (tmp_path / "atlas.csv").open() as file:
        rna, protein, alone = csv.DictReader(file)
    assert (rna["label"], rna["label_from"], protein["label"]) == ("gated_type", "protein", "")
    assert alone["url"] == str(tmp_path / "pbmc_cite_10x" / "rna_only_pbmc5k.h5ad")


@pytest.mark.parametrize("one", ALL.values(), ids=str)
def test_a_subset_keeps_pairs_and_both_sides_of_the_split(one, tmp_path):
    if one.missing(DATA):
        pytest.skip(f"{one.missing(DATA)[0]} is not there")
    subset(one, DATA, tmp_path, cells=120)
    files = [anndata.read_h5ad(path) for path in one.paths(tmp_path)]
    assert 60 < files[0].n_obs < 240
    assert list(files[0].obs_names) == list(files[1].obs_names)
    assert one.content(tmp_path) != one.content(DATA)


def test_what_is_kept_depends_on_what_it_read(tmp_path, monkeypatch):
    for path in SNARESEQ.paths(tmp_path):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"cells")
    started = []

    def process(command):
        given = json.loads(job.Path(command[-1]).read_text())
        started.append((given["kind"], given["recipe"]["seed"]))
        job.Path(given["figures"]).write_text("{}")

    monkeypatch.setattr("tests.bench.harness.jobs.process", process)

    def runs(**changes):
        return pairs.Runs(SNARESEQ, tmp_path, tmp_path / "runs", changes)

    assert runs().first() == ({}, {})
    assert runs().first() == ({}, {})
    runs().train(1)
    assert started == [("train", 0), ("compare", 0), ("train", 1)]
    runs(**{"optim.lr": "0.002"}).first()
    assert started[3:] == [("train", 0)], "baselines know no setting of training"
    runs(**{"score.features": "7"}).first()
    assert started[4:] == [("train", 0), ("compare", 0)]
    store = runs().store
    assert runs(**{"optim.lr": "0.002"}).store == store
    assert runs(**{"qc.mads": "5"}).store != store
    SNARESEQ.paths(tmp_path)[0].write_bytes(b"other cells")
    assert runs().store != store
    recipe = runs().run(2)
    assert (recipe.split.by, recipe.split.fraction, recipe.seed) == ("cell", 0.2, 2)
    assert recipe.ingest.drop_labels == ("Mis",)
