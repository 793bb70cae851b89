"""The simulator: what it promises of cells, files and truth."""

from dataclasses import replace

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy.stats import nbinom
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge

from cellray.data import simulate as module
from cellray.data import truth
from cellray.data.modalities import normalise_names
from cellray.data.simulate import simulate
from cellray.data.truth import (
    ATAC,
    BLOCK,
    DATASETS,
    MODALITIES,
    PROTEIN,
    RNA,
    Simulation,
    cells_of,
    gene_ids,
    gene_programmes,
    peak_ids,
    protein_ids,
)
from pipelines import simulate as command

SMALL = Simulation(cells=400, genes=80, peaks=120, proteins=6, types=4, nuisance=4, depth=120)


@pytest.fixture(scope="module")
def usual():
    simulation = Simulation()
    return cells_of(simulation, 0, simulation.cells)


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    return simulate(str(tmp_path_factory.mktemp("atlas") / "small"), SMALL).parent


def same(one, other):
    arrays = ("names", "dataset", "cell_type", "state", "donor", "batch", "assay", "present")
    return all((getattr(one, a) == getattr(other, a)).all() for a in arrays) and all(
        (one.counts[m] != other.counts[m]).nnz == 0 for m in MODALITIES
    )


def log_normalised(counts):
    dense = counts.toarray().astype(float)
    return np.log1p(1e4 * dense / np.maximum(dense.sum(1, keepdims=True), 1))


def test_the_same_seed_gives_the_same_cells_and_another_seed_others():
    one = cells_of(SMALL, 0, 400)
    assert same(one, cells_of(SMALL, 0, 400))
    other = cells_of(replace(SMALL, seed=1), 0, 400)
    assert (one.counts["rna"] != other.counts["rna"]).nnz > 0
    assert not np.array_equal(one.state, other.state)


def test_a_range_of_cells_is_the_same_whatever_else_is_drawn():
    larger = replace(SMALL, cells=2 * BLOCK + 100)
    whole = cells_of(larger, 0, larger.cells)
    assert same(whole.take(np.arange(BLOCK - 50, BLOCK + 50)), cells_of(larger, BLOCK - 50, BLOCK + 50))
    assert same(whole.take(np.arange(400)), cells_of(SMALL, 0, 400))


def test_every_subset_of_the_modalities_occurs_and_no_cell_is_empty(usual):
    assert set(usual.present) == set(range(1, 8))
    for at, name in enumerate(MODALITIES):
        depth = np.asarray(usual.counts[name].sum(1)).ravel()
        assert ((depth > 0) <= (usual.present >> at & 1 == 1)).all()
        assert (depth > 0).sum() == (usual.present >> at & 1).sum()


def test_counts_are_whole_and_of_realistic_size(usual):
    per_cell = {}
    for at, name in enumerate(MODALITIES):
        counts = usual.counts[name][np.flatnonzero(usual.present >> at & 1)]
        assert counts.dtype == np.int32
        assert counts.data.min() > 0
        per_cell[name] = np.diff(counts.indptr).mean()
    assert usual.counts["atac"].data.max() == 1
    assert 250 < per_cell["rna"] < 350
    assert 140 < per_cell["atac"] < 250
    assert per_cell["protein"] > 23


def test_counts_follow_the_negative_binomial():
    mean, size = np.full(200_000, 3.0, np.float32), 8.0
    drawn = np.bincount(truth._negative_binomial(np.random.default_rng(0), mean, size), minlength=30) / len(
        mean
    )
    expected = nbinom.pmf(np.arange(30), size, size / (size + 3.0))
    assert np.abs(drawn[:30] - expected).max() < 0.005


def test_each_data_set_has_donors_batches_and_names_of_its_own(usual):
    frame = usual.obs().assign(dataset=usual.dataset)
    assert frame.index.is_unique
    assert frame["cell_type"].nunique() == 8
    assert set(frame["dataset"]) == set(DATASETS)
    assert (frame.groupby("dataset")["donor"].nunique() == 5).all()
    assert (frame.groupby("donor")["dataset"].nunique() == 1).all()
    assert (frame.groupby("batch")["dataset"].nunique() == 1).all()
    assert frame.groupby("dataset")["assay"].nunique().to_dict() == {
        "multiome": 1, "cite": 2, "tea": 1, "rna": 1, "atac": 1,
    }  # fmt: skip


def test_batches_and_assays_shift_the_counts_unless_told_not_to():
    def shift(simulation):
        cells = cells_of(simulation, 0, simulation.cells)
        rows = np.flatnonzero(cells.dataset == "cite")
        values = log_normalised(cells.counts["rna"][rows])
        first = cells.assay[rows] == cells.assay[rows][0]
        return np.abs(values[first].mean(0) - values[~first].mean(0)).mean()

    usual = Simulation(cells=2000, genes=300, peaks=10)
    assert shift(usual) > 2 * shift(replace(usual, technical=0.0))


