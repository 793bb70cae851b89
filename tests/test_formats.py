import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from cellray.data.formats import opened
from cellray.data.guard import item
from cellray.data.reading import open_source
from tests.files import poisson, write

CELLS = [f"c{i}" for i in range(6)]
COLUMNS = {
    "text": ["a", "b", "", "ä→", "e", "f"],
    "category": pd.Categorical(["T", None, "B", "T", "B", "B"]),
    "numbered": pd.Categorical([3, 1, 3, None, 1, 1]),
    "fraction": [0.5, np.nan, 1.0, -2.25, 1e300, 0.1],
    "single": np.array([0.1, 2, 3, 4, 5, np.nan], np.float32),
    "whole": np.arange(6),
    "small": np.arange(6, dtype=np.uint8),
    "truth": [True, False, True, True, False, False],
    "maybe": pd.array([1, None, 3, 4, 5, 6], dtype="Int64"),
    "perhaps": pd.array([True, None, True, False, False, True], dtype="boolean"),
}


def text(values):
    """What a reader of tables makes of a column."""
    series = pd.Series(values)
    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.cat.rename_categories(list(series.cat.categories.astype(str))).astype(object)
    return np.where(series.isna(), "", series.astype(str)).tolist()


@pytest.mark.parametrize("version", ["h5ad", 2, 3])
def test_columns_of_every_kind_are_the_text_that_pandas_gives(tmp_path, version):
    obs = pd.DataFrame(COLUMNS, index=CELLS)
    ending = "h5ad" if version == "h5ad" else "zarr"
    data = ad.AnnData(poisson(6, 3), obs=obs)
    path = write(data, tmp_path / f"a.{ending}", version=3 if ending == "h5ad" else version)
    with open_source(path) as source:
        assert source.obs_columns == tuple(COLUMNS)
        found = source.obs(list(COLUMNS))
    for name, values in COLUMNS.items():
        assert found[name].tolist() == text(values), name
        assert all(isinstance(value, str) for value in found[name]), name


def test_columns_of_old_files_refer_to_their_categories(tmp_path):
    path = write(ad.AnnData(poisson(6, 3), obs=pd.DataFrame(index=CELLS)), tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        obs = file["obs"]
        obs["__categories/label"] = np.array(["B", "T"], object)
        obs["label"] = np.array([1, 0, -1, 1, 0, 0], np.int8)
        obs["label"].attrs["categories"] = obs["__categories/label"].ref
        obs.attrs.update({"column-order": ["label"], "encoding-version": "0.1.0"})
    with open_source(path) as source:
        assert source.obs(["label"])["label"].tolist() == ["T", "B", "", "T", "B", "B"]
    with warnings.catch_warnings(action="ignore"):
        assert text(ad.read_h5ad(path).obs["label"]) == ["T", "B", "", "T", "B", "B"]


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("codes", np.array([0, 1, 2, 0, 0, 0], np.int8), "codes that are not among its 2 categories"),
        ("codes", np.array([0, 1, -2, 0, 0, 0], np.int8), "codes that are not among its 2 categories"),
        ("codes", np.zeros(6), "codes that are not among its 2 categories"),
        ("codes", np.zeros(5, np.int8), "has 5 values, not 6"),
        ("codes", np.zeros((6, 1), np.int8), "is no list"),
    ],
)
def test_codes_that_contradict_their_categories_are_refused(tmp_path, name, values, match):
    obs = pd.DataFrame({"label": pd.Categorical(["B", "T"] * 3)}, index=CELLS)
    path = write(ad.AnnData(poisson(6, 3), obs=obs), tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        del file["obs/label"][name]
        file["obs/label"][name] = values
    with open_source(path) as source, pytest.raises(ValueError, match=match) as error:
        source.obs(["label"])
    assert path in str(error.value)


def test_parts_that_are_not_there_are_named(tmp_path):
    path = write(ad.AnnData(poisson(6, 3)), tmp_path / "a.h5ad")
    with opened(path) as root:
        for part in ("obs/nothing", "nothing/obs", "X/data"):
            with pytest.raises(ValueError, match=f"there is no {part}; the file is incomplete"):
                item(root, part)
