import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data import soma_arrays, storage
from cellray.data.formats import opened
from cellray.data.isolation import isolated
from cellray.data.plan import survey
from cellray.data.reading import modality_keys, open_source
from cellray.data.soma import CONFIG, access
from cellray.train.recipe import Recipe
from tests import proxy, soma
from tests.files import anndata, poisson, table, write
from tests.test_formats import CELLS, COLUMNS

RANGES = ((0, 6), (2, 2), (1, 5), (5, 6))
SCHEMA = {"assay_ontology_term_id": ["EFO:1"] * 6, "cell_type_ontology_term_id": ["CL:1"] * 6}


def counts_in(url, **settings):
    with open_source(url, **settings) as source:
        return source.rows(0, source.shape[0]).toarray()


def refused(url, match, **settings):
    with pytest.raises(ValueError, match=match), open_source(str(url), **settings) as source:
        _ = source.cell_names, source.feature_names, source.rows(0, source.shape[0])


def cells(**more):
    """Six cells of four genes, with obs columns of every kind."""
    data = anndata(poisson(6, 4), cells=CELLS, obs=COLUMNS, var={"gene_name": ["A", "B", "", "D"]})
    for name, values in more.items():
        setattr(data, name, values)
    return data


@pytest.mark.parametrize("form", ["csr", "csc", "dense", "stored dense", "whole numbers"])
def test_an_experiment_reads_as_the_h5ad_of_the_same_cells_does(tmp_path, form):
    library = soma.library()
    data, more = cells(), {}
    if form == "csc":
        data.X = sp.csc_matrix(data.X)
    elif form in ("dense", "stored dense"):
        data.X = data.X.toarray()
        more = {"X_kind": library.DenseNDArray} if form == "stored dense" else {}
    elif form == "whole numbers":
        data.X = data.X.astype(np.int32)
    flat = write(data, tmp_path / "a.h5ad")
    with open_source(soma.write(data, tmp_path / "a", **more)) as found, open_source(flat) as wanted:
        assert found.shape == wanted.shape
        assert found.cell_names.tolist() == wanted.cell_names.tolist()
        assert found.feature_names.tolist() == wanted.feature_names.tolist()
        assert found.symbols.tolist() == wanted.symbols.tolist() == ["A", "B", "", "D"]
        assert found.obs_columns == wanted.obs_columns
        for name in COLUMNS:
            assert found.obs([name])[name].tolist() == wanted.obs([name])[name].tolist(), name
        assert found.stored == (
            24 if form == "stored dense" else data.X.size if sp.issparse(data.X) else found.stored
        )
        assert not found.by_column
        for start, stop in RANGES:
            rows, same = found.rows(start, stop), wanted.rows(start, stop)
            assert rows.dtype == same.dtype == np.uint32
            assert rows.has_canonical_format
            assert (rows != same).nnz == 0
            np.testing.assert_array_equal(rows.indices, same.indices)


@given(data=st.data())
@settings(max_examples=12, derandomize=True, deadline=None)
def test_joinids_with_gaps_in_any_number_of_fragments_give_the_rows_of_the_matrix(data):
    ids = st.lists(st.integers(0, 40) | st.integers(0, 5_000), min_size=1, max_size=12, unique=True).map(
        sorted
    )
    rows, columns = data.draw(ids), data.draw(ids)
    matrix = poisson(len(rows), len(columns), seed=len(rows))
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    with tempfile.TemporaryDirectory() as folder:
        batches = data.draw(st.integers(1, 3))
        url = soma.census(f"{folder}/a", rows, columns, batches=batches, raw=matrix)
        with open_source(url) as source:
            assert source.cell_names.tolist() == [str(i) for i in rows]
            assert source.feature_names.tolist() == [f"ENSG{i:011d}" for i in columns]
            np.testing.assert_array_equal(source.rows(start, stop).toarray(), matrix[start:stop])
            assert source.stored == np.count_nonzero(matrix)


def test_buffers_smaller_than_a_range_give_the_same_rows(tmp_path, monkeypatch):
    matrix = poisson(300, 40)
    url = soma.census(tmp_path / "a", range(0, 600, 2), range(40), raw=matrix)
    monkeypatch.setitem(CONFIG, "soma.init_buffer_bytes", 1 << 10)
    np.testing.assert_array_equal(counts_in(url), matrix)


