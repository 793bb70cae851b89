from pathlib import Path

import numpy as np
import pytest

from cellray.data.ingest import ingest
from cellray.data.store import Store
from cellray.train.recipe import Recipe, override
from tests import soma
from tests.files import anndata, poisson, table, write

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray Data warns of its own defaults
]


def make(folder, *rows, **settings):
    """The store of an atlas with these rows, and the report."""
    recipe = Recipe(atlas=table(folder / "atlas.csv", *rows))
    recipe = override(recipe, {"qc.mads": 0, "ingest.unit_cells": 40} | settings)
    report = ingest(recipe, str(folder / "store"))
    return Store(str(folder / "store")), report


def shards(folder):
    """The bytes of every shard and vocabulary."""
    found = [path for path in Path(folder, "store").rglob("*.arrow") if path.is_file()]
    return {path.name: path.read_bytes() for path in found}


def test_an_experiment_gives_the_tokens_that_the_h5ad_of_the_same_cells_gives(tmp_path):
    obs = {"type": ["T", "B", ""] * 30, "assay": ["v2", "v3"] * 45}
    data = anndata(poisson(90, 30), obs=obs, var={"gene_name": [f"G{i}" for i in range(30)]})
    (tmp_path / "flat").mkdir()
    (tmp_path / "soma").mkdir()
    write(data, tmp_path / "flat" / "a.h5ad")
    soma.write(data, tmp_path / "soma" / "a")
    row = {"dataset": "d", "modality": "rna", "label": "type", "assay": "assay"}
    flat, told = make(tmp_path / "flat", row | {"url": "a.h5ad"})
    found, same = make(tmp_path / "soma", row | {"url": "a"})
    assert len(found) == len(flat) == 90
    assert shards(tmp_path / "soma") == shards(tmp_path / "flat")
    assert not same["failed"]
    assert not told["failed"]


def test_a_census_is_ingested_from_its_raw_counts(tmp_path):
    matrix, cells = poisson(50, 20) + 0.0, np.cumsum(np.arange(50) % 3 + 1)
    obs = {
        "assay_ontology_term_id": ["EFO:1"] * 50,
        "cell_type_ontology_term_id": ["CL:1"] * 50,
        "cell_type": ["T cell", "B cell"] * 25,
        "donor_id": ["d1"] * 25 + ["d2"] * 25,
    }
    soma.census(tmp_path / "a", cells, range(20), obs=obs, normalized=matrix / 3, raw=matrix, batches=2)
    store, report = make(tmp_path, {"dataset": "census", "url": "a"})
    assert not report["failed"]
    kinds = dict(zip(store.cells["cell_id"].to_pylist(), store.cells["label"].to_pylist(), strict=True))
    assert kinds == {f"census:{i}": kind for i, kind in zip(cells, obs["cell_type"], strict=True)}
    batch = store.read(np.arange(len(store)))
    words = store.tokenizer.vocabularies["rna"]
    columns = np.array([int(name.removeprefix("ENSG")) for name in words.ids])
    order = np.searchsorted(
        cells, [int(name.partition(":")[2]) for name in store.cells["cell_id"].to_pylist()]
    )
    np.testing.assert_array_equal(
        batch.counts["rna"].matrix(len(words)).toarray(), matrix[np.ix_(order, columns)]
    )
