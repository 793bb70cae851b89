"""Sparse arrays that lie are refused, or read as a plain reference reads them."""

import io
import itertools

import fsspec
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data.counts import MOST
from cellray.data.matrices import canonical
from cellray.data.reading import open_source


def frame(root, name, rows):
    group = root.create_group(name)
    group.attrs.update({"_index": "_index", "encoding-type": "dataframe", "encoding-version": "0.2.0"})
    group.attrs["column-order"] = np.array([], "S")
    group["_index"] = np.array([f"{name}{i}" for i in range(rows)], dtype=h5py.string_dtype())
    group["_index"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def stored(arrays, shape, kind, names):
    """The bytes of an .h5ad with these arrays, whatever they say."""
    out = io.BytesIO()
    with h5py.File(out, "w") as file:
        frame(file, "obs", names[0])
        frame(file, "var", names[1])
        group = file.create_group("X")
        group.attrs.update({"encoding-type": kind, "encoding-version": "0.1.0", "shape": shape})
        for name, values in arrays.items():
            packed = {"compression": "gzip"} if values.ndim == 1 and len(values) else {}
            group.create_dataset(name, data=values, **packed)
    return out.getvalue()


def plain(arrays, shape, kind, names):
    """The matrix as a list of lists would have it, None if the arrays contradict themselves."""
    data, indices, indptr = (arrays[name] for name in ("data", "indices", "indptr"))
    shape = np.asarray(shape)
    if any(values.ndim != 1 for values in arrays.values()):
        return None
    if indices.dtype.kind not in "iu" or indptr.dtype.kind not in "iu":
        return None
    if shape.dtype.kind not in "iu" or shape.tolist() != list(names):
        return None
    outer, inner = names if kind == "csr_matrix" else names[::-1]
    starts = indptr.tolist()
    if len(starts) != outer + 1 or len(indices) != len(data) or starts[0] != 0 or starts[-1] != len(data):
        return None
    if any(a > b for a, b in itertools.pairwise(starts)):
        return None
    if any(not 0 <= i < inner for i in indices.tolist()):
        return None
    if any(not (0 <= value <= MOST and value == int(value)) for value in data.tolist()):
        return None
    found = np.zeros((outer, inner), np.uint64)
    for row in range(outer):
        for k in range(starts[row], starts[row + 1]):
            found[row, int(indices[k])] += np.uint64(int(data[k]))
    if found.size and found.max() > MOST:
        return None
    return found if kind == "csr_matrix" else found.T


def honest(rng):
    names = tuple(rng.integers(0, 9, 2).tolist())
    kind = str(rng.choice(["csr_matrix", "csc_matrix"]))
    matrix = rng.poisson(0.7, names)
    made = sp.csr_matrix(matrix) if kind == "csr_matrix" else sp.csc_matrix(matrix)
    pointers = str(rng.choice(["i4", "i8", "u4"]))
    arrays = {
        "data": made.data.astype(str(rng.choice(["f4", "f8", "i4", "u2", "f2", "i8", ">f4", ">i4"]))),
        "indices": made.indices.astype(pointers),
        "indptr": made.indptr.astype(pointers),
    }
    return arrays, np.array(names), kind, names


ODD = (-1, 0, 1, 2, 7, 100, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**31), -(2**63))


def lie(rng, arrays, shape):
    """The arrays with one lie more, which may by chance be none."""
    name = str(rng.choice(["data", "indices", "indptr"]))
    values = arrays[name]
    way = rng.integers(0, 10)
    if way <= 2 and values.size and values.ndim == 1:
        odd = int(rng.choice(ODD))
        wide = values.astype("f8" if values.dtype.kind == "f" else "i8")
        wide[rng.integers(0, len(wide))] = odd
        with np.errstate(over="ignore"):
            same = wide.astype(values.dtype)
        values = same if rng.random() < 0.5 and np.array_equal(same, wide) else wide
    elif way == 3:
        values = rng.permutation(values)
    elif way == 4:
        values = values[: rng.integers(0, len(values) + 1)] if values.ndim else values
    elif way == 5:
        values = np.append(values, rng.integers(0, 9, rng.integers(1, 4))).astype(values.dtype)
    elif way == 6 and values.size:
        values = values.astype("f8")
        values.reshape(-1)[rng.integers(0, values.size)] += rng.choice([0, 0.5, np.nan, np.inf, -np.inf])
    elif way == 7:
        values = values.reshape((1, -1) if values.size else (1, 0))
    elif way == 8:
        shape = shape + rng.integers(-2, 3, 2) if rng.random() < 0.7 else shape[::-1].astype("f8")
    else:
        # Repeats within a row, and values whose sum is more than fits.
        values = np.repeat(values[:1], len(values)) if values.ndim == 1 and len(values) else values
        if name == "data":
            values = np.full(values.shape, MOST, "u4")
    return arrays | {name: values}, shape


def check(seed):
    """Whether the arrays of this seed are sound; that they are then read, else refused."""
    rng = np.random.default_rng(seed)
    arrays, shape, kind, names = honest(rng)
    for _ in range(rng.integers(0, 3)):
        arrays, shape = lie(rng, arrays, shape)
    with np.errstate(invalid="ignore"):
        expected = plain(arrays, shape, kind, names)
    url = "memory://lies/a.h5ad"
    fsspec.filesystem("memory").pipe_file("/lies/a.h5ad", stored(arrays, shape, kind, names))
    try:
        if expected is None:
            with pytest.raises(ValueError, match=url):
                read(url)
            return False
        whole, parts = read(url)
    finally:
        fsspec.filesystem("memory").rm("/lies", recursive=True)
    assert whole.dtype == np.uint32
    assert whole.has_canonical_format
    assert whole.data.all()
    np.testing.assert_array_equal(whole.toarray(), expected)
    np.testing.assert_array_equal(parts.toarray(), expected)
    return True


def read(url):
    """The counts as a whole, and put together of two parts."""
    with open_source(url) as source:
        cells = len(source.cell_names)
        parts = [source.rows(0, cells // 2), source.rows(cells // 2, cells)]
        return source.rows(0, cells), sp.vstack(parts)


def test_sparse_arrays_that_lie_are_refused_and_others_read():
    assert 40 < sum(map(check, range(200))) < 160


@pytest.mark.slow
def test_ten_thousand_sparse_arrays_that_may_lie():
    assert 2_000 < sum(map(check, range(200, 10_200))) < 8_000


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3) | st.just(2**31)), max_size=6), max_size=5
    )
)
def test_canonical_counts_equal_their_sum(rows):
    indices = np.array([i for row in rows for i, _ in row], np.int32)
    data = np.array([n for row in rows for _, n in row], np.uint32)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    expected = np.zeros((len(rows), 6), np.int64)
    for number, row in enumerate(rows):
        for i, n in row:
            expected[number, i] += n
    counts = sp.csr_matrix((data, indices, starts), (len(rows), 6))
    if expected.size and expected.max() > MOST:
        with pytest.raises(ValueError, match="add up to more than"):
            canonical(counts)
        return
    found = canonical(counts)
    np.testing.assert_array_equal(found.toarray(), expected)
    assert found.has_canonical_format
    assert found.dtype == np.uint32
