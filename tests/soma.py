"""TileDB-SOMA experiments, for tests of what reads them. Each test that makes one needs the extra soma."""

import warnings

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp


def library():
    """tiledbsoma; without it the test is skipped."""
    return pytest.importorskip("tiledbsoma", reason="needs the extra: pip install 'cellray[soma]'")


def write(data, path, measurement="RNA", **more):
    """The AnnData `data` as an experiment at `path`, which is returned as text."""
    library()
    from tiledbsoma.io import from_anndata

    with warnings.catch_warnings(action="ignore"):
        from_anndata(str(path), data, measurement_name=measurement, **more)
    return str(path)


def table(parent, key, columns, *, indexed=("soma_joinid",), domain=None):
    """A table in a collection: `columns` by name, soma_joinid among them."""
    values = pa.table(columns)
    domain = domain or [(0, int(max(columns["soma_joinid"])))]
    frame = parent.add_new_dataframe(
        key, schema=values.schema, index_column_names=list(indexed), domain=domain
    )
    frame.write(values)


def entries(matrix, cells, features, kind=np.float32):
    """The numbers of `matrix` [cells, features] as a sparse array holds them, under joinids, shuffled."""
    found = sp.coo_matrix(matrix)
    order = np.random.default_rng(0).permutation(found.nnz)
    return pa.table(
        {
            "soma_dim_0": np.asarray(cells, np.int64)[found.row[order]],
            "soma_dim_1": np.asarray(features, np.int64)[found.col[order]],
            "soma_data": found.data[order].astype(kind),
        }
    )


def census(path, cells, features, *, obs=None, index=None, batches=1, kind=np.float32, **layers):
    """An experiment with joinids `cells` and `features`, which have no obs_id and no var_id.

    `layers` are those of X; they are written in `batches`, each a fragment. `obs` are more columns, `index`
    those that obs is indexed by, with their domain.
    """
    soma = library()
    joinids = {"soma_joinid": np.asarray(cells, np.int64)}
    var = {
        "soma_joinid": np.asarray(features, np.int64),
        "feature_id": np.array([f"ENSG{i:011d}" for i in features]),
        "feature_name": np.array([f"G{i}" for i in features]),
    }
    index = index or {"soma_joinid": (0, max(cells, default=0))}
    with soma.Experiment.create(str(path)) as root:
        table(root, "obs", joinids | (obs or {}), indexed=tuple(index), domain=list(index.values()))
        measured = root.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
        table(measured, "var", var)
        held = measured.add_new_collection("X")
        shape = (int(max(cells, default=0)) + 1, int(max(features)) + 1)
        for name in layers:
            held.add_new_sparse_ndarray(name, type=pa.from_numpy_dtype(kind), shape=shape)
    for name, matrix in layers.items():
        every = entries(matrix, cells, features, kind)
        for part in np.array_split(np.arange(len(every)), batches):
            with soma.open(f"{path}/ms/RNA/X/{name}", "w") as array:
                array.write(every.take(pa.array(part)))
    return str(path)
