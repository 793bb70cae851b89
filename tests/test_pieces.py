import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data import pieces, storage


def ragged(rows, kind, other, *, seed=0):
    """Offsets, ids and counts of some rows, the last ones without tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 6, rows) * (np.arange(rows) < rows - 2)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return (
        offsets,
        rng.integers(0, np.iinfo(kind).max, offsets[-1]).astype(kind),
        rng.integers(0, np.iinfo(other).max, offsets[-1]).astype(other),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 9),
    kind=st.sampled_from([np.uint8, np.uint16, np.uint32]),
    other=st.sampled_from([np.uint8, np.uint16, np.uint32]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_range_of_rows_comes_back_in_its_own_types_and_in_wider_ones(
    tmp_path_factory, rows, kind, other, seed, data
):
    url = str(tmp_path_factory.mktemp("pieces") / "piece.bin")
    offsets, ids, counts = ragged(rows, kind, other, seed=seed)
    storage.write_bytes(url, pieces.encode(offsets, ids, counts))
    whole = pieces.decode(storage.read_bytes(url))
    for one, expected in zip(whole, (offsets, ids, counts), strict=True):
        np.testing.assert_array_equal(one, expected)
        assert one.flags.aligned
    assert (whole[1].dtype, whole[2].dtype) == (kind, other)
    first = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(first, rows))
    own = slice(offsets[first], offsets[stop])
    for wider in (False, True):
        found = [np.zeros(own.stop - own.start, np.uint32 if wider else k) for k in (kind, other)]
        with pieces.opened(url) as piece:
            np.testing.assert_array_equal(piece.offsets, offsets)
            piece.read(first, stop, *found)
        np.testing.assert_array_equal(found[0], ids[own])
        np.testing.assert_array_equal(found[1], counts[own])


def test_a_piece_that_is_cut_is_not_taken_for_a_whole_one(tmp_path):
    offsets, ids, counts = ragged(9, np.uint16, np.uint8)
    data = pieces.encode(offsets, ids, counts)
    storage.write_bytes(str(tmp_path / "cut.bin"), data[:-1])
    with (
        pieces.opened(str(tmp_path / "cut.bin")) as piece,
        pytest.raises(AssertionError, match="bytes of a piece came"),
    ):
        piece.read(0, 9, np.empty(len(ids), np.uint16), np.empty(len(ids), np.uint8))
    with pytest.raises(ValueError, match="buffer"):
        pieces.decode(data[:-1])