def probes(cells, bits, names):
    """R² of the state in a held-out donor, from each modality alone and from all together."""
    rows = np.flatnonzero(cells.present & bits == bits)
    test = np.char.endswith(cells.donor[rows], "donor5")
    reduced = {}
    for name in names:
        raw = cells.counts[name][rows]
        values = log_normalised(raw) if name == "rna" else np.log1p(raw.toarray())
        reduced[name] = PCA(min(50, values.shape[1]), random_state=0).fit_transform(values)
    reduced["all"] = np.hstack(list(reduced.values()))
    state = cells.state[rows]
    return {
        name: Ridge(10.0).fit(x[~test], state[~test]).score(x[test], state[test])
        for name, x in reduced.items()
    }


def test_the_state_shows_weakly_in_rna_and_strongly_with_the_other_modalities(usual):
    atac = probes(usual, RNA | ATAC, ("rna", "atac"))
    protein = probes(usual, RNA | PROTEIN, ("rna", "protein"))
    assert atac["all"] > atac["rna"] + 0.2
    assert protein["all"] > protein["rna"] + 0.2
    assert atac["rna"] > 0.05


def test_genes_know_more_of_the_state_than_components_without_labels_keep(usual):
    rows = np.flatnonzero(usual.present & RNA)
    values, state = log_normalised(usual.counts["rna"][rows]), usual.state[rows]
    test = np.char.endswith(usual.donor[rows], "donor5")
    components = PCA(50, random_state=0).fit_transform(values)
    told = Ridge(1000.0).fit(values[~test], state[~test]).score(values[test], state[test])
    untold = Ridge(10.0).fit(components[~test], state[~test]).score(components[test], state[test])
    assert told > 0.5
    assert told > untold + 0.15


def test_genes_of_a_programme_go_together():
    simulation = Simulation(cells=1_000, genes=150, types=1, state=0, technical=0, nuisance=2)
    cells = cells_of(simulation, 0, simulation.cells)
    counts = cells.counts["rna"][cells.present & RNA > 0].toarray()
    together = np.abs(np.corrcoef(np.log1p(counts / counts.sum(1, keepdims=True) * 1e4), rowvar=False))
    programmes, number = gene_programmes(simulation), {g: i for i, g in enumerate(gene_ids(simulation))}
    assert list(programmes) == ["PROGRAMME1", "PROGRAMME2"]
    sets = [[number[gene] for gene in genes] for genes in programmes.values()]
    rest = np.setdiff1d(np.arange(150), np.concatenate(sets))

    def mean(genes):
        return together[np.ix_(genes, genes)][np.triu_indices(len(genes), 1)].mean()

    assert all(5 < len(genes) < 40 for genes in sets)
    assert min(map(mean, sets)) > 1.5 * mean(rest)


def test_without_state_nothing_can_be_told_of_it():
    simulation = Simulation(cells=2000, genes=200, peaks=200, state=0.0)
    assert probes(cells_of(simulation, 0, 2000), RNA | ATAC, ("rna", "atac"))["all"] < 0.02


def test_types_can_be_told_but_siblings_not_always(usual):
    rows = np.flatnonzero(usual.present & RNA)
    values, types = (
        PCA(50, random_state=0).fit_transform(log_normalised(usual.counts["rna"][rows])),
        (usual.cell_type[rows]),
    )
    test = np.char.endswith(usual.donor[rows], "donor5")
    model = LogisticRegression(C=0.1, max_iter=500).fit(values[~test], types[~test])
    found = model.predict(values[test])
    families = np.array([name[:-1] for name in types[test]])
    assert 0.5 < (found == types[test]).mean() < 0.95
    assert (np.array([name[:-1] for name in found]) == families).mean() > 0.95


def test_the_table_names_files_that_hold_the_cells(atlas):
    table = pd.read_csv(atlas / "atlas.csv", keep_default_na=False, dtype=str)
    assert list(table.columns) == [
        "dataset", "modality", "url", "label", "batch", "donor", "assay", "species", "tissue", "layer",
        "names",
    ]  # fmt: skip
    assert set(table["dataset"]) == set(DATASETS)
    assert all((atlas / url).exists() for url in table["url"])
    assert sorted(p.name for p in atlas.iterdir()) == sorted(
        {"atlas.csv", "truth.csv", "simulation.json", *table["url"]}
    )
    assert set(table["layer"]) == {"", "raw", "counts"}


