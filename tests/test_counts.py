import numpy as np
import pytest

from cellray.data.counts import check_counts

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
