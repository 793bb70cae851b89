"""The stages of the published design that ours is compared with, and the whole chain of them."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cellray.embedder import vectors
from cellray.model.reference import (
    CLASSES,
    TYPICAL,
    ReferenceStudent,
    ReferenceTeacher,
)
from cellray.tasks.score import Unit, score_unit
from cellray.train import checkpoint, reference
from cellray.train.batches import plain_tokens
from cellray.train.chain import chain, outlook
from cellray.train.feed import Share
from cellray.train.fit import adamw, step
from cellray.train.recipe import Optim
from cellray.train.run import Run
from cellray.train.stages import key_of
from cellray.train.targets import TeacherVectors, teacher_table, teacher_vectors
from pipelines import export, full
from pipelines.command import Options
from pipelines.score import gather, student_facts
from tests import stores
from tests.chains import check_what_is_trained, killed
from tests.conftest import ROOT

STAGES = ("unimodal-rna", "unimodal-atac", "joint", "distil", "control")


def small(folder, **changes):
    """A run of the reference on the store of simulated cells, of a few steps a stage."""
    few = {"unimodal.epochs": 0.5, "joint.epochs": 1.0, "distil.epochs": 3.0, "checkpoint_seconds": 0.0}
    return stores.run(folder, **{"method": "reference", **few, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with all stages done, undisturbed."""
    found = small(tmp_path_factory.mktemp("trained"))
    chain(found, lambda event: None)
    return found


def stage(run, name):
    """A stage, and the module that holds what it trains."""
    recipe, teacher, student = run.recipe, run.teacher(), run.student()
    reader = reference.Reader(run.tokenizer, key_of(0, name), "cpu")
    if name == "unimodal-rna":
        return reference.Values(recipe.unimodal, teacher, reader), teacher
    if name == "unimodal-atac":
        return reference.Peaks(recipe.unimodal, teacher, reader), teacher
    if name == "joint":
        labels = reference.label_codes(run.store)
        return reference.Pairs(recipe.joint, teacher, reader, labels), teacher
    if name == "control":
        student.alone(teacher)
        return reference.Alone(recipe.joint, student, reader), student
    table = teacher_table(teacher, run.store, np.arange(len(run.store)))
    found = TeacherVectors(table, run.store.cells["cell_id"].combine_chunks())
    return reference.Impute(recipe.distil, student, found, reader), student


def share(run, name, number, size=48):
    """What a plan would give the stage: cells that have one of the modalities it needs."""
    work = dict(zip(STAGES, (("rna",), ("atac",), ("rna", "atac"), ("atac",), ("rna",)), strict=True))[name]
    bits = sum(1 << run.store.names.index(m) for m in work)
    rows = np.flatnonzero(run.store.cells["present"].to_numpy() & bits)[number * size : (number + 1) * size]
    return Share(number, size, 0, run.store.read(rows))


def test_a_typical_count_is_of_the_middle_class_and_all_classes_are_used(run):
    teacher, counts = run.teacher(), run.store.read(np.arange(200)).counts["rna"]
    tokens = plain_tokens(counts, run.tokenizer.vocabularies["rna"].modality)
    classes = teacher.genes.classes(tokens.ids, tokens.values, tokens.offsets[:-1]).numpy()
    assert np.array_equal(classes > 0, counts.matrix(120).toarray() > 0)
    assert set(np.unique(classes)) == set(range(CLASSES))
    typical = torch.tensor([run.tokenizer.vocabularies["rna"].typical])
    one = teacher.genes.classes(torch.tensor([7]), typical, torch.tensor([0]))
    assert one[0, 7] == TYPICAL == one.sum()


@pytest.mark.parametrize("name", STAGES)
def test_what_is_trained_gets_gradients_and_the_rest_stays_bit_for_bit(run, name):
    work, root = stage(run, name)
    assert check_what_is_trained(work, root, [share(run, name, number).batch for number in range(2)])


def test_protein_is_ignored_and_answered_with_the_mean_profile(run):
    teacher, rows = run.teacher(), np.arange(60)
    batch = run.store.read(rows)
    joint, summaries = teacher_vectors(teacher, run.store, rows)
    width, at = teacher.width, run.store.names.index("protein")
    assert (summaries.reshape(60, 3, width)[:, at] == 0).all()
    known = tuple(name for name in run.store.names if name != "protein")
    assert np.array_equal(joint, teacher_vectors(teacher, run.store, rows, shown=known)[0])
    student = run.student().eval()
    cell = torch.from_numpy(vectors(student, run.tokenizer, batch.counts["rna"]))
    with torch.inference_mode():
        said = student.decode(cell, "protein")
        mean = student.decoder("protein").bias.detach()
    torch.testing.assert_close(said, mean.expand(60, -1), atol=1e-5, rtol=1e-5)


