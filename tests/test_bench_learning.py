"""The bench of learning does what it says: wrong pairs, errors of hidden values, ceilings, rows, resuming."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from cellray.data import truth
from cellray.data.split import held_out
from cellray.data.store import Store
from cellray.data.truth import MODALITIES, Simulation
from cellray.train import checkpoint
from cellray.train.batches import masked_tokens
from cellray.train.recipe import load, override
from cellray.train.run import Run
from tests import stores
from tests.bench.harness.jobs import Cost, losses_of
from tests.bench.learned import material, measures, simulator
from tests.bench.learned.rows import Results, rows
from tests.bench.learning import Runs, stretched

SMALL = Simulation(cells=700, genes=40, peaks=60, proteins=6, types=4, donors=3, nuisance=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("learning")
    material.write(path, SMALL)
    return path


@pytest.fixture(scope="module")
def bench(folder):
    store = Store(str(folder / "true"))
    return measures.Bench(material.Material(SMALL, store, held_out(store.cells)[0]))


@pytest.fixture(scope="module")
def run(folder):
    """A run with random weights in place of what a stage would come to."""
    settings = {"run": str(folder / "run"), "store": str(folder / "true"), "unimodal.zeros": 0.5}
    found = Run(override(load("pipelines.recipes.tiny:recipe"), settings))
    for modality in MODALITIES:
        checkpoint.commit(found.path("stages", f"unimodal-{modality}"), found.teacher(), {})
    return found


@pytest.mark.parametrize("modality", ["atac", "protein"])
def test_shuffled_pairs_stay_within_type_and_donor_and_change_the_partner(modality):
    cells = material.in_order(SMALL)
    given = material.partners(cells, modality, SMALL.seed)
    assert sorted(given) == list(range(len(cells)))
    bit = 1 << MODALITIES.index(modality)
    both = (cells.present & 1 > 0) & (cells.present & bit > 0)
    assert (given[~both] == np.flatnonzero(~both)).all()
    assert both[given[both]].all()
    kinds = list(zip(cells.dataset, cells.donor, cells.cell_type, strict=True))
    assert all(kinds[i] == kinds[given[i]] for i in range(len(cells)))
    for i in np.flatnonzero(both & (given == np.arange(len(cells)))):
        assert sum(both[j] and kinds[j] == kinds[i] for j in range(len(cells))) == 1
    assert material.moves(cells, modality, SMALL.seed).mean() > 0.9
    assert (material.partners(cells, modality, SMALL.seed) == given).all()


def test_the_store_of_wrong_pairs_differs_in_the_partners_alone(folder):
    right, wrong = (Store(str(folder / name)) for name in ("true", "shuffled"))
    assert right.tokenizer.hash == wrong.tokenizer.hash
    assert right.cells["cell_id"].equals(wrong.cells["cell_id"])
    assert (held_out(right.cells)[0] == held_out(wrong.cells)[0]).all()
    every = np.arange(len(right))
    true, mixed = right.read(every), wrong.read(every)
    assert (true.present == mixed.present).all()
    assert (true.counts["rna"].ids == mixed.counts["rna"].ids).all()
    for modality in ("atac", "protein"):
        own = true.counts[modality].take(material.partners(material.in_order(SMALL), modality, SMALL.seed))
        size = len(right.tokenizer.vocabularies[modality])
        assert (own.matrix(size) != mixed.counts[modality].matrix(size)).nnz == 0
        assert (own.total == mixed.counts[modality].total).all()


def test_the_error_of_hidden_values_is_that_of_a_loop_over_cells(run, bench):
    found = measures.stage_one(run, bench)
    teacher = run.teacher().eval()
    encoder, heads = teacher.encoder("rna"), teacher.heads["rna"]
    vocabulary, store, cells = run.tokenizer.vocabularies["rna"], bench.material.store, bench.cells
    counts, total = cells.counts["rna"].toarray(), cells.counts["rna"].toarray().sum(axis=1)
    values = np.log1p(counts * 1e4 / np.maximum(total, 1)[:, None])
    train = np.flatnonzero(~bench.test & (cells.present & 1 > 0))
    mean = [np.mean([values[i, g] for i in train if counts[i, g]]) for g in range(SMALL.genes)]
    ours, theirs = [], []
    for row in bench.held("rna"):
        tokens, at, real = masked_tokens(
            store.read(np.array([row])).counts["rna"],
            np.array([row]),
            vocabulary.modality,
            len(vocabulary),
            mask=run.recipe.unimodal.mask,
            zeros=run.recipe.unimodal.zeros,
            keys=(measures.MASKING,),
        )
        with torch.inference_mode():
            said = heads(encoder(tokens, heads.withheld).states[at])[0] * encoder.unit
        for gene, guess, value in zip(tokens.ids[at].tolist(), said.tolist(), real.tolist(), strict=True):
            assert value == pytest.approx(values[row, gene], abs=1e-5)
            if value > 0:
                ours.append((guess - value) ** 2)
                theirs.append((mean[gene] - value) ** 2)
    assert len(ours) > 100
    assert found["value of rna/model"] == pytest.approx(np.mean(ours), rel=1e-3)
    assert found["value of rna/per-feature mean"] == pytest.approx(np.mean(theirs), rel=1e-3)


def test_the_simulators_rates_are_those_its_counts_are_drawn_from(bench):
    before = dict(truth._DRAW)
    found = bench.rates
    assert before == truth._DRAW
    for modality in MODALITIES:
        has = bench.material.measured(modality)
        counts = (bench.cells.counts[modality] > 0 if modality == "atac" else bench.cells.counts[modality])[
            has
        ]
        rates = found.mean[modality][has]
        assert np.isnan(found.mean[modality][~has]).all()
        spread = counts.toarray().std(axis=0) / np.sqrt(has.sum())
        off = (np.asarray(counts.mean(axis=0)).ravel() - rates.mean(axis=0)) / np.maximum(spread, 1e-3)
        assert np.sqrt(np.mean(off**2)) < 1.5
    better = measures.roc_auc_score(
        (bench.cells.counts["rna"][bench.held("rna")] > 0).toarray().ravel(),
        simulator.counted(found.mean["rna"][bench.held("rna")]).ravel(),
    )
    assert better > 0.75


def test_what_peaks_tell_of_the_state_is_what_a_grid_over_state_and_depth_says():
    """Exact posteriors on a grid, under a normal prior, of many peaks, where the Laplace form is near."""
    simulation = replace(SMALL, peaks=400)
    cells = truth.cells_of(simulation, 0, 200)
    rates = simulator.rates(replace(simulation, cells=200))
    names = truth.type_names(simulation)
    types = np.array([names.index(t) for t in cells.cell_type])
    told = simulator.state_information(replace(simulation, cells=200), rates, types)
    has = np.flatnonzero(cells.present & 2)[:20]
    assert (told["atac"][np.flatnonzero(cells.present & 2 == 0)] == 0).all()
    slope = truth._responses(simulation)["atac"].state
    step = np.linspace(-4, 4, 161)
    exact = []
    for cell in has:
        p = rates.mean["atac"][cell]
        open_ = cells.counts["atac"][cell].toarray().ravel() > 0
        grid = np.log(p / (1 - p)) + (step[:, None, None] - cells.state[cell]) * slope[types[cell]]
        grid = grid + 0.35 * (step[None, ::4, None] * 0.5)
        log = np.where(open_, -np.log1p(np.exp(-grid)), -np.log1p(np.exp(grid))).sum(axis=2)
        log -= step[:, None] ** 2 / 2 + (step[None, ::4] * 0.5) ** 2 / 2
        chance = np.exp(log - log.max()).sum(axis=1)
        chance /= chance.sum()
        exact.append(chance @ step**2 - (chance @ step) ** 2)
    laplace = 1 / (1 + told["atac"][has])
    assert np.mean(laplace) == pytest.approx(np.mean(exact), rel=0.2)


def test_the_value_of_a_counted_gene_is_its_mean_over_draws():
    rng = np.random.default_rng(0)
    for mean, total in itertools.product((0.1, 1.0, 6.0), (300, 900)):
        drawn = rng.negative_binomial(8, 8 / (8 + mean), 200_000)
        seen = np.log1p(1e4 * drawn[drawn > 0] / total).mean()
        assert simulator.value_when_counted(np.array([mean]), np.array([total]))[0] == pytest.approx(
            seen, abs=0.01
        )
        assert simulator.counted(np.array([mean]))[0] == pytest.approx((drawn > 0).mean(), abs=0.005)


def test_the_type_mean_correlates_with_nothing_within_type_and_the_truth_with_all(bench):
    train, test = bench.rows("pairs")
    assert not bench.test[train].any()
    assert bench.test[test].all()
    known = (bench.cells.counts["atac"][train][:, bench.peaks] > 0).toarray().astype(float)
    real = (bench.cells.counts["atac"][test][:, bench.peaks] > 0).toarray().astype(float)
    kinds = bench.kinds(np.concatenate([train, test]))
    means = measures._type_means(known, kinds[: len(train)], kinds[len(train) :])
    for i in (0, len(test) - 1):
        alike = kinds[: len(train)] == kinds[len(train) + i]
        assert means[i] == pytest.approx(known[alike].mean(axis=0))
    assert bench.within_type(means) == 0
    assert bench.within_type(real) == pytest.approx(1)


@pytest.mark.parametrize("cohort", measures.COHORTS)
def test_types_are_learnt_from_training_cells_and_scored_on_held_out_ones(bench, cohort):
    found = measures.simple_types(bench)
    train, test = bench.rows(cohort)
    types = bench.cells.cell_type
    names, number = np.unique(types[train], return_counts=True)
    majority = np.mean(types[test] == names[number.argmax()])
    assert found[f"label of {cohort}/majority"] == pytest.approx(majority)
    counts = bench.cells.counts["rna"].toarray()
    profiles = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True).clip(1))
    model = LogisticRegression(C=0.1, max_iter=2000).fit(profiles[train], types[train])
    right = model.score(profiles[test], types[test])
    assert found[f"label of {cohort}/logistic regression on genes"] == pytest.approx(right, abs=0.02)
    assert majority < found[f"label of {cohort}/logistic regression on PCA"] <= 1


MODELS = {"teacher": 0.8, "teacher of RNA": 0.4, "student": 0.5, "control": 0.1, "random": 0.1}
FIGURES = {
    **{f"value of rna/{name}": value for name, value in (("model", 0.4), ("per-feature mean", 0.5))},
    **{f"absolute value of rna/{name}": 0.5 for name in ("model", "per-feature mean")},
    **{f"detection of rna/{name}": 0.8 for name in ("model", "per-feature frequency")},
    **{f"RNA to ATAC/{name}": 0.03 for name in ("joint", "student")},
    **{
        f"{what} of {cohort}/{model}": value
        for what in ("state", "state within type", "label")
        for cohort in ("pairs", "cite")
        for model, value in MODELS.items()
    },
}


def test_rows_say_what_was_met_and_name_the_baseline():
    wrong = FIGURES | {f"state of {c}/student": 0.3 for c in ("pairs", "cite")}
    simple = {
        f"RNA to ATAC/{m}": v for m, v in (("type mean", 0), ("ridge on PCA", 0.02), ("kNN on PCA", 0.04))
    }
    others = simple | {f"state of {c}/all there is to know of RNA": 0.7 for c in ("pairs", "cite")}
    others["label of cite/majority"] = 0.2
    found = {r.what: r for r in rows(Results([FIGURES] * 2, [wrong] * 2, [], others, why_not="no time"))}
    error = found["stage 1, rna: error of hidden values, under"]
    assert (error.value, error.goal, error.met) == (pytest.approx(20), 10, True)
    assert "2 seeds" in error.note
    recovery = found["state, RNA + ATAC: recovery"]
    assert recovery.value == pytest.approx(4 / 7)
    assert recovery.met
    joint = found["stage 2, RNA to ATAC within type: joint"]
    assert (joint.goal, joint.met) == (0.04, False)
    assert joint.baseline.startswith("kNN on PCA")
    left = found["state, RNA + ATAC, pairs shuffled: share of the gain that is left"]
    assert (left.value, left.met) == (pytest.approx(0.5), False)
    assert found["type, RNA + protein: majority"].value == 0.2
    assert found["type, RNA + protein: student"].value == 0.5
    assert found["ours - reference"].value is None
    assert "no time" in found["ours - reference"].note


def test_the_cpu_time_of_a_chain_that_was_cut_short_adds_up(tmp_path):
    cost = Cost(tmp_path / "cpu.json", "a run")
    settings = {"unimodal.epochs": 0.5, "distil.epochs": 0.5}
    before = cost.chain(stores.run(tmp_path, stages="unimodal", **settings))
    assert set(before) == {"unimodal-rna", "unimodal-atac", "unimodal-protein"}
    whole = stores.run(tmp_path, **settings)
    after = cost.chain(whole)
    assert set(after) == {*whole.chain(), "teacher"}
    assert min(after.values()) > 0
    assert {name: after[name] for name in before} == before
    assert json.loads((tmp_path / "cpu.json").read_text()) == after
    assert losses_of(whole)["joint"]["first"].keys() == losses_of(whole)["joint"]["last"].keys()


def test_what_is_there_is_not_done_again_and_other_settings_are_another_run(tmp_path, monkeypatch):
    started = []

    def process(command):
        job = material.Path(command[-1])
        started.append(job.parent.name)
        material.Path(str(job.with_suffix(".json"))).write_text("{}")

    monkeypatch.setattr("tests.bench.harness.jobs.process", process)
    runs = Runs(tmp_path, {"cells": 600}, quick=True)
    assert runs.train("ours", 0) == runs.train("ours", 0) == {}
    assert len(started) == 1
    runs.train("ours", 1)
    runs.train("shuffled", 0)
    assert len(set(started)) == 3
    Runs(tmp_path, {"cells": 600}, quick=False).train("ours", 0)
    assert len(set(started)) == 4
    runs.train("ours", 0)  # nor is it for what was done in between
    assert len(started) == 4
    monkeypatch.setattr("tests.bench.learning.code", lambda folders: "other")
    runs.train("ours", 0)
    assert len(set(started)) == 5
    assert len(list(tmp_path.glob("ours-0-*"))) == 1, "what other code came to is not kept"


def test_stretched_epochs_are_those_of_every_stage():
    recipe = load("pipelines.recipes.tiny:recipe")
    found = stretched(recipe, 0.5)
    assert (found.unimodal.epochs, found.joint.epochs, found.distil.epochs) == (0.5, 0.5, 1.0)
    assert replace(found, unimodal=recipe.unimodal, joint=recipe.joint, distil=recipe.distil) == recipe