def test_each_file_gives_back_the_cells_that_were_drawn(atlas):
    cells = cells_of(SMALL, 0, SMALL.cells)

    def check(counts, names, features, dataset, modality):
        at = MODALITIES.index(modality)
        rows = np.flatnonzero((cells.dataset == dataset) & (cells.present >> at & 1 == 1))
        ids = {"rna": gene_ids, "atac": peak_ids, "protein": protein_ids}[modality](SMALL)
        kind = {"rna": "gene", "atac": "peak", "protein": "protein"}[modality]
        assert list(names) == list(cells.names[rows])
        assert normalise_names(list(features), kind) == ids
        dense = counts if isinstance(counts, np.ndarray) else counts.toarray()
        assert np.array_equal(dense, cells.counts[modality][rows].toarray())

    rna = ad.read_h5ad(atlas / "multiome_rna.h5ad")
    assert rna.raw is not None
    assert rna.n_vars < rna.raw.X.shape[1]
    check(rna.raw.X, rna.obs_names, rna.raw.var_names, "multiome", "rna")
    atac = ad.read_h5ad(atlas / "multiome_atac.h5ad")
    assert atac.X.format == "csc"
    check(atac.X, atac.obs_names, atac.var_names, "multiome", "atac")
    rna = ad.read_h5ad(atlas / "cite_rna.h5ad")
    assert np.allclose(rna.X.toarray(), log_normalised(rna.layers["counts"]), atol=1e-5)
    check(rna.layers["counts"], rna.obs_names, rna.var_names, "cite", "rna")
    protein = ad.read_h5ad(atlas / "cite_protein.h5ad")
    assert isinstance(protein.X, np.ndarray)
    check(protein.X, protein.obs_names, protein.var_names, "cite", "protein")
    with md.set_options(pull_on_update=False):
        tea = md.read_h5mu(atlas / "tea.h5mu")
    for modality, part in tea.mod.items():
        check(part.X, part.obs_names, part.var_names, "tea", modality)
    own = cells.take(np.flatnonzero(cells.dataset == "tea")).obs()
    assert (tea.obs.loc[own.index, "cell_type"] == own["cell_type"]).all()
    rna = ad.io.read_elem(zarr.open_group(atlas / "rna.zarr", mode="r"))
    check(rna.X, rna.obs_names, rna.var["gene_ids"], "rna", "rna")
    atac = ad.read_h5ad(atlas / "atac.h5ad")
    check(atac.X, atac.obs_names, atac.var_names, "atac", "atac")


def test_files_of_a_data_set_share_most_cells_but_not_all(atlas):
    rna, atac = (ad.read_h5ad(atlas / f"multiome_{m}.h5ad").obs_names for m in ("rna", "atac"))
    assert 0 < len(rna.difference(atac)) < len(rna) / 2
    assert 0 < len(atac.difference(rna)) < len(atac) / 2


def test_the_truth_lists_every_cell_once(atlas):
    cells = cells_of(SMALL, 0, SMALL.cells)
    table = pd.read_csv(atlas / "truth.csv").set_index("cell_id")
    assert table.index.is_unique
    own = table.loc[[f"{d}:{n}" for d, n in zip(cells.dataset, cells.names, strict=True)]]
    assert np.allclose(own["state"], cells.state, atol=1e-6)
    assert (own["cell_type"] == cells.cell_type).all()
    assert table.select_dtypes("number").columns.tolist() == ["state"]


def test_large_atlases_go_to_more_data_sets_with_donors_of_their_own(tmp_path):
    simulation = replace(SMALL, cells=BLOCK + 200, genes=20, peaks=20, group=1)
    table = pd.read_csv(simulate(str(tmp_path / "a"), simulation))
    assert set(table["dataset"]) == {*DATASETS, *(f"{name}-2" for name in DATASETS)}
    cells = cells_of(simulation, 0, simulation.cells)
    assert set(cells.donor[cells.dataset == "tea-2"]) <= {f"tea-2-donor{i}" for i in range(1, 6)}
    assert len(set(cells.names)) == len(cells)


def test_a_repeated_command_changes_nothing_and_other_content_is_refused(tmp_path):
    first = simulate(str(tmp_path / "a"), SMALL)
    stamp = first.stat().st_mtime_ns
    assert simulate(str(tmp_path / "a"), SMALL) == first
    assert first.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="does not hold this simulation"):
        simulate(str(tmp_path / "a"), replace(SMALL, seed=1))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        simulate(str(tmp_path / "file"), SMALL)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_WRITERS", (*module._WRITERS[:2], interrupted, *module._WRITERS[3:]))
    with pytest.raises(KeyboardInterrupt):
        simulate(str(tmp_path / "a"), SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [({"cells": 3}, "cells is 3"), ({"types": 0}, "types is 0"), ({"state": -1.0}, "state is -1"),
     ({"accessible": 1.0}, "accessible 1.0"), ({"types": 99}, "at most 50")],
)  # fmt: skip
def test_impossible_settings_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        replace(SMALL, **change)


def test_cells_outside_the_simulation_are_refused():
    with pytest.raises(ValueError, match="not within the 400 simulated"):
        cells_of(SMALL, 100, 401)


def test_the_command_writes_an_atlas_and_refuses_what_does_not_exist(tmp_path, capsys):
    folder = str(tmp_path / "a")
    small = ["cells=80", "genes=20", "peaks=20", "proteins=2", "types=2", "seed=3"]
    assert command.main([folder, *small]) == 0
    assert "80 cells, 20 genes" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "a" / "truth.csv")) == 80
    assert command.main([folder, "gene=20"]) == 2
    assert "Did you mean 'genes'?" in capsys.readouterr().err
    assert command.main(["--help"]) == 0
    assert "cells=6000" in capsys.readouterr().out
