"""Small files of cells, for tests of what reads them."""

import csv
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp


def poisson(cells, features, *, mean=0.7, seed=0):
    """Raw counts [cells, features], float32."""
    return np.random.default_rng(seed).poisson(mean, (cells, features)).astype(np.float32)


def anndata(counts, *, cells=None, features=None, obs=None, var=None):
    """An AnnData of `counts`; cells are c0, c1 … and features ENSG00000000000 … unless named."""
    cells = [f"c{i}" for i in range(counts.shape[0])] if cells is None else cells
    features = [f"ENSG{i:011d}" for i in range(counts.shape[1])] if features is None else features
    x = counts if sp.issparse(counts) else sp.csr_matrix(counts)
    return ad.AnnData(
        x, obs=pd.DataFrame(obs or {}, index=list(cells)), var=pd.DataFrame(var or {}, index=list(features))
    )


def write(data, path, *, version=3, compression=None):
    """`data` at `path`, which is returned as text; without the warnings writers have of their formats."""
    path = str(path)
    with (
        warnings.catch_warnings(action="ignore"),
        ad.settings.override(zarr_write_format=version, auto_shard_zarr_v3=False),
    ):
        if path.endswith(".zarr"):
            data.write_zarr(path)
        elif path.endswith(".h5mu"):
            data.write(path)
        else:
            data.write_h5ad(path, compression=compression)
    return path


def table(path, *rows):
    """An atlas table with a column for every key of the rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)
