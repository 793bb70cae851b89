import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellray.data import matrices
from cellray.data.reading import open_source
from tests.files import write

CELLS = [f"cell{i}" for i in range(23)]
GENES = [f"ENSG{i:011d}" for i in range(11)]


def counts(seed=0, shape=(23, 11)):
    rng = np.random.default_rng(seed)
    return rng.poisson(0.7, shape).astype(np.float32)


def cells(x=None, **parts):
    """An AnnData that is as plain as it can be."""
    x = sp.csr_matrix(counts()) if x is None else x
    obs = pd.DataFrame(
        {
            "cell_type": pd.Series((["B", "T", None] * 8)[:23], CELLS, "category"),
            "donor": [f"d{i % 4}" for i in range(len(CELLS))],
            "lane": np.arange(len(CELLS)),
        },
        index=CELLS,
    )
    var = pd.DataFrame({"symbol": [f"S{i}" for i in range(len(GENES))]}, index=GENES)
    return ad.AnnData(x, obs=obs, var=var, **parts)


def read(path, **settings):
    with open_source(path, **settings) as source:
        return source.feature_names, source.rows(0, len(source.cell_names))


def refused(path, match, **settings):
    with pytest.raises(ValueError, match=match) as error:
        read(str(path), **settings)
    assert str(path) in str(error.value)
    return str(error.value)


STORED = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "dense": np.asarray,
    "integers": lambda x: sp.csr_matrix(x.astype(np.int32)),
}


@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
@pytest.mark.parametrize("stored", STORED)
def test_any_row_range_equals_the_matrix_however_it_is_stored(tmp_path, stored, ending):
    path = write(cells(STORED[stored](counts())), tmp_path / f"a{ending}")
    with open_source(path) as source:
        assert list(source.cell_names) == CELLS
        assert list(source.feature_names) == GENES
        assert list(source.symbols) == [f"S{i}" for i in range(11)]
        assert source.by_column == (stored == "csc")
        for start, stop in [(0, 23), (0, 0), (5, 6), (7, 19), (22, 23)]:
            rows = source.rows(start, stop)
            assert rows.dtype == np.uint32
            assert rows.has_canonical_format
            np.testing.assert_array_equal(rows.toarray(), counts()[start:stop])


def test_a_large_file_by_columns_is_read_in_parts_without_being_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "KEPT", 10)
    monkeypatch.setattr(matrices, "CHUNK", 7)
    path = write(cells(sp.csc_matrix(counts())), tmp_path / "a.h5ad")
    with open_source(path) as source:
        np.testing.assert_array_equal(source.rows(3, 20).toarray(), counts()[3:20])
        assert isinstance(source._matrix, matrices.Sparse)
        assert source._matrix._kept is None


def test_a_wide_dense_file_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "CHUNK", 25)
    with open_source(write(cells(counts()), tmp_path / "a.h5ad")) as source:
        np.testing.assert_array_equal(source.rows(1, 22).toarray(), counts()[1:22])


