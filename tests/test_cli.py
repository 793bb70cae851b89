import json
import subprocess
import sys
from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from cellray import bundle
from cellray.cli import main
from cellray.data import store
from cellray.data.tokens import Counts
from cellray.embedder import tokens_from
from tests import files, stores, tiny

CELLS = 150


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("model") / "bundle")
    bundle.write(url, tiny.embedder(), golden=tiny.tokens(5))
    return url


def atlas(matrix=None, **parts):
    matrix = tiny.counts(CELLS) if matrix is None else matrix
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(CELLS)])
    var = pd.DataFrame({"gene_symbol": tiny.SYMBOLS}, index=list(tiny.GENES))
    return ad.AnnData(matrix, obs=obs, var=var, **parts)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cells.h5ad"
    atlas().write_h5ad(path)
    return str(path)


def wanted(model):
    loaded = bundle.load(model)
    cells = tokens_from(loaded.tokenizer, tiny.counts(CELLS), tiny.GENES)[0]
    return loaded.embed(cells), loaded.annotate(cells)


def test_embed_writes_the_embedders_bits_in_every_format(tmp_path, file, model, capsys):
    vectors, ood = wanted(model)[0].vectors, wanted(model)[0].ood
    for suffix, chunk in (("h5ad", "64"), ("npz", "7"), ("parquet", "1000"), ("arrow", "150")):
        out = tmp_path / f"out.{suffix}"
        assert main(["embed", file, "--bundle", model, "--output", str(out), "--chunk", chunk]) == 0
    said = capsys.readouterr().err
    assert "150 cells, 120 of 120 genes known, 100% of the counts kept" in said
    names = [f"cell{i}" for i in range(CELLS)]
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    assert written.obs_names.tolist() == names
    assert np.array_equal(written.obsm["X_cellray"], vectors)
    assert np.array_equal(written.obs["cellray_ood"], ood)
    assert (written.obs["cellray_kept"] == 1).all()
    assert written.uns["cellray"]["model"] == bundle.load(model).hash
    with np.load(tmp_path / "out.npz") as arrays:
        assert np.array_equal(arrays["embedding"], vectors)
        assert arrays["cell_id"].tolist() == names
    tables = [
        pq.read_table(tmp_path / "out.parquet"),
        pa.ipc.open_file(str(tmp_path / "out.arrow")).read_all(),
    ]
    for table in tables:
        assert np.array_equal(np.stack(table["embedding"].to_pylist()).astype(np.float32), vectors)
        assert json.loads(table.schema.metadata[b"cellray"])["genes_known"] == 120


def test_annotate_writes_labels_and_how_sure_they_are(tmp_path, file, model):
    said = wanted(model)[1]
    for suffix in ("h5ad", "csv"):
        out = str(tmp_path / f"out.{suffix}")
        assert main(["annotate", file, "--bundle", model, "--output", out, "--quiet"]) == 0
    obs = ad.read_h5ad(tmp_path / "out.h5ad").obs
    assert obs["cellray_label"].tolist() == said.labels.tolist()
    assert np.array_equal(obs["cellray_confidence"], said.confidence)
    frame = pd.read_csv(tmp_path / "out.csv")
    assert frame["label"].tolist() == said.labels.tolist()


def test_layers_raw_counts_and_columns_of_names_are_found(tmp_path, model):
    counts = tiny.counts(CELLS)
    normal = counts.copy()
    normal.data = np.log1p(normal.data)
    adata = atlas(normal, layers={"counts": counts})
    adata.raw = ad.AnnData(counts, var=adata.var)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    vectors = wanted(model)[0].vectors
    for extra in (["--layer", "counts"], ["--layer", "raw"], ["--layer", "raw", "--names", "gene_symbol"]):
        out = str(tmp_path / "out.npz")
        assert main(["embed", str(tmp_path / "cells.h5ad"), "--bundle", model, "--output", out, *extra]) == 0
        with np.load(out) as arrays:
            assert np.array_equal(arrays["embedding"], vectors)