def test_a_cell_shown_rna_alone_is_the_cell_without_its_atac(run):
    teacher, store = run.teacher(), run.store
    both = np.flatnonzero(store.cells["present"].to_numpy() & 3 == 3)[:20]
    whole, _ = teacher_vectors(teacher, store, both)
    alone, summaries = teacher_vectors(teacher, store, both, shown=("rna",))
    assert not np.allclose(whole, alone)
    assert (summaries.reshape(20, 3, -1)[:, 1:] == 0).all()
    rna = torch.from_numpy(summaries.reshape(20, 3, -1)[:, 0])
    with torch.inference_mode():
        wanted = rna @ teacher.joined.joint.weight[:, : teacher.width].T + teacher.joined.joint.bias
    np.testing.assert_allclose(alone, wanted.numpy(), atol=1e-5)


def test_the_student_with_the_true_atac_vector_is_the_teacher(run):
    teacher, student, store = run.teacher(), run.student(), run.store
    rows = np.flatnonzero(store.cells["present"].to_numpy() & 3 == 3)[:20]
    table = teacher_table(teacher, store, np.arange(len(store)))
    found = TeacherVectors(table, store.cells["cell_id"].combine_chunks())
    student.follow(teacher, [found.centres[0], found.centres[1], (found.mean, found.spread)])
    joint, summaries = found.of(rows)
    student.predict = torch.nn.Sequential()  # what it is given is what it says
    counts = store.read(rows).counts["rna"]
    said_of_rna = torch.from_numpy(vectors(student.eval(), store.tokenizer, counts))
    pair = torch.from_numpy(teacher_vectors(teacher, store, rows)[1].reshape(20, 3, -1)[:, :2].copy())
    with torch.inference_mode():
        raw = student.joined(pair, torch.ones(20, 2, dtype=torch.bool))
        torch.testing.assert_close((raw - student.means[2]) / student.spreads[2], joint, atol=1e-4, rtol=1e-4)
        # The RNA vector in place of the predicted one, in the ATAC vector's units.
        swapped = torch.stack([pair[:, 0], summaries[:, 0] * student.spreads[1] + student.means[1]], dim=1)
        raw = student.joined(swapped, torch.ones(20, 2, dtype=torch.bool))
    wanted = (raw - student.means[2]) / student.spreads[2]
    torch.testing.assert_close(said_of_rna, wanted, atol=1e-4, rtol=1e-4)


def test_mismatched_pairs_are_of_two_known_labels_whatever_the_batch(run):
    work, _ = stage(run, "joint")
    work.labels = np.array([0, 0, 1, -1, 1, 2, 0])
    rows = np.arange(7)
    places, partners = work.mismatched(rows, rows, 5)
    assert places.tolist() == [0, 1, 2, 4, 5, 6]
    assert all(work.labels[a] != work.labels[b] >= 0 for a, b in zip(places, partners, strict=True))
    halves = [work.mismatched(part, rows, 5) for part in (rows[:3], rows[3:])]
    assert np.concatenate([halves[0][0], halves[1][0] + 3]).tolist() == places.tolist()
    assert np.concatenate([half[1] for half in halves]).tolist() == partners.tolist()
    none = work.mismatched(rows[:2], rows[:2], 5)
    assert [len(part) for part in none] == [0, 0]
    assert len(work.mismatched(rows[:0], rows[:0], 5)[0]) == 0


def test_a_batch_without_pairs_trains_rna_alone(run):
    work, teacher = stage(run, "joint")
    rows = np.flatnonzero(run.store.cells["present"].to_numpy() & 3 == 1)[:8]
    losses = work.losses(run.store.read(rows), 0)
    assert (losses["match"].count, losses["atac"].count) == (0, 0)
    sum(loss.sum for loss in losses.values()).backward()
    assert teacher.genes.reduce.weight.grad.abs().sum() > 0
    assert not any(p.grad is not None and p.grad.abs().sum() > 0 for p in teacher.peaks.parameters())


def test_withheld_classes_are_the_share_asked_for_and_nowhere_in_the_input(run):
    work, teacher = stage(run, "unimodal-rna")
    rows = np.arange(200)
    counted = run.store.read(rows).counts["rna"].matrix(120).toarray() > 0
    hidden = work.withheld(counted, rows, 3)
    low, high = work.setting.mask
    assert abs(hidden[counted].mean() - (low + high) / 2) < 0.02
    assert abs(hidden[~counted].sum() / counted.sum() - work.setting.zeros) < 0.02
    assert np.array_equal(work.withheld(counted[50:60], rows[50:60], 3), hidden[50:60])
    seen = []
    hook = teacher.genes.states.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    losses = work.losses(run.store.read(rows), 3)
    hook.remove()
    shown = torch.cat(seen)
    assert torch.equal(shown == CLASSES, torch.from_numpy(hidden))
    assert losses["class"].count == hidden.sum()