def test_what_is_read_at_a_time_ends_where_chunks_end(tmp_path):
    path = write(cells(counts()), tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        attributes = dict(file["X"].attrs)
        del file["X"]
        file.create_dataset("X", data=counts(), chunks=(5, 11), compression="gzip").attrs.update(attributes)
    with open_source(path) as source:
        assert [source.step(rows) for rows in (1, 5, 9, 10, 100)] == [5, 5, 5, 10, 100]
        np.testing.assert_array_equal(source.rows(3, 14).toarray(), counts()[3:14])
    path = write(cells(), tmp_path / "b.h5ad", compression="gzip")
    with h5py.File(path, "a") as file:
        values = file["X/data"][:]
        del file["X/data"]
        file.create_dataset("X/data", data=values, chunks=(len(values),), compression="gzip")
    with open_source(path) as source:
        assert [source.step(rows) for rows in (1, 100)] == [24, 100]


def test_unsorted_and_repeated_indices_are_sorted_and_summed(tmp_path):
    x = sp.csr_matrix(
        (np.array([1.0, 2, 3, 0]), np.array([4, 1, 4, 2]), np.array([0, 3, 4] + [4] * 21)), (23, 11)
    )
    path = tmp_path / "a.h5ad"
    write(cells(), path)
    with h5py.File(path, "a") as file:
        for name, values in {"data": x.data, "indices": x.indices, "indptr": x.indptr}.items():
            del file["X"][name]
            file["X"][name] = values
    with open_source(str(path)) as source:
        rows = source.rows(0, 2)
    assert rows.indices.tolist() == [1, 4]
    assert rows.data.tolist() == [2, 4]


def test_zarr_of_version_2_is_read(tmp_path):
    with open_source(write(cells(), tmp_path / "a.zarr", version=2)) as source:
        np.testing.assert_array_equal(source.rows(2, 9).toarray(), counts()[2:9])
        assert source.obs(["donor"])["donor"][1] == "d1"


@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
def test_files_are_read_through_fsspec(tmp_path, ending):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(write(cells(), tmp_path / f"a{ending}"), f"/bucket/a{ending}", recursive=True)
    try:
        with open_source(f"memory://bucket/a{ending}") as source:
            np.testing.assert_array_equal(source.rows(2, 9).toarray(), counts()[2:9])
            assert source.obs(["donor"])["donor"][1] == "d1"
    finally:
        memory.rm("/bucket", recursive=True)


def test_columns_of_obs_are_text_and_missing_values_empty(tmp_path):
    with open_source(write(cells(), tmp_path / "a.h5ad")) as source:
        obs = source.obs(["cell_type", "lane"])
    assert obs["cell_type"][:4].tolist() == ["B", "T", "", "B"]
    assert obs["lane"][:3].tolist() == ["0", "1", "2"]


def test_a_missing_column_of_obs_is_refused_with_those_that_exist(tmp_path):
    with (
        open_source(write(cells(), tmp_path / "a.h5ad")) as source,
        pytest.raises(ValueError, match=r"a\.h5ad: obs has no column 'celltype'") as error,
    ):
        source.obs(["celltype"])
    assert "cell_type, donor, lane" in str(error.value)
    assert "Did you mean 'cell_type'?" in str(error.value)


def test_counts_may_lie_in_a_layer_or_in_raw(tmp_path):
    data = cells()
    data.raw = data.copy()
    data.layers["counts"] = data.X.copy()
    data = data[:, :7].copy()
    data.X = sp.csr_matrix(np.log1p(data.X.toarray()))
    path = write(data, tmp_path / "a.h5ad")
    with open_source(path, layer="counts") as source:
        np.testing.assert_array_equal(source.rows(0, 23).toarray(), counts()[:, :7])
    with open_source(path, layer="raw") as source:
        assert len(source.feature_names) == 11
        np.testing.assert_array_equal(source.rows(0, 23).toarray(), counts())
    message = refused(path, r"a\.h5ad: X has values that are not whole")
    assert "log-normalised (log1p" in message
    assert "In this file layer=raw or layer=counts holds whole numbers." in message


def test_a_missing_layer_is_refused_with_those_that_exist(tmp_path):
    data = cells(layers={"spliced": counts()})
    message = refused(write(data, tmp_path / "a.h5ad"), "no counts in layers/count", layer="count")
    assert "X, layer 'spliced'" in message
    refused(write(data, tmp_path / "a.h5ad"), "no counts in raw/X", layer="raw")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x - 1, "negative values, such as -1"),
        (lambda x: x + 0.5, "not whole, such as"),
        (lambda x: np.where(x > 1, np.nan, x), "NaN or infinite"),
        (lambda x: (x - x.mean(0)) / (x.std(0) + 1), "scaled"),
        (lambda x: x / (x.sum(1, keepdims=True) + 1) * 1e4, "normalised to a depth"),
    ],
)
@pytest.mark.parametrize("stored", ["csr", "csc", "dense"])
def test_what_is_no_count_is_refused_naming_file_and_key(tmp_path, change, match, stored):
    path = write(cells(STORED[stored](change(counts()).astype(np.float32))), tmp_path / "a.h5ad")
    message = refused(path, match)
    assert f"{path}: X" in message