def test_a_files_second_names_are_used_where_the_model_knows_those(tmp_path, model):
    adata = atlas()
    adata.var = pd.DataFrame({"gene_symbol": tiny.SYMBOLS}, index=[f"probe{i}" for i in range(120)])
    path = files.write(adata, tmp_path / "cells.zarr")
    out = str(tmp_path / "out.npz")
    assert main(["embed", path, "--bundle", model, "--output", out]) == 0
    with np.load(out) as arrays:
        assert np.array_equal(arrays["embedding"], wanted(model)[0].vectors)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"file": "nowhere.h5ad"}, "nowhere.h5ad does not exist"),
        ({"bundle": "nowhere"}, "no bundle at nowhere"),
        ({"output": "out.txt"}, "must end in one of .h5ad, .parquet, .arrow, .npz"),
        ({"names": "gene"}, "var has no column 'gene'"),
        ({"layer": "raw"}, "no counts in raw"),
    ],
)
def test_a_users_mistake_is_one_line_exit_2_and_leaves_nothing(tmp_path, file, model, capsys, change, says):
    asked = {"file": file, "bundle": model, "output": str(tmp_path / "out.h5ad")} | change
    arguments = [asked.pop("file"), *(part for k, v in asked.items() for part in (f"--{k}", v))]
    assert main(["embed", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ")
    assert says in said[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["cells.h5ad"]


def test_log_normalised_and_foreign_cells_are_refused(tmp_path, model, capsys):
    normal = tiny.counts(CELLS)
    normal.data = np.log1p(normal.data)
    atlas(normal).write_h5ad(tmp_path / "log.h5ad")
    foreign = atlas()
    foreign.var = pd.DataFrame(index=[f"ENSMUSG{i:011d}" for i in range(120)])
    foreign.write_h5ad(tmp_path / "mouse.h5ad")
    for name, says in (("log", "log.h5ad: X has values that are not whole"), ("mouse", "0 of 120 genes")):
        out = str(tmp_path / "out.npz")
        assert main(["embed", str(tmp_path / f"{name}.h5ad"), "--bundle", model, "--output", out]) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out.npz").exists()


def test_a_multi_omic_file_gives_its_rna(tmp_path, model):
    import mudata

    other = ad.AnnData(sp.csr_matrix(np.ones((CELLS, 3), np.float32)))
    other.obs_names = [f"cell{i}" for i in range(CELLS)]
    with mudata.set_options(pull_on_update=False):
        mudata.MuData({"rna": atlas(), "atac": other}).write_h5mu(tmp_path / "cells.h5mu")
    out = str(tmp_path / "out.npz")
    assert main(["embed", str(tmp_path / "cells.h5mu"), "--bundle", model, "--output", out]) == 0
    with np.load(out) as arrays:
        assert np.array_equal(arrays["embedding"], wanted(model)[0].vectors)


def write_store(folder):
    words = tiny.tokenizer()
    rna = tiny.tokens(20)
    nothing = np.empty(0, np.uint32)
    none = Counts(np.zeros(21, np.int64), nothing.astype(np.uint8), nothing, np.zeros(20, np.int64))
    about: dict[str, Sequence[str]] = {name: ["x"] * 20 for name in store.ABOUT}
    cells = [f"x:{i}" for i in range(20)]
    table = store.cell_table(words, cells, about, np.ones(20), {"rna": rna, "atac": none})
    stores.write_table(str(folder), table, words, 20)


def test_inspect_and_validate_know_bundles_stores_and_files(tmp_path, file, model, capsys):
    write_store(tmp_path / "store")
    shown = {}
    for path in (model, str(tmp_path / "store"), file):
        assert main(["validate", path]) == 0
        assert main(["inspect", path]) == 0
        shown[path] = capsys.readouterr().out
    assert "ok: bundle" in shown[model]
    assert "labels       glia, neuron" in shown[model]
    assert "score annotation student 0.91234 ties" in shown[model]
    assert "120 features, 20 cells" in shown[str(tmp_path / "store")]
    assert "ok: file" in shown[file]
    assert "X holds raw counts" in shown[file]


def test_inspect_says_what_counts_look_like_and_where_they_are(tmp_path, capsys):
    normal = tiny.counts(CELLS)
    normal.data = np.log1p(normal.data)
    atlas(normal, layers={"counts": tiny.counts(CELLS)}).write_h5ad(tmp_path / "log.h5ad")
    assert main(["inspect", str(tmp_path / "log.h5ad")]) == 0
    said = capsys.readouterr().out
    assert "it looks log-normalised" in said
    assert "layer=counts holds whole numbers" in said


def test_validate_fails_with_the_reason(tmp_path, model, capsys):
    normal = tiny.counts(CELLS)
    normal.data = np.log1p(normal.data)
    atlas(normal).write_h5ad(tmp_path / "log.h5ad")
    write_store(tmp_path / "store")
    (shard,) = (tmp_path / "store/shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    bundle.write(str(tmp_path / "b"), tiny.embedder(), golden=tiny.tokens(2))
    (tmp_path / "b/card.md").write_text("other")
    for name, says in (
        ("log.h5ad", "log-normalised"),
        ("store", "arrow has sha256"),
        ("b", "card.md has sha256"),
    ):
        assert main(["validate", str(tmp_path / name)]) == 1
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert says in said[0]
    (tmp_path / "folder").mkdir()
    assert main(["validate", str(tmp_path / "folder")]) == 2
    assert "was not written to the end" in capsys.readouterr().err


def test_help_is_everywhere_and_imports_nothing_heavy(capsys):
    for arguments in ([], ["embed"], ["annotate"], ["inspect"], ["validate"]):
        with pytest.raises(SystemExit) as left:
            main([*arguments, "--help"])
        assert left.value.code == 0
    code = "import sys; from cellray.cli import main; import contextlib\n"
    code += "with contextlib.suppress(SystemExit): main(['embed', '--help'])\n"
    code += "assert not {'torch', 'numpy', 'ray', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_verb_works_where_neither_ray_nor_an_extra_is_installed(file, model, tmp_path):
    code = """
import sys
for name in ("ray", "starlette", "s3fs", "gcsfs", "boto3", "matplotlib", "umap", "scanpy", "hypothesis"):
    sys.modules[name] = None  # the import of it fails as if it were not there
import cellray.client
from cellray.cli import main
file, model, out = sys.argv[1:]
for verb, suffix in (("embed", "h5ad"), ("embed", "parquet"), ("annotate", "csv")):
    assert main([verb, file, "--bundle", model, "--output", f"{out}/{verb}.{suffix}"]) == 0
for verb in ("inspect", "validate"):
    assert main([verb, model]) == main([verb, file]) == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", code, file, model, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    written = ad.read_h5ad(tmp_path / "embed.h5ad").obsm["X_cellray"]
    assert np.array_equal(written, wanted(model)[0].vectors)
