import re
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data.counts import BLOCK, MOST, check_counts, counts_of
from cellray.data.reading import open_source

WHERE = "cells.h5ad: X"


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64, np.float32, np.float64, bool])
def test_whole_numbers_of_any_type_pass(dtype):
    check_counts(np.array([[0, 1], [1, 0]], dtype), WHERE)
    check_counts(np.array([], dtype), WHERE)


def test_large_whole_floats_pass():
    check_counts(np.array([0.0, 16_777_216.0, 3e9]), WHERE)


@pytest.mark.parametrize(
    ("data", "found", "looks"),
    [
        ([0.0, np.nan], "nan", "damaged"),
        ([0.0, np.inf], "inf", "damaged"),
        ([-1.25, 2.5], "-1.25", "scaled (z-scored)"),
        ([0.0, np.log1p(3.2)], "1.43508", "log-normalised (log1p)"),
        ([0.0, 0.25, 1.0], "0.25", "scaled to 0 … 1"),
        ([0.0, 133.7], "133.7", "normalised to a depth (CPM, CP10k)"),
        ([0.0, 1e12], "1e+12", "not plausible as a count"),
    ],
)
def test_what_is_no_count_is_refused_with_place_example_and_guess(data, found, looks):
    with pytest.raises(ValueError, match=r"cells\.h5ad: X") as error:
        check_counts(np.array(data), WHERE)
    assert found in str(error.value)
    assert looks in str(error.value)
    assert "layer=" in str(error.value)


def test_negative_integers_are_refused():
    with pytest.raises(ValueError, match="negative values, such as -3"):
        check_counts(np.array([1, -3], np.int16), WHERE)


def test_counts_that_no_token_can_hold_are_refused():
    with pytest.raises(ValueError, match="above 4,294,967,295"):
        check_counts(np.array([2**40], np.uint64), WHERE)
    with pytest.raises(ValueError, match="above 4,294,967,295"):
        check_counts(np.array([2**40], np.int64), WHERE)


def test_text_is_refused():
    with pytest.raises(ValueError, match="not numbers"):
        check_counts(np.array(["1", "2"]), WHERE)


def cells_of(seed, cells=40, genes=300, mean=1.2):
    """Raw counts with depths and genes as uneven as in a tissue, [cells, genes]."""
    rng = np.random.default_rng(seed)
    rates = rng.lognormal(0, 1.2, genes) * rng.lognormal(0, 0.5, (cells, 1))
    found = rng.poisson(rates * mean / rates.mean())
    return found[found.sum(1) > 5]


def depth(counts, to):
    return counts / counts.sum(1, keepdims=True) * to


LENGTHS = np.random.default_rng(1).uniform(0.3, 9, 300)
CHANGED: dict[str, tuple[Any, str]] = {
    "log1p CP10k": (lambda x: np.log1p(depth(x, 1e4)), "log-normalised (log1p of CP10k, counts per 10,000)"),
    "log1p CPM": (lambda x: np.log1p(depth(x, 1e6)), "log-normalised (log1p of CPM, counts per million)"),
    "log1p to the median": (
        lambda x: np.log1p(depth(x, np.median(x.sum(1)))),
        "log-normalised (log1p of counts per ",
    ),
    "log1p of some genes": (
        lambda x: np.log1p(depth(x, 1e4))[:, :120],
        "log-normalised (log1p of counts times a factor for each cell)",
    ),
    "log1p of counts": (np.log1p, "log-normalised (log1p of counts, to no depth)"),
    "log2 CPM": (
        lambda x: np.log2(depth(x, 1e6) + 1),
        "log-normalised (log2(x + 1) of CPM, counts per million)",
    ),
    "log2 of counts": (lambda x: np.log2(x + 1), "log-normalised (log2(x + 1) of counts, to no depth)"),
    "log10 CP10k": (lambda x: np.log10(depth(x, 1e4) + 1), "log-normalised (log10(x + 1) of CP10k"),
    "CPM": (lambda x: depth(x, 1e6), "normalised to a depth (CPM, counts per million)"),
    "CP10k": (lambda x: depth(x, 1e4), "normalised to a depth (CP10k, counts per 10,000)"),
    "size factors": (
        lambda x: x / np.random.default_rng(2).uniform(0.3, 3, (len(x), 1)),
        "normalised to a depth (counts times a factor for each cell)",
    ),
    "TPM": (lambda x: depth(x / LENGTHS, 1e6), "normalised to length and depth (TPM)"),
    "log1p TPM": (lambda x: np.log1p(depth(x / LENGTHS, 1e6)), "log-normalised"),
    "z-scores": (lambda x: (x - x.mean(0)) / (x.std(0) + 0.1), "scaled (z-scored), centred or CLR"),
    "shares": (lambda x: depth(x, 1), "normalised to a depth (counts per 1)"),
    "to 0 … 1": (lambda x: x / np.maximum(x.max(0), 1) ** 1.1, "scaled to 0 … 1"),
    "estimates": (
        lambda x: x + (np.random.default_rng(3).random(x.shape) < 0.2) * (x > 0) * 0.37,
        "estimated or corrected",
    ),
    "square roots": (np.sqrt, "transformed (square root of counts, to no depth)"),
    "arcsinh": (lambda x: np.arcsinh(x / 5), "log-normalised (log1p), or another logarithm"),
}