def test_cells_of_a_table_indexed_by_another_column_come_by_their_joinids(tmp_path):
    matrix, kinds = poisson(3, 4), ["z", "a", "m"]
    obs, index = {"kind": pa.array(kinds, pa.large_string())}, {"kind": None}
    url = soma.census(tmp_path / "a", [1, 4, 7], range(4), obs=obs, index=index, raw=matrix)
    with open_source(url) as source:
        assert source.cell_names.tolist() == ["1", "4", "7"]
        assert source.obs(["kind"])["kind"].tolist() == kinds
        np.testing.assert_array_equal(source.rows(0, 3).toarray(), matrix)
    url = soma.census(tmp_path / "b", [1, 4, 4], range(4), obs=obs, index=index, raw=matrix * [[1], [1], [0]])
    refused(url, "cell names occur more than once, such as '4'")
    with (
        open_source(url) as source,
        pytest.raises(ValueError, match="obs has the same soma_joinid more than once"),
    ):
        source.rows(0, 1)


def test_a_dense_layer_with_gaps_and_a_sparse_one_with_repeats_read_as_their_sums(tmp_path):
    matrix, rows, columns = poisson(5, 3), [0, 1, 4, 7, 8], [1, 2, 5]
    url = soma.census(tmp_path / "a", rows, columns, raw=matrix)
    dense = np.full((9, 6), 99, np.int32)
    dense[np.ix_(rows, columns)] = matrix
    repeats = {"tiledb": {"create": {"allows_duplicates": True}}}
    with soma.library().open(url, "w") as root:
        held = root.ms["RNA"].X
        array = held.add_new_dense_ndarray("whole", type=pa.int32(), shape=(9, 6))
        array.write((slice(0, 8), slice(0, 5)), pa.Tensor.from_numpy(dense))
        held.add_new_sparse_ndarray("twice", type=pa.float32(), shape=(9, 6), platform_config=repeats)
    for _ in range(2):
        with soma.library().open(f"{url}/ms/RNA/X/twice", "w") as array:
            array.write(soma.entries(np.minimum(matrix, 1) * (np.arange(3) < 1), rows, columns))
    for start, stop in ((0, 5), (1, 4), (2, 2)):
        with open_source(url, layer="whole") as source:
            np.testing.assert_array_equal(source.rows(start, stop).toarray(), matrix[start:stop])
        with open_source(url, layer="twice") as source:
            twice = 2 * np.minimum(matrix, 1) * (np.arange(3) < 1)
            np.testing.assert_array_equal(source.rows(start, stop).toarray(), twice[start:stop])


def test_tables_larger_than_there_is_memory_for_are_refused(tmp_path, monkeypatch):
    url = soma.write(cells(), tmp_path / "a")
    monkeypatch.setattr(soma_arrays, "WHOLE", 6 * 8 + 1)
    refused(url, "obs holds more than its 6 rows can take")
    monkeypatch.setattr(soma_arrays, "WHOLE", 6 * 8 - 1)
    refused(url, "obs declares 6 rows, more than there can be")


def test_cells_may_be_more_than_the_counts_have_rows_and_have_none_then(tmp_path):
    url = soma.census(tmp_path / "a", range(3), range(4), raw=poisson(3, 4) + 1)
    with soma.library().open(f"{url}/obs", "w") as obs:
        obs.tiledbsoma_resize_soma_joinid_shape(90)
        obs.write(pa.table({"soma_joinid": pa.array([70, 80], pa.int64())}))
    with open_source(url) as source:
        assert source.rows(0, 5).toarray().any(axis=1).tolist() == [True] * 3 + [False] * 2
        assert source.rows(3, 5).nnz == 0


def test_where_counts_are_is_told_by_the_layer(tmp_path):
    raw = cells()
    data = cells(X=sp.csr_matrix(np.log1p(raw.X.toarray())), raw=raw[:, :3].copy())
    data.layers["more"] = raw.X * 2
    url = soma.write(data, tmp_path / "a")
    np.testing.assert_array_equal(counts_in(url, layer="raw"), raw.X[:, :3].toarray())
    np.testing.assert_array_equal(counts_in(url, layer="more"), raw.X.toarray() * 2)
    refused(url, r"ms/RNA/X/data has values .* log.*In this file layer=more or layer=raw holds whole numbers")
    refused(url, r"no counts in X/odd of RNA. It has layer= \(X/data\), layer=data, layer=more", layer="odd")
    with open_source(url, layer="raw") as source:
        assert source.has_raw
        assert source.shape == (6, 3)
        assert source.where == f"{url}: ms/raw/X/data"
    with opened(url) as root:
        assert modality_keys(root) == ["RNA"]