def test_feature_ids_may_lie_in_a_column_and_fall_back_to_var_names(tmp_path):
    data = cells()
    data.var = pd.DataFrame({"ensembl_id": [*GENES[:-2], "", None]}, index=[f"S{i}" for i in range(11)])
    path = write(data, tmp_path / "a.h5ad")
    with open_source(path, names="ensembl_id") as source:
        assert list(source.feature_names) == [*GENES[:-2], "S9", "S10"]
        assert list(source.symbols) == [*(f"S{i}" for i in range(9)), "", ""]
    refused(path, "var has no column 'ensemblid'.*Did you mean 'ensembl_id'", names="ensemblid")


def test_row_numbers_are_not_taken_for_feature_ids(tmp_path):
    data = cells()
    data.var = pd.DataFrame({"ensembl_id": GENES}, index=[str(i) for i in range(11)])
    with open_source(write(data, tmp_path / "a.h5ad")) as source:
        assert list(source.feature_names) == GENES
    data.var = pd.DataFrame({"chromosome": GENES}, index=[str(i) for i in range(11)])
    refused(write(data, tmp_path / "b.h5ad"), "var_names are mere numbers.*chromosome")


@pytest.fixture
def muon(tmp_path):
    """A MuData whose proteins were counted in half of the cells."""
    rna, protein = cells(), ad.AnnData(counts(1, (12, 3)), obs=pd.DataFrame(index=CELLS[::2]))
    protein.var_names = ["CD3", "CD4", "CD8"]
    with mudata.set_options(pull_on_update=False):
        data = mudata.MuData({"rna": rna, "prot": protein})
        data.obs["batch"] = [f"b-{name}" for name in data.obs_names]
        yield data


@pytest.mark.parametrize("ending", [".h5mu", ".zarr"])
def test_a_modality_of_a_mudata_file_is_picked(tmp_path, muon, ending):
    path = write(muon, tmp_path / f"m{ending}")
    with open_source(path, modality="protein") as source:
        assert list(source.cell_names) == CELLS[::2]
        np.testing.assert_array_equal(source.rows(1, 5).toarray(), counts(1, (12, 3))[1:5])
        assert source.obs(["batch"])["batch"].tolist() == [f"b-{name}" for name in CELLS[::2]]
    with open_source(path, modality="rna") as source:
        assert source.obs(["donor"])["donor"][5] == "d1"
    assert "it holds prot, rna" in refused(path, "no modality 'atac'", modality="atac")
    refused(path, "several modalities, and none was named")


def test_cell_names_that_repeat_are_refused_with_examples(tmp_path):
    data = cells()
    data.obs_names = ["twin", "twin", *CELLS[2:]]
    refused(write(data, tmp_path / "a.h5ad"), "1 cell names occur more than once, such as 'twin'")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"", "is empty"),
        (b"\x1f\x8b\x08\x00abc", "gzip-compressed"),
        (b"PK\x03\x04abc", "zip archive"),
        (b"cell,gene,count\n1,2,3\n", "text file that starts with 'cell,gene"),
        (b"\x00\x01\x02\x03" * 20, "unknown format"),
    ],
)
def test_what_is_no_anndata_is_named(tmp_path, content, match):
    path = tmp_path / "a.h5ad"
    path.write_bytes(content)
    assert "is needed" in refused(path, match)


def test_a_missing_file_is_named(tmp_path):
    refused(tmp_path / "nowhere.h5ad", "does not exist")
    refused(tmp_path / "nowhere.zarr", "does not exist")