@pytest.mark.parametrize("way", CHANGED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("flat", [True, False])
def test_what_was_done_to_counts_is_told(way, dtype, flat):
    change, says = CHANGED[way]
    for seed in range(3):
        values = change(cells_of(seed)).astype(dtype)
        stored = sp.csr_matrix(values)
        given = (stored.data, WHERE, stored.indptr) if flat else (values, WHERE)
        with pytest.raises(ValueError, match=r"cells\.h5ad: X") as error:
            check_counts(*given)
        assert f"it looks {says}" in str(error.value)


BACK: dict[str, Any] = {"np.expm1(X)": np.expm1, "np.exp2(X) - 1": lambda x: np.exp2(x) - 1, "X": np.copy}


@pytest.mark.parametrize("way", ["log1p CP10k", "log1p of some genes", "log2 CPM", "CPM", "size factors"])
def test_the_way_back_that_is_offered_gives_the_counts(way):
    counts = cells_of(7)
    values = CHANGED[way][0](counts).astype(np.float32)
    counts = counts[:, : values.shape[1]]
    with pytest.raises(ValueError, match="counts can be had back") as error:
        check_counts(values, WHERE)
    spelt = re.search(r"multiples of one: (.*?) over a cell's smallest", str(error.value))[1]  # type: ignore[index]
    plain = BACK[spelt](values.astype(np.float64))
    smallest = np.where(plain > 0, plain, np.inf).min(1, keepdims=True)
    has_one = (counts == 1).any(1)
    np.testing.assert_array_equal(np.rint(plain / smallest)[has_one], counts[has_one])
    assert has_one.mean() > 0.8


def test_estimates_and_lengths_cannot_be_undone_and_nothing_is_offered():
    for way in ("TPM", "log1p TPM", "z-scores", "estimates", "to 0 … 1"):
        with pytest.raises(ValueError, match="get the version with raw counts"):
            check_counts(CHANGED[way][0](cells_of(1)), WHERE)


def test_the_real_log_normalised_file_can_be_undone(shared_data):
    url = str(shared_data / "pbmc_3tech_symphony" / "rna.h5ad")
    with open_source(url) as source:
        counts = source.rows(0, 100)
        layer = next(name for name in source._candidates() if name not in ("", "raw"))  # type: ignore[attr-defined]
    assert counts.nnz
    with (
        pytest.raises(ValueError, match=r"log1p of counts times a factor.*counts can be had back") as error,
        open_source(url, layer=layer) as source,
    ):
        source.rows(0, 100)
    assert "In this file layer= (X) holds whole numbers" in str(error.value)


WHOLE = st.integers(0, 2**24) | st.sampled_from([0, 1, 2**31 - 1, 2**31, MOST])
TYPES = [np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.float16, np.float32, np.float64]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(values=st.lists(WHOLE, max_size=40), dtype=st.sampled_from(TYPES), swapped=st.booleans())
def test_whole_numbers_are_never_refused_however_they_are_stored(values, dtype, swapped):
    exact = np.array(values, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        stored = exact.astype(dtype)
        same = np.array_equal(stored.astype(np.float64), exact)
    if not same:
        return
    stored = stored.astype(stored.dtype.newbyteorder()) if swapped else stored
    check_counts(stored, WHERE)
    found = counts_of(stored, WHERE)
    assert found.dtype == np.uint32
    assert found.tolist() == values
    if stored.dtype.kind == "f":
        assert counts_of(-0.0 * stored, WHERE).tolist() == [0] * len(values)


NONE = st.sampled_from([-1.0, -0.5, 0.25, 0.5, 1e-3, 7.5, 65504.5, 1e10, -1e10, np.nan, np.inf, -np.inf])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    values=st.lists(st.integers(0, 50), max_size=300),
    odd=NONE,
    place=st.integers(0, 10**6),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_a_single_number_that_is_no_count_is_never_taken(values, odd, place, dtype):
    with np.errstate(over="ignore"):
        data = np.insert(np.array(values, dtype), place % (len(values) + 1), np.array(odd, dtype))
    plain = data.astype(np.float64)
    if ((plain >= 0) & (plain <= MOST) & (plain == np.floor(plain))).all():
        return
    with pytest.raises(ValueError, match=r"cells\.h5ad: X has"):
        check_counts(data, WHERE)


def test_one_odd_number_is_found_in_any_block():
    for place in (0, BLOCK - 1, BLOCK, 3 * BLOCK):
        data = np.ones(3 * BLOCK + 1, np.float32)
        data[place] = 1.5
        with pytest.raises(ValueError, match=r"not whole, such as 1\.5"):
            check_counts(data, WHERE)
        data[place] = 3e9
        assert int(counts_of(data, WHERE)[place]) == 3_000_000_000


def test_32_bit_integers_are_not_copied():
    for dtype in (np.int32, np.uint32):
        data = np.arange(9, dtype=dtype)
        assert np.shares_memory(counts_of(data, WHERE), data)
