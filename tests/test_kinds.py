"""Both kinds of student on one small run: trained, compared, exported, loaded and asked."""

import json

import numpy as np
import pytest

from cellray import bundle
from cellray.data import storage
from cellray.embedder import vectors
from cellray.tasks import students
from cellray.train import checkpoint
from cellray.train.chain import chain, outlook
from cellray.train.recipe import override
from cellray.train.run import Run
from pipelines.export import chosen, export
from pipelines.score import gather, saved_kinds, student_facts
from tests import stores

QUICK = {"unimodal.epochs": 0.2, "joint.epochs": 0.2, "distil.epochs": 0.5, "score.seeds": 1}
BOTH = ("mlp", "transformer")


def trained(folder, **changes):
    """A run on the simulated store, with what scoring asks its manifest."""
    store = folder / "store"
    stores.write(str(store))
    manifest = json.loads((store / "store.json").read_text())
    manifest["ingest"] = {"datasets": [{"name": "sim"}]}
    (store / "store.json").write_text(json.dumps(manifest))
    made = stores.run(folder, **QUICK, **changes)
    chain(made, lambda event: None)
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("kinds"), **{"student.kinds": BOTH})


@pytest.fixture(scope="module")
def scored(run):
    return gather(run)


def asking(run, kind):
    return Run(override(run.recipe, {"score.student": kind}))


def facts(run, stage):
    found = checkpoint.committed(run.path("stages", stage))
    assert found is not None
    return found


def test_the_chain_and_the_outlook_have_a_stage_for_each_kind(run):
    assert run.chain()[-4:] == ["joint", "distil", "distil-transformer", "control"]
    assert [stage.name for stage in outlook(run)] == run.chain()
    assert all(stage.finished for stage in outlook(run))
    foreseen = {stage.name: stage for stage in outlook(run)}["distil-transformer"]
    done = facts(run, "distil-transformer")
    assert (done["steps"], done["cells"]) == (foreseen.steps, foreseen.cells)
    assert done["started_from"] == facts(run, "distil")["started_from"] == facts(run, "joint")["sha256"]


def test_a_second_kind_changes_nothing_of_the_first(run, tmp_path):
    alone = trained(tmp_path)
    assert alone.chain() == [name for name in run.chain() if name != "distil-transformer"]
    for name in alone.chain():
        assert facts(alone, name)["sha256"] == facts(run, name)["sha256"], name


def test_a_transformer_can_be_trained_alone(run):
    alone = Run(override(run.recipe, {"student.kinds": ("transformer",)}))
    assert alone.chain()[-3:] == ["joint", "distil-transformer", "control"]
    assert alone.trained_student().kind == "transformer"
    assert alone.trained_student("control").kind == "mlp"


def test_both_kinds_are_compared_and_one_is_scored(run, scored):
    said = saved_kinds(run)
    assert said is not None
    assert [kind["kind"] for kind in said["kinds"]] == list(BOTH)
    assert all(kind["cells_per_cpu_second"] > 0 for kind in said["kinds"])
    assert all(set(kind["probes"]) == {students.ACCURACY} for kind in said["kinds"])
    assert (said["kind"], said["why"]) == students.choose(said["kinds"])
    assert len(scored.cells) == len(run.store)
    counts = run.store.read(np.arange(len(run.store))).counts["rna"]
    other = next(kind for kind in BOTH if kind != said["kind"])
    for kind, own in {said["kind"]: scored, other: gather(asking(run, other))}.items():
        student = run.trained_student("distil" if kind == "mlp" else "distil-transformer")
        assert np.array_equal(own.embeddings["student"], vectors(student, run.tokenizer, counts))
        assert own.translate["student"]("atac", np.arange(3), np.arange(4), False).shape == (3, 4)
    sizes = student_facts(run)
    passed = sum(p.numel() for m in student.path() for p in m.parameters())
    assert (sizes["kind"], sizes["parameters"]) == (other, passed)


@pytest.mark.parametrize("kind", BOTH)
def test_the_kind_that_is_asked_for_is_exported_and_answers(run, scored, kind):
    own = asking(run, kind)
    url, digest = export(own)
    assert json.loads(storage.read_bytes(storage.join(url, "config.json")))["network"]["kind"] == kind
    model = bundle.load(url)
    assert (model.hash, model.student.kind) == (digest, kind)
    assert export(own)[1] == digest
    counts = run.store.read(np.arange(30)).counts["rna"]
    student = run.trained_student("distil" if kind == "mlp" else "distil-transformer")
    assert np.array_equal(model.embed(counts).vectors, vectors(student, run.tokenizer, counts))
    card = storage.read_bytes(storage.join(url, "card.md")).decode()
    assert "## Kinds of student" in card
    assert "| transformer |" in card
    assert "score.student asks for it." in card


def test_export_compares_the_kinds_where_nobody_has(run, scored):
    storage.write_bytes(run.path("scores.json"), b'[{"task": "a"}]')
    storage.remove_file(run.path("students.json"))
    auto = asking(run, "auto")
    choice = chosen(auto)
    assert choice["kind"] == students.choose(choice["kinds"])[0]
    assert choice["scored"]
    other = next(kind for kind in BOTH if kind != choice["kind"])
    assert not chosen(asking(run, other))["scored"], "the scores of the run are another kind's"