def test_a_folder_that_is_no_zarr_is_named(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    refused(tmp_path / "a.zarr", "no zarr group")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    whole = (tmp_path / "a.h5ad", tmp_path / "cut.h5ad")
    write(cells(), whole[0])
    data = whole[0].read_bytes()
    whole[1].write_bytes(data[: int(len(data) * share)])
    refused(whole[1], "cut short or damaged")


def test_other_hdf5_files_are_refused_with_what_is_in_them(tmp_path):
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["weather"] = [1, 2]
    assert "weather" in refused(tmp_path / "plain.h5", "is no AnnData")
    with h5py.File(tmp_path / "tenx.h5", "w") as file:
        file["matrix/barcodes"] = [b"A"]
    assert "10x Genomics" in refused(tmp_path / "tenx.h5", "is no AnnData")
    with h5py.File(tmp_path / "cells.loom", "w") as file:
        file["matrix"], file["row_attrs/Gene"], file["col_attrs/CellID"] = [[1]], [b"A"], [b"B"]
    assert "loom" in refused(tmp_path / "cells.loom", "is no AnnData")


def lie(file, name, change):
    values = file["X"][name][:]
    change(values)
    file["X"][name][:] = values


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("indptr", lambda v: v.__setitem__(5, 10_000), "indptr leaves 0 … 147"),
        ("indptr", lambda v: v.__setitem__(0, 3), "indptr does not start at 0"),
        ("indptr", lambda v: v.__setitem__(5, 0), "indptr does not start at 0 or falls"),
        ("indptr", lambda v: v.__setitem__(-1, v[-1] + 5), "indptr leaves 0 … 147"),
        ("indptr", lambda v: v.__setitem__(-1, v[-1] - 1), "indptr ends at 146"),
        ("indices", lambda v: v.__setitem__(3, 11), "an index lies outside 0 … 10"),
        ("indices", lambda v: v.__setitem__(3, -1), "an index lies outside 0 … 10"),
    ],
)
def test_sparse_arrays_that_contradict_themselves_are_refused(tmp_path, name, change, match):
    path = tmp_path / "a.h5ad"
    write(cells(), path)
    with h5py.File(path, "a") as file:
        lie(file, name, change)
    refused(path, match)


def test_a_shape_that_contradicts_the_names_is_refused(tmp_path):
    path = tmp_path / "a.h5ad"
    write(cells(counts()), path)
    with h5py.File(path, "a") as file:
        attributes = dict(file["X"].attrs)
        del file["X"]
        file["X"] = counts()[:-1]
        file["X"].attrs.update(attributes)
    refused(path, r"has the shape \(22, 11\), but there are 23 cell names")


def test_links_out_of_the_file_are_not_followed(tmp_path):
    write(cells(), tmp_path / "secret.h5ad")
    for name in ("X", "obs/donor"):
        path = tmp_path / "a.h5ad"
        write(cells(), path)
        with h5py.File(path, "a") as file:
            del file[name]
            file[name] = h5py.ExternalLink(str(tmp_path / "secret.h5ad"), f"/{name}")
        with pytest.raises(ValueError, match="not followed"), open_source(str(path)) as source:
            source.obs(["donor"])


def test_values_in_another_file_are_not_read(tmp_path):
    (tmp_path / "secret").write_bytes(b"\1" * 23 * 11 * 4)
    path = tmp_path / "a.h5ad"
    write(cells(counts()), path)
    with h5py.File(path, "a") as file:
        attributes = dict(file["X"].attrs)
        del file["X"]
        outside = [(str(tmp_path / "secret"), 0, 23 * 11 * 4)]
        file.create_dataset("X", (23, 11), "i4", external=outside).attrs.update(attributes)
    refused(path, "takes its values from another file")


def test_a_damaged_chunk_is_refused(tmp_path):
    path = tmp_path / "a.h5ad"
    write(cells(), path, compression="gzip")
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * 16)
    refused(path, "cannot be unpacked.*fetch it again")
