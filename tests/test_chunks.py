import importlib
import zlib

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellray.data import chunks

WAYS = [
    {},
    {"chunks": (7,)},
    {"chunks": (7,), "compression": "gzip"},
    {"chunks": (7,), "compression": "gzip", "shuffle": True},
    {"chunks": (7,), "compression": "gzip", "fletcher32": True},
    {"chunks": (7,), "compression": "lzf", "shuffle": True},
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    with h5py.File(tmp_path_factory.mktemp("chunks") / "a.h5", "w") as file:
        yield file


@pytest.mark.parametrize("module", ["zlib", "isal.isal_zlib"])
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    size=st.integers(1, 40),
    ends=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    way=st.sampled_from(WAYS),
    dtype=st.sampled_from(["u1", "i2", "<i4", ">i4", "i8", "f2", "<f4", ">f8", "bool"]),
)
def test_a_part_is_what_hdf5_itself_reads(file, monkeypatch, module, size, ends, way, dtype):
    pytest.importorskip(module)
    monkeypatch.setattr(chunks, "INFLATE", importlib.import_module(module))
    file.pop("x", None)
    values = np.random.default_rng(size).integers(0, 100, size).astype(dtype)
    maxshape = (None,) if way else (size,)
    array = file.create_dataset("x", data=values, maxshape=maxshape, **way)
    first, last = sorted(min(end, size) for end in ends)
    numbers = chunks.Numbers(array)
    for begin, end in ((first, last), (last, size), (first, last)):
        found = numbers.part(begin, end)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array[begin:end])


def test_a_list_read_in_ranges_one_after_another_is_unpacked_once(file, monkeypatch):
    file.pop("x", None)
    values = np.arange(1000, dtype="i4")
    array = file.create_dataset("x", data=values, chunks=(64,), compression="gzip")
    unpacked = []
    real = chunks._unpacked

    def counted(*given):
        unpacked.append(given)
        return real(*given)

    monkeypatch.setattr(chunks, "_unpacked", counted)
    numbers = chunks.Numbers(array)
    found = [numbers.part(at, min(at + 37, 1000)) for at in range(0, 1000, 37)]
    np.testing.assert_array_equal(np.concatenate(found), values)
    assert len(unpacked) == 16


@pytest.mark.parametrize("module", ["zlib", "isal.isal_zlib"])
def test_a_chunk_is_held_against_its_checksum_and_size(file, monkeypatch, module):
    pytest.importorskip(module)
    monkeypatch.setattr(chunks, "INFLATE", importlib.import_module(module))
    file.pop("x", None)
    values = np.arange(50, dtype="i4")
    array = file.create_dataset("x", data=values, chunks=(50,), compression="gzip")
    sound = zlib.compress(values.tobytes())
    assert chunks.Numbers(array).part(0, 50).tolist() == values.tolist()
    wrong = [sound[:-1] + bytes([sound[-1] ^ 1]), sound[:-5], sound + b"more"]
    wrong += [zlib.compress(values[:-1].tobytes()), zlib.compress(bytes(10**7)), zlib.compress(b"")]
    for packed in wrong:
        array.id.write_direct_chunk((0,), packed)
        with pytest.raises((ValueError, OSError)):
            chunks.Numbers(array).part(0, 50)
    array.id.write_direct_chunk((0,), sound)
    assert chunks.Numbers(array).part(3, 5).tolist() == [3, 4]


def test_a_chunk_that_was_stored_without_its_filter_is_read_as_such(tmp_path):
    values = np.arange(50, dtype="i4")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        array = file.create_dataset("x", (50,), "i4", chunks=(50,), compression="gzip")
        array.id.write_direct_chunk((0,), values.tobytes(), filter_mask=1)
    with h5py.File(tmp_path / "a.h5") as file:
        assert chunks.Numbers(file["x"]).part(3, 5).tolist() == [3, 4]