def test_a_step_lowers_the_loss_of_its_batch(run):
    for name in STAGES:
        work, root = stage(run, name)
        root.requires_grad_(False)
        for module in work.trained():
            module.requires_grad_(True)
        parameters, optimizer = adamw(work.trained(), Optim(lr=1e-3))
        shared = share(run, name, 0)
        losses = [step(work, shared, parameters, optimizer, 1.0)["loss"] for _ in range(8)]
        assert losses[-1] < losses[0], name


def facts(run, name):
    found = checkpoint.committed(run.path("stages", name))
    assert found is not None
    return found


def test_the_whole_chain_runs_and_the_outlook_is_what_it_does(trained):
    run = trained
    assert run.chain() == list(STAGES)
    foreseen = {s.name: s for s in outlook(run)}
    for name in STAGES:
        done, wanted = facts(run, name), foreseen[name]
        assert (done["steps"], done["cells"], done["tokens"]) == (wanted.steps, wanted.cells, wanted.tokens)
        assert wanted.finished
    assert facts(run, "control")["started_from"] == facts(run, "unimodal-rna")["sha256"]
    assert facts(run, "distil")["started_from"] == facts(run, "joint")["sha256"]


def test_a_killed_chain_ends_as_if_it_had_not_been_killed(trained, tmp_path):
    whole = trained
    broken = small(tmp_path)
    resumed = killed(broken.recipe, [("unimodal-rna", 1), ("joint", 2), ("distil", 3)])
    assert resumed == ["unimodal-rna", "joint", "distil"]
    for name in STAGES:
        assert facts(broken, name)["sha256"] == facts(whole, name)["sha256"]
    seen: list = []
    chain(Run(broken.recipe), seen.append)
    assert all("finished" in event for event in seen)


def test_stages_are_run_as_the_recipe_asks(tmp_path):
    chain(small(tmp_path, stages="unimodal"), lambda event: None)
    assert checkpoint.committed(str(tmp_path / "stages" / "joint")) is None
    with pytest.raises(ValueError, match="joint has not finished"):
        chain(small(tmp_path, stages="distil"), lambda event: None)


def test_the_trained_models_come_back_and_are_scored(trained):
    run = trained
    teacher, student, control = run.trained_teacher(), run.trained_student(), run.trained_student("control")
    assert isinstance(teacher, ReferenceTeacher)
    assert isinstance(student, ReferenceStudent)
    for name in ("genes.reduce.weight", "joined.joint.weight"):
        assert torch.equal(student.state_dict()[name], teacher.state_dict()[name])
        assert not torch.equal(control.state_dict()[name], teacher.state_dict()[name])
    assert bool(student.sees)
    assert not bool(control.sees)
    run.store.manifest.setdefault("ingest", {"datasets": []})  # which this store was not made by
    scored, short = gather(run), dataclasses.replace(run.recipe.score, seeds=1, bootstrap=20, features=50)
    for name in ("atac", "protein"):
        rows = score_unit(scored, Unit(f"RNA to {name}", "sim", name), short, lambda text: None)
        assert any(row["model"] == "student" and row["value"] is not None for row in rows)
    with pytest.raises(ValueError, match="method=reference has no bundle"):
        export.export(run)
    with pytest.raises(ValueError, match="method=reference has no bundle"):
        full.run(run.recipe, Options())
    said = student_facts(run)
    assert said["parameters"] > said["teacher_parameters"]


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from cellray.train.feed import Feed
from cellray.train.fit import adamw, plan_of, step
from cellray.train.recipe import Optim
from tests.test_reference_stages import small, stage

folder, world, rank, file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{file}.rendezvous", world_size=world, rank=rank)
run = small(folder)
work, root = stage(run, "joint")
parameters, optimizer = adamw(work.trained(), Optim(lr=1e-3))
plan = plan_of(run.store, run.recipe, ~run.test, work.needs(), work.reads(), 1.0)
losses = []
with Feed(run.store, plan, first=0, rank=rank, world=world) as feed:
    for share in feed:
        losses.append(list(step(work, share, parameters, optimizer, 1.0).values())[:-1])
if rank == 0:
    save_file({"losses": torch.tensor(losses)}, file)
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
"""


def of_workers(folder, world):
    """Losses of every step of `joint`, [steps, parts], by so many processes over gloo."""
    file = folder / f"{world}.safetensors"
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder), str(world), str(rank), str(file)],
            env=environment,
            cwd=ROOT,
        )
        for rank in range(world)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return load_file(file)["losses"]


@pytest.mark.slow
def test_two_workers_find_the_mismatched_pairs_of_one(tmp_path):
    _ = small(tmp_path).test  # writes the split, so that no two workers do it at once
    one, two = of_workers(tmp_path, 1), of_workers(tmp_path, 2)
    assert len(one) > 3
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)
