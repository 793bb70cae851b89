import dataclasses
import itertools

import numpy as np
import pytest
import torch

from cellray.data.modalities import ATAC, RNA
from cellray.train.batches import asked_features, kept, masked_tokens, plain_tokens, targets
from cellray.train.feed import Share
from cellray.train.fit import adamw, step
from cellray.train.recipe import Optim
from cellray.train.stages import Control, Distil, Joint, Unimodal, View
from cellray.train.targets import TeacherVectors, teacher_table
from tests import stores
from tests.chains import check_what_is_trained

NAMES = ("rna", "atac", "protein")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return stores.run(tmp_path_factory.mktemp("run"))


def stage(run, name):
    """A stage and the module that holds what it trains."""
    kind = "transformer" if name.endswith("transformer") else "mlp"
    recipe, teacher, student = run.recipe, run.teacher(), run.student(kind)
    if name == "joint":
        return Joint(recipe.joint, teacher, run.tokenizer, seed=0, device="cpu"), teacher
    if name in NAMES:
        return Unimodal(recipe.unimodal, teacher, run.tokenizer, name, seed=0, device="cpu"), teacher
    view = View(recipe.distil, student, run.tokenizer, seed=0, device="cpu")
    if name == "control":
        return Control(view), student
    table = teacher_table(teacher, run.store, np.arange(len(run.store)))
    return Distil(view, TeacherVectors(table, run.store.cells["cell_id"].combine_chunks())), student


def share(run, number, size=48):
    cells = np.arange(number * size, (number + 1) * size)
    if number == 0:
        assert len(set(run.store.cells["present"].to_numpy()[cells].tolist())) > 3
    return Share(number, size, 0, run.store.read(cells))


def only(run, shared, modality):
    """Of a share, the cells that have the modality: what a plan would give."""
    bit = list(run.tokenizer.vocabularies).index(modality)
    return Share(
        shared.step, shared.cells, 0, shared.batch.take(np.flatnonzero((shared.batch.present >> bit) & 1))
    )


@pytest.mark.parametrize("name", [*NAMES, "joint", "distil", "distil-transformer", "control"])
def test_what_is_trained_gets_gradients_and_the_rest_stays_bit_for_bit(run, name):
    work, root = stage(run, name)
    assert work.name == (f"unimodal-{name}" if name in NAMES else name)
    shares = [share(run, number) for number in range(2)]
    if name != "joint":
        shares = [only(run, part, name if name in NAMES else "rna") for part in shares]
    check_what_is_trained(work, root, [part.batch for part in shares])


def test_a_step_lowers_the_loss_of_its_batch(run):
    work, root = stage(run, "joint")
    parameters, optimizer = adamw(work.trained(), Optim(lr=1e-3))
    shared = share(run, 0)
    losses = [step(work, shared, parameters, optimizer, 1.0)["loss"] for _ in range(8)]
    assert losses[-1] < losses[0]
    assert root.training


def test_the_prior_of_stage_3_is_for_what_rna_does_not_show_and_fades_with_the_cells(run):
    batch = only(run, share(run, 0), "rna").batch
    losses = {}
    for prior in (0.0, 50.0, 100.0):
        work, _ = stage(run, "distil")
        work.view.setting = dataclasses.replace(work.view.setting, prior=prior)
        losses[prior] = {name: loss.sum.item() for name, loss in work.losses(batch, 0).items()}
    changed = {name for name, value in losses[0.0].items() if losses[50.0][name] != value}
    assert changed == {"decode-atac", "decode-protein"}
    for name in ("atac", "protein"):
        some = batch.take(np.flatnonzero((batch.present >> NAMES.index(name)) & 1))
        decoder, vocabulary = work.view.student.decoder(name), run.tokenizer.vocabularies[name]
        asked = asked_features(len(vocabulary), work.view.setting.queries, work.view.seed, 0)
        rows = slice(None) if asked is None else torch.from_numpy(asked)
        said = decoder.direction(work.view(some, 0).embedding.float()) @ decoder.feature.weight[rows].T
        per_cell = said.square().sum().item() / vocabulary.cells[""]
        extra = [losses[prior][f"decode-{name}"] - losses[0.0][f"decode-{name}"] for prior in (50.0, 100.0)]
        assert extra == pytest.approx([50 * per_cell, 100 * per_cell], rel=1e-2)