def test_a_census_has_its_counts_in_x_raw(tmp_path):
    matrix, every = poisson(6, 4), range(6)
    url = soma.census(tmp_path / "a", every, range(4), obs=SCHEMA, normalized=matrix / 7, raw=matrix)
    np.testing.assert_array_equal(counts_in(url), matrix)
    refused(url, "normalized has values that are not whole.*layer=raw holds", layer="normalized")
    with open_source(url) as source:
        assert source.cellxgene
        assert source.has_raw
        assert source.symbols.tolist() == ["G0", "G1", "G2", "G3"]
    with open_source(url, names="feature_name") as source:
        assert source.feature_names.tolist() == ["G0", "G1", "G2", "G3"]
    refused(url, "var has no column 'feature_names'; .* Did you mean 'feature_name'", names="feature_names")
    with open_source(url) as source, pytest.raises(ValueError, match="obs has no column 'tissue'"):
        source.obs(["tissue"])


def test_measurements_are_modalities_under_their_usual_names(tmp_path):
    url = soma.write(cells(raw=cells()), tmp_path / "a", "RNA")
    library = soma.library()
    proteins = poisson(6, 2, seed=4)
    with library.open(url, "w") as root:
        measured = root.ms.add_new_collection("ADT", library.Measurement)
        joinids = {"soma_joinid": np.arange(2)}
        soma.table(measured, "var", joinids | {"var_id": ["CD3", "CD4"], "genome": ["GRCh38", ""]})
        held = measured.add_new_collection("X").add_new_sparse_ndarray(
            "data", type=pa.float32(), shape=(6, 2)
        )
        held.write(soma.entries(proteins, range(6), range(2)))
    for name in ("protein", "ADT", "prot"):
        np.testing.assert_array_equal(counts_in(url, modality=name), proteins)
    for name in ("rna", "RNA", "gex"):
        np.testing.assert_array_equal(counts_in(url, modality=name, layer="raw"), cells().X.toarray())
    with open_source(url, modality="protein") as source:
        assert source.genomes == ("GRCh38",)
        assert not source.has_raw
    refused(url, "several modalities, and none was named: it holds ADT, RNA")
    refused(url, "no modality 'atac': it holds ADT, RNA", modality="atac")
    refused(url, "no counts in X/raw of ADT", modality="protein", layer="raw")
    other = soma.write(cells(), tmp_path / "b", "cells")
    np.testing.assert_array_equal(counts_in(other, modality="rna"), cells().X.toarray())
    with opened(other) as root:
        assert modality_keys(root) == []


def test_members_that_lie_elsewhere_are_not_followed(tmp_path):
    library = soma.library()
    url, other = soma.write(cells(), tmp_path / "a"), soma.write(cells(), tmp_path / "a2")
    with library.open(url, "w") as root, library.open(other) as theirs:
        root.ms["RNA"].X.set("far", theirs.ms["RNA"].X["data"], use_relative_uri=False)
    refused(url, "far lies outside the experiment, at .*a2/ms/RNA/X/data, which is not followed")
    url = soma.write(cells(), tmp_path / "b")
    shutil.move(f"{url}/obs", tmp_path / "obs")
    Path(url, "obs").symlink_to(tmp_path / "obs")
    refused(url, "obs is a link out of the folder, which is not followed")


def test_an_experiment_that_was_moved_reads_where_it_is_now(tmp_path):
    soma.write(cells(), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    for name in ("b", "link"):
        np.testing.assert_array_equal(counts_in(str(tmp_path / name)), cells().X.toarray())


def test_what_is_no_experiment_is_told(tmp_path):
    library = soma.library()
    url = soma.write(cells(), tmp_path / "all" / "a")
    with library.Collection.create(str(tmp_path / "more")) as root, library.open(url) as found:
        root.set("human", found, use_relative_uri=False)
    refused(tmp_path / "more", "is a SOMACollection, not a SOMAExperiment. It holds human: add the name")
    refused(f"{url}/ms/RNA", "is a SOMAMeasurement, not a SOMAExperiment")
    with library.Experiment.create(str(tmp_path / "empty")) as root:
        root.add_new_collection("ms")
    refused(tmp_path / "empty", "without any measurement")
    (tmp_path / "hollow" / "__group").mkdir(parents=True)
    refused(tmp_path / "hollow", "hollow cannot be read")


def test_counts_of_what_is_not_in_the_tables_are_refused(tmp_path):
    url = soma.census(tmp_path / "a", range(3), [0, 2], raw=np.eye(3, 2))
    with soma.library().open(f"{url}/ms/RNA/X/raw", "w") as array:
        array.write(
            pa.table({"soma_dim_0": [1], "soma_dim_1": [1], "soma_data": pa.array([1.0], pa.float32())})
        )
    refused(url, "counts of a soma_joinid that ms/RNA/var has not")
    shutil.rmtree(f"{url}/ms/RNA/var")
    refused(url, "a cannot be read|a: there is no")


def test_files_that_are_cut_short_or_gone_are_told_with_the_experiment(tmp_path):
    url = soma.write(cells(), tmp_path / "a")
    paths = sorted(path for path in Path(url).rglob("*") if path.is_file() and "X/data" in str(path))
    told = []
    for path in paths:
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b""):
            path.write_bytes(damaged)
            try:
                assert counts_in(url).shape == (6, 4)
            except ValueError as error:
                told.append(str(error))
        path.write_bytes(whole)
    assert len(told) >= 8
    assert all(url in message for message in told)


