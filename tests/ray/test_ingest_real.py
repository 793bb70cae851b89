"""Real files in one store, where they are beside the checkout."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from cellray.data.store import Store
from tests.files import table
from tests.ray.test_ingest import make, whole

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray Data warns of its own defaults
]


@pytest.mark.slow
def test_real_pairs_are_ingested_whole(tmp_path, shared_data):
    folder = shared_data / "mop_snareseq"
    rows = [
        {
            "dataset": "mop",
            "modality": m,
            "url": str(folder / f"{m}.h5ad"),
            "label": "cell_type",
            "batch": "batch",
        }
        for m in ("rna", "atac")
    ]
    report = make(table(tmp_path / "t.csv", *rows), tmp_path / "store", ingest__drop_labels="Mis")
    assert (report["cells_in"], report["cells_kept"]) == (10309, 9190)
    ids, counts = whole(Store(str(tmp_path / "store")))
    rna = ad.read_h5ad(folder / "rna.h5ad")
    names = [cell.removeprefix("mop:") for cell in ids]
    order = np.argsort(rna.var_names.to_numpy(dtype=str))
    assert (counts["rna"] != sp.csr_matrix(rna[names].X)[:, order]).nnz == 0


@pytest.mark.slow
def test_real_files_of_two_species_and_three_modalities_make_one_store(tmp_path, shared_data):
    files = {
        ("cortex", "rna"): "mop_snareseq/rna.h5ad",
        ("cortex", "atac"): "mop_snareseq/atac.h5ad",
        ("pbmc10k", "rna"): "pbmc_cite_10x/rna.h5ad",
        ("pbmc10k", "protein"): "pbmc_cite_10x/protein.h5ad",
        ("pbmc5k", "rna"): "pbmc_cite_10x/rna_only_pbmc5k.h5ad",
        ("pbmc3tech", "rna"): "pbmc_3tech_symphony/rna.h5ad",
        ("k562", "rna"): "perturb_gasperini_k562/rna.h5ad",
        ("starmap", "rna"): "spatial_starmap_v1/starmap_1020genes.h5ad",
        ("merfish", "rna"): "spatial_merfish_brain_cxg/merfish_1122genes_1000cells.h5ad",
    }
    rows = [{"dataset": d, "modality": m, "url": str(shared_data / url)} for (d, m), url in files.items()]
    settings = {
        "ingest__genes": str(shared_data / "gene_tables"),
        "ingest__peaks": "bins:5000",
        "qc__mads": 5,
    }
    report = make(table(tmp_path / "t.csv", *rows), tmp_path / "store", **settings)
    assert report["failed"] == []
    assert report["cells_in"] == report["cells_kept"] + sum(report["dropped"].values()) == 64_909
    species = {entry["name"]: entry["species"] for entry in report["datasets"]}
    mouse = {"cortex", "starmap", "merfish"}
    assert species == {name: ["mouse" if name in mouse else "human"] for name, _ in files}
    assert {entry["species_from"] for entry in report["datasets"]} == {"genes"}
    for entry in report["datasets"]:
        for part in entry["modalities"].values():
            assert part["counts_in"] == part["counts_kept"] + sum(part["counts_dropped"].values())
    store = Store(str(tmp_path / "store"))
    cells = store.cells.to_pandas()
    words = store.tokenizer.vocabularies
    assert list(words) == ["rna", "atac", "protein"]
    assert all(name.startswith("mouse:chr") for name in words["atac"].ids)
    merfish = cells[cells["dataset"] == "merfish"]
    assert merfish["label"].nunique() == 21
    # A gene that both species count under one id: what the mouse file calls Gad1 is the human GAD1.
    shared = words["rna"].index["GAD1"]
    assert words["rna"].ids[shared].startswith("ENSG")
    batch = store.read(np.flatnonzero(cells["dataset"].isin(mouse)))
    assert (batch.counts["rna"].ids == shared).any()
