from dataclasses import replace

import numpy as np
import pytest
import torch

from cellray.data.store import Store
from cellray.train.batches import plain_tokens
from cellray.train.chain import chain
from cellray.train.contexts import UNKNOWN, Contexts, names_of
from cellray.train.feed import Share
from cellray.train.fit import adamw, step
from cellray.train.recipe import Network, Optim
from cellray.train.run import Run
from cellray.train.stages import Joint, Unimodal
from cellray.train.targets import read_table, teacher_table, teacher_vectors
from tests import stores

CELLS = stores.SIMULATION.cells
ASSAYS = [("", "v3", "v2", "v3")[i % 4] for i in range(CELLS)]


def written(folder, assays, **changes):
    stores.write(str(folder / "store"), assay=assays, species=["human"] * CELLS)
    return stores.run(folder, **{"network.context_of": "species,assay", **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return written(tmp_path_factory.mktemp("run"), ASSAYS)


def test_names_are_sorted_known_and_of_training_cells(run):
    assert run.contexts.names == {"species": ("human",), "assay": ("v2", "v3")}
    train = np.array(ASSAYS) != "v2"
    assert names_of(run.store.cells, ["assay"], train) == {"assay": ("v3",)}
    with pytest.raises(
        ValueError, match=r"network\.context_of has tissue, which is known of no training cell"
    ):
        names_of(run.store.cells, ["tissue"], train)


def test_every_cell_has_its_number_and_names_that_are_not_listed_are_unknown(run):
    numbers = {"": 0, "v2": 1, "v3": 2}
    wanted = torch.tensor([[1, numbers[name]] for name in ASSAYS])
    rows = np.array([17, 4, 399, 4])
    assert torch.equal(run.contexts.of(rows), wanted[torch.from_numpy(rows)])
    fewer = Contexts(run.store.cells, {"assay": ("v1", "v3")})
    assert fewer.of(np.arange(4)).squeeze(1).tolist() == [UNKNOWN, 2, UNKNOWN, 2]


def test_in_training_some_are_unknown_the_same_whatever_the_batch(run):
    contexts = Contexts(run.store.cells, run.contexts.names, hide=0.3)
    rows = np.flatnonzero(np.array(ASSAYS) != "")
    found = contexts.drawn(rows, 5, 1)
    gone = found == UNKNOWN
    assert abs(gone.float().mean() - 0.3) < 0.05
    assert torch.equal(found[~gone], contexts.of(rows)[~gone])
    assert (gone[:, 0] != gone[:, 1]).any()
    assert torch.equal(contexts.drawn(rows[40:43], 5, 1), found[40:43])
    assert not torch.equal(contexts.drawn(rows, 5, 2), found)


def test_a_teacher_begins_as_one_that_is_told_nothing_and_learns_to_listen(run, tmp_path):
    stores.write(str(tmp_path / "store"), assay=ASSAYS, species=["human"] * CELLS)
    bare = stores.run(tmp_path)
    told, deaf = run.teacher(), bare.teacher()
    rows = np.arange(60)
    for a, b in zip(
        teacher_vectors(told, run.store, rows), teacher_vectors(deaf, bare.store, rows), strict=True
    ):
        assert np.array_equal(a, b)
    stage = Unimodal(
        run.recipe.unimodal, told, run.tokenizer, "rna", seed=0, device="cpu", contexts=run.contexts
    )
    joint = Joint(run.recipe.joint, told, run.tokenizer, seed=0, device="cpu", contexts=run.contexts)
    batch = run.store.read(np.arange(64))
    rna = batch.take(np.flatnonzero(batch.present & 1))
    for work, own in ((stage, rna), (joint, batch)):
        parameters, optimizer = adamw(work.trained(), Optim())
        before = [vectors.weight.detach().clone() for vectors in told.encoder("rna").about]
        for number in range(2):
            step(work, Share(number, 64, 0, own), parameters, optimizer, 1.0)
        for old, vectors in zip(before, told.encoder("rna").about, strict=True):
            assert (old != vectors.weight).any(dim=1).all()  # unknown too


def test_what_a_teacher_is_told_of_a_cell_of_another_store_goes_by_name(run, tmp_path):
    teacher = run.teacher()
    with torch.no_grad():
        for vectors in teacher.encoder("rna").about:
            torch.nn.init.normal_(vectors.weight)
    rows = np.arange(40)
    renamed = [{"v3": "v9"}.get(name, name) for name in ASSAYS]
    other = written(tmp_path, renamed)
    unknown = written(tmp_path / "unknown", ["" if name == "v3" else name for name in ASSAYS])
    mine, _ = teacher_vectors(teacher, run.store, rows)
    theirs, _ = teacher_vectors(teacher, other.store, rows)
    known = np.array(ASSAYS)[rows] != "v3"
    has = (run.store.read(rows).present & 1) == 1
    assert np.array_equal(mine[known], theirs[known])
    assert (mine[~known & has] != theirs[~known & has]).any(axis=1).all()
    assert np.array_equal(theirs, teacher_vectors(teacher, unknown.store, rows)[0])
    table = teacher_table(teacher, Store(run.store_url), rows)
    joint = table["joint"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
    assert np.array_equal(joint, mine)


def test_cells_of_which_nothing_is_said_are_of_unknown_kind(run):
    encoder = run.teacher().encoder("rna")
    with torch.no_grad():
        for vectors in encoder.about:
            torch.nn.init.normal_(vectors.weight)
    tokens = plain_tokens(
        run.store.read(np.arange(9)).counts["rna"], run.tokenizer.vocabularies["rna"].modality
    )
    unknown = replace(tokens, about=torch.zeros(9, 2, dtype=torch.int64))
    with torch.inference_mode():
        assert torch.equal(encoder(tokens).summary, encoder(unknown).summary)


def test_only_species_and_assay_can_be_told():
    with pytest.raises(ValueError, match=r"network\.context_of has donor; it may have species, assay"):
        Network(context_of=("donor",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each once"):
        Network(context_of=("assay", "assay"))


def test_a_chain_with_every_such_setting_ends_with_a_teacher_that_loads(tmp_path):
    changes = {"network.encoding": "rank", "unimodal.mask_by": "region", "unimodal.region": 4}
    short = {"unimodal.epochs": 0.3, "joint.epochs": 0.3, "distil.epochs": 0.3, "network.context_of": "assay"}
    run = written(tmp_path, ASSAYS, **changes, **short)
    chain(run, lambda event: None)
    again = Run(run.recipe)
    teacher = again.trained_teacher()
    rows = np.arange(20)
    table = read_table(again.teacher_path())["joint"].combine_chunks().flatten().to_numpy()
    found = teacher_vectors(teacher, again.store, rows)[0]
    np.testing.assert_allclose(found.ravel(), table[: found.size], atol=1e-5)