def test_without_the_extra_the_way_to_it_is_told(tmp_path, monkeypatch):
    (tmp_path / "a" / "__group").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    refused(tmp_path / "a", r"takes an extra to read: pip install 'cellray\[soma\]'.*get_anndata")


def read_whole(url):
    return counts_in(url).tolist()


def test_a_process_with_little_memory_reads_an_experiment(tmp_path):
    url = soma.write(cells(), tmp_path / "a")
    assert isolated(read_whole, url, memory=2 << 30) == cells().X.toarray().tolist()


def test_a_survey_finds_what_it_finds_in_the_h5ad(tmp_path):
    data = anndata(poisson(6, 4), cells=CELLS, obs={"type": list("aabbcc"), **SCHEMA})
    write(data, tmp_path / "a.h5ad")
    soma.write(data, tmp_path / "a")
    found = []
    for name in ("a.h5ad", "a"):
        row = {"dataset": "d", "url": name, "label": "type"}
        (group,) = survey(Recipe(atlas=table(tmp_path / "atlas.csv", row))).groups
        (part,) = group.parts
        found.append((list(group.cells), [str(v) for v in group.about["label"]], part.file.modality))
        assert part.features.names.tolist() == [f"ENSG{i:011d}" for i in range(4)]
    assert found[0] == found[1]


SERVER = """
import sys
from tests import proxy
with proxy.object_store() as port:
    print(port, flush=True)
    sys.stdin.read()
"""


@contextmanager
def bucket():
    """An object store in another process: TileDB keeps Python from running while it waits."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin
        assert server.stdout
        with proxy.pointed(int(server.stdout.readline())):
            storage.locate("s3://cells")[0].mkdir("cells")
            yield "s3://cells"
        server.stdin.close()


def test_experiments_in_a_bucket_are_read(tmp_path):
    local = soma.write(cells(), tmp_path / "a")
    with bucket() as folder:
        url = f"{folder}/deep/a"
        fs, path = storage.locate(url)
        fs.put(local, path, recursive=True)
        with open_source(url) as found, open_source(local) as wanted:
            assert found.cell_names.tolist() == wanted.cell_names.tolist()
            (kinds,), (same,) = (source.obs(["category"]).values() for source in (found, wanted))
            assert kinds.tolist() == same.tolist()
            np.testing.assert_array_equal(found.rows(1, 5).toarray(), wanted.rows(1, 5).toarray())


def test_buckets_are_found_as_fsspec_finds_them(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    assert access("s3://cells/a") == access("cells/a") == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000/")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    config = {"anon": True, "key": "k", "endpoint_url": "https://minio.local"}
    assert access("s3://cells/a")["vfs.s3.scheme"] == "http"
    assert access("s3://cells/a")["vfs.s3.endpoint_override"] == "127.0.0.1:9000"
    monkeypatch.setitem(fsspec.config.conf, "s3", config)
    assert access("s3://cells/a") == {
        "vfs.s3.region": "us-west-2",
        "vfs.s3.endpoint_override": "minio.local",
        "vfs.s3.scheme": "https",
        "vfs.s3.use_virtual_addressing": "false",
        "vfs.s3.no_sign_request": "true",
        "vfs.s3.aws_access_key_id": "k",
    }


def test_experiments_elsewhere_are_refused(tmp_path):
    soma.library()
    memory, path = storage.locate("memory://soma")
    memory.mkdirs(f"{path}/__group")
    memory.pipe_file(f"{path}/__group/a", b"a")
    try:
        refused("memory://soma", "read from local folders, s3:// and gs:// only")
    finally:
        memory.rm(path, recursive=True)