def test_the_value_of_a_hidden_token_is_nowhere_in_the_input(run):
    counts = run.store.read(np.arange(60)).counts["rna"]
    rows = np.arange(60)
    tokens, at, truth = masked_tokens(counts, rows, RNA, 120, mask=(0.3, 0.3), zeros=0.5, keys=(1, 2))
    assert tokens.hidden[at].all()
    assert (truth == 0).sum() > 0
    assert abs((truth > 0).sum() / counts.offsets[-1] - 0.3) < 0.05
    cell = np.repeat(np.arange(60), np.diff(tokens.offsets.numpy()))
    matrix = counts.matrix(120).toarray()
    ids, hidden, values = tokens.ids.numpy(), tokens.hidden.numpy(), tokens.values.numpy()
    assert np.array_equal(matrix[cell, ids] > 0, values > 0)
    visible = ~hidden
    assert len(set(zip(cell.tolist(), ids.tolist(), strict=True))) == len(ids)
    assert (values[visible] > 0).all()


def test_what_is_hidden_does_not_depend_on_the_batch(run):
    counts = run.store.read(np.arange(60)).counts["atac"]
    picked = np.array([41, 3, 17])
    whole, part = (
        masked_tokens(counts.take(rows), rows, ATAC, 150, mask=(0.1, 0.5), zeros=0.5, keys=(1, 2))[0]
        for rows in (np.arange(60), picked)
    )
    for i, row in enumerate(picked):
        a = slice(int(part.offsets[i]), int(part.offsets[i + 1]))
        b = slice(int(whole.offsets[row]), int(whole.offsets[row + 1]))
        assert torch.equal(part.ids[a], whole.ids[b])
        assert torch.equal(part.hidden[a], whole.hidden[b])


def test_dropped_tokens_are_the_share_asked_for(run):
    counts = run.store.read(np.arange(200)).counts["rna"]
    keep = kept(counts, np.arange(200), 0.25, 7)
    assert abs(keep.mean() - 0.75) < 0.02
    tokens = plain_tokens(counts, RNA, keep=keep)
    assert len(tokens.ids) == keep.sum()
    assert torch.equal(
        tokens.offsets[1:] - tokens.offsets[:-1],
        torch.tensor([int(keep[a:b].sum()) for a, b in itertools.pairwise(counts.offsets)]),
    )


def test_targets_are_the_raw_counts_of_what_is_asked(run):
    counts = run.store.read(np.arange(30)).counts["rna"]
    dense = counts.matrix(120).toarray()
    assert np.array_equal(targets(counts, 120, None).numpy(), dense)
    asked = asked_features(120, 17, 1, 2)
    assert asked is not None
    assert len(set(asked.tolist())) == 17
    assert np.array_equal(targets(counts, 120, asked).numpy(), dense[:, asked])


def test_fusion_is_shown_a_part_of_what_is_there_and_never_nothing(run):
    work, _ = stage(run, "joint")
    rows = np.arange(400)
    has = np.random.default_rng(0).random((400, 3)) < 0.7
    has[~has.any(axis=1), 0] = True
    shown = work._shown(rows, has, 5)
    assert not (shown & ~has).any()
    assert shown.any(axis=1).all()
    several = has.sum(axis=1) > 1
    assert 0.1 < (shown[several] != has[several]).any(axis=1).mean() < 0.95
    assert np.array_equal(work._shown(rows[50:60], has[50:60], 5), shown[50:60])


def test_teacher_vectors_are_joined_by_cell_id_whatever_their_order(run):
    teacher, ids = run.teacher(), run.store.cells["cell_id"].combine_chunks()
    table = teacher_table(teacher, run.store, np.arange(len(run.store)))
    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))
    rows = np.array([5, 399, 0, 77])
    for a, b in zip(TeacherVectors(table, ids).of(rows), TeacherVectors(shuffled, ids).of(rows), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="have no teacher vector"):
        TeacherVectors(table.slice(1), ids)


def test_what_is_asked_takes_half_of_a_short_context(run):
    counts, rows = run.store.read(np.arange(60)).counts["rna"], np.arange(60)
    short = dataclasses.replace(RNA, context=16)
    tokens, at, truth = masked_tokens(counts, rows, short, 120, mask=(0.4, 0.4), zeros=0.5, keys=(1, 2))
    for i in range(60):
        first, last = int(tokens.offsets[i]), int(tokens.offsets[i + 1])
        within = tokens.hidden[first : min(last, first + 16)]
        seen = int((~tokens.hidden[first:last]).sum())
        assert int(within.sum()) <= max(8, 16 - seen)
    asked = truth > 0  # hidden values and absent features are asked in the shares they have in all
    assert 0.5 < float(asked.float().mean()) < 0.8
    assert at.max() < tokens.offsets[-1]
