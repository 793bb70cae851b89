import json

import numpy as np
import pytest

from cellray import bundle
from cellray.data import storage
from cellray.data.simulate import simulate
from cellray.data.truth import Simulation
from cellray.tasks import report
from cellray.train.progress import Progress
from cellray.train.recipe import load, override
from cellray.train.run import Run
from pipelines.full import full, summary

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")


@pytest.fixture(scope="module")
def whole(ray_session, tmp_path_factory):
    """A run of the whole path on a small simulated atlas, and what it reported."""
    folder = tmp_path_factory.mktemp("full")
    size = Simulation(cells=600, genes=150, peaks=200, proteins=12, types=3, seed=1)
    table = simulate(str(folder / "atlas"), size)
    settings = {"atlas": str(table), "run": str(folder / "run"), "score.seeds": 1, "score.bootstrap": 50}
    settings |= {"score.targets": str(folder / "atlas" / "truth.csv"), "unimodal.epochs": 0.5}
    recipe = override(load("pipelines.recipes.tiny:recipe"), settings)
    return recipe, full(recipe, Progress("quiet"))


def test_the_report_holds_what_was_promised(whole):
    recipe, said = whole
    run = Run(recipe)
    on_disk = json.loads(storage.read_bytes(run.path("report.json")).decode())
    assert on_disk == json.loads(json.dumps(said))
    report.check(on_disk)
    assert on_disk["ingest"]["cells_in"] == 600
    assert on_disk["ingest"]["cells_kept"] + sum(on_disk["ingest"]["dropped"].values()) == 600
    assert [stage["name"] for stage in on_disk["stages"]] == run.chain()
    assert all(stage["steps"] > 0 and stage["cells_per_second"] > 0 for stage in on_disk["stages"])
    assert on_disk["student"]["parameters"] < on_disk["student"]["teacher_parameters"]
    assert {row["model"] for row in on_disk["scores"]} >= {"student", "teacher", "RNA-only model"}
    assert {row["verdict"] for row in on_disk["scores"]} >= {"baseline"}
    assert on_disk["run"]["store"] == run.store.hash


def test_the_endpoint_answered_as_the_embedder_does(whole):
    endpoint = whole[1]["endpoint"]
    assert endpoint["requests"] > 10
    assert endpoint["failed"] == 0
    assert endpoint["max_abs_difference_to_offline"] == 0.0


def test_the_page_stands_alone(whole):
    page = storage.read_bytes(Run(whole[0]).path("report.html")).decode()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "<script" not in page
    assert page.count("data:image/png;base64,") >= 3


def test_the_bundle_is_the_trained_student(whole):
    run = Run(whole[0])
    student = bundle.load(run.path("bundle"))
    counts = run.store.read(np.arange(20)).counts["rna"]
    assert student.embed(counts).vectors.shape == (20, 32)
    assert student.about["run"]["store"] == run.store.hash
    held_out = set(run.store.cells["donor"].filter(run.test).to_pylist())
    assert held_out.isdisjoint(student.about["donors"])


def test_the_summary_says_where_things_are(whole):
    recipe, said = whole
    text = summary(recipe, said, 60.0)
    assert f"{recipe.run}/report.html" in text
    assert "cells a CPU-second" in text


def test_running_it_again_trains_nothing_and_says_the_same(whole):
    recipe, said = whole
    run = Run(recipe)
    before = storage.read_bytes(run.path("stages", "distil", "stage.json")).decode()
    again = full(recipe, Progress("quiet"))
    assert storage.read_bytes(run.path("stages", "distil", "stage.json")).decode() == before
    assert again["scores"] == said["scores"]


def test_workers_there_is_no_room_for_are_refused_before_anything_is_read(ray_session, tmp_path):
    settings = {"dataset.rna": str(tmp_path / "none.h5ad"), "run": str(tmp_path / "run"), "workers": 9}
    with pytest.raises(ValueError, match="workers=9 take 9 CPUs"):
        full(override(load("pipelines.recipes.tiny:recipe"), settings), Progress("quiet"))
    assert not list(tmp_path.iterdir())
