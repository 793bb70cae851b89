import json
import os
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import zarr

from cellray.data import guard
from cellray.data.formats import opened
from cellray.data.reading import open_source
from tests.files import anndata, poisson, write


@pytest.fixture
def path(tmp_path):
    return write(anndata(poisson(23, 11), obs={"donor": ["d"] * 23}), tmp_path / "a.h5ad", compression="gzip")


def refused(path, match, **settings):
    """That `path` is refused when it is opened, before any count."""
    with pytest.raises(ValueError, match=match) as error, open_source(str(path), **settings):
        pass
    assert str(path) in str(error.value)


def edit(path, name, **options):
    """The file without `name`, to be given another."""
    file = h5py.File(path, "a", **options)
    if name in file:
        del file[name]
    return file


@pytest.mark.parametrize("name", ["X", "X/data", "obs/donor", "uns/a/b", "var", "elsewhere"])
@pytest.mark.parametrize("soft", [True, False], ids=["soft", "external"])
def test_links_that_lead_elsewhere_are_refused_wherever_they_are(tmp_path, path, name, soft):
    write(anndata(poisson(23, 11)), tmp_path / "secret.h5ad")
    with edit(path, name) as file:
        file[name] = h5py.SoftLink("/obs") if soft else h5py.ExternalLink(str(tmp_path / "secret.h5ad"), "/X")
    refused(path, f"/{name} is a link out of its place, which is not followed")


@pytest.mark.parametrize("name", ["X/data", "uns/a"])
def test_values_in_other_files_are_refused(tmp_path, path, name):
    (tmp_path / "secret").write_bytes(b"\1" * 400)
    with edit(path, name) as file:
        file.create_dataset(name, (100,), "i4", external=[(str(tmp_path / "secret"), 0, 400)])
    refused(path, f"{name} takes its values from another file")
    with edit(path, name) as file:
        layout = h5py.VirtualLayout((100,), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret"), "x", (100,))
        file.create_virtual_dataset(name, layout)
    refused(path, f"{name} takes its values from another file")


def test_groups_that_hold_themselves_are_walked_once(path):
    with h5py.File(path, "a") as file:
        file["uns/again"] = file["/"]
        file["uns/obs"] = file["obs"]
    with open_source(path) as source:
        assert source.rows(0, 23).shape == (23, 11)


def test_too_many_objects_and_too_deep_ones_are_refused(path, monkeypatch):
    with h5py.File(path, "a") as file:
        file.create_group("uns/" + "/".join("a" * (guard.DEPTH + 5)))
    refused(path, "within each other")
    with edit(path, "uns/a") as file:
        for number in range(100):
            file[f"uns/{number}"] = 1
    monkeypatch.setattr(guard, "OBJECTS", 100)
    refused(path, "/uns makes more than 100 parts")


def test_a_small_file_cannot_declare_terabytes(path):
    for name, dtype, chunks in (("X/data", "f4", (1 << 20,)), ("obs/donor", "i8", None)):
        with edit(path, name) as file:
            file.create_dataset(name, (10**13,), dtype, chunks=chunks)
        assert os.path.getsize(path) < 100_000
        refused(path, f"with /{name} it declares .* bytes, more than a file of .* bytes can hold")
        with edit(path, name) as file:
            file[name] = np.zeros(23, dtype)


def test_what_is_never_read_may_be_of_any_type_and_size(path):
    with h5py.File(path, "a") as file:
        file.create_dataset("uns/large", (10**13,), "f4", chunks=(1 << 20,))
        file.create_dataset("obsm/ragged", (5,), h5py.vlen_dtype(np.int32))
    with open_source(path) as source:
        assert source.rows(0, 23).shape == (23, 11)


def test_zeros_may_be_packed_as_well_as_gzip_can(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "FLOOR", 1 << 20)
    with h5py.File(tmp_path / "zeros.h5", "w") as file:
        file.create_dataset("X", data=np.zeros((3000, 3000), "f4"), compression="gzip", compression_opts=9)
        size = file["X"].size * 4
    assert size > guard.FLOOR
    with opened(str(tmp_path / "zeros.h5")) as root:
        assert root["X"].shape == (3000, 3000)


def test_a_chunk_larger_than_memory_is_refused(tmp_path, path, monkeypatch):
    monkeypatch.setattr(guard, "LARGEST_CHUNK", 1000)
    with edit(path, "X/data") as file:
        file.create_dataset("X/data", (300,), "f8", chunks=(300,), compression="gzip")
    refused(path, "/X/data has chunks of 2,400 bytes")


@pytest.mark.parametrize(
    ("dtype", "match"),
    [
        (h5py.vlen_dtype(np.int32), "TypeVlenID"),
        (h5py.ref_dtype, "TypeReferenceID"),
        (np.dtype("V8"), "TypeOpaqueID"),
        (np.dtype([("a", "i4"), ("b", h5py.ref_dtype)]), "TypeReferenceID"),
    ],
)
def test_types_that_no_table_of_cells_has_are_refused(path, dtype, match):
    with edit(path, "obs/donor") as file:
        file.create_dataset("obs/donor", (23,), dtype)
    refused(path, f"/obs/donor holds values of a type .{match}")


def test_numbers_of_an_unusual_layout_are_refused(path):
    odd = h5py.h5t.STD_I32LE.copy()
    odd.set_precision(20)
    odd.set_offset(4)
    with edit(path, "X/data") as file:
        h5py.h5d.create(file["X"].id, b"data", odd, h5py.h5s.create_simple((100,)))
    refused(path, "/X/data holds numbers of an unusual layout")


def test_filters_that_come_with_the_library_are_read_and_others_named(path):
    whole = poisson(23, 11)
    stored = sp.csr_matrix(whole)
    ways: list[dict[str, Any]] = [
        {"compression": "lzf"},
        {"compression": "gzip", "shuffle": True},
        {"compression": "gzip", "shuffle": True, "fletcher32": True},
        {"scaleoffset": 0, "dtype": "i4"},
        {"fletcher32": True},
        {},
    ]
    for way in ways:
        with edit(path, "X/data") as file:
            values = stored.data.astype(way.get("dtype", "f4"))
            chunks = (10,) if way else None
            file.create_dataset("X/data", data=values, chunks=chunks, **way)
        with open_source(path) as source:
            np.testing.assert_array_equal(source.rows(3, 20).toarray(), whole[3:20])
    for code, match in ((32015, "the filter zstd: import its plugin"), (511, "the filter number 511: write")):
        with edit(path, "X/data") as file:
            creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            creation.set_chunk((10,))
            creation.set_filter(code, h5py.h5z.FLAG_OPTIONAL)
            space = h5py.h5s.create_simple((stored.nnz,))
            h5py.h5d.create(file["X"].id, b"data", h5py.h5t.IEEE_F32LE, space, dcpl=creation)
        refused(path, match)
    with edit(path, "X/data") as file:
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((10,))
        creation.set_deflate(1)
        creation.set_deflate(1)
        h5py.h5d.create(file["X"].id, b"data", h5py.h5t.IEEE_F32LE, space, dcpl=creation)
    refused(path, "the same filter more than once")


def test_a_chunk_that_unpacks_to_more_than_it_declares_is_refused(path):
    import zlib

    for fletcher in (False, True):
        with edit(path, "X/data") as file:
            made = file.create_dataset(
                "X/data", (147,), "f4", chunks=(147,), compression="gzip", fletcher32=fletcher
            )
            made.id.write_direct_chunk((0,), zlib.compress(bytes(50_000_000)))
        with (
            open_source(path) as source,
            pytest.raises(ValueError, match=r"does not hold 588 bytes|chunk of .* bytes: it is damaged"),
        ):
            source.rows(0, 23)


def test_chunks_that_were_never_written_are_no_zeros(path):
    for packed in ("gzip", "lzf"):
        with edit(path, "X/indices") as file:
            file.create_dataset("X/indices", (147,), "i4", chunks=(50,), compression=packed)[:100] = 1
        with open_source(path) as source:
            source.rows(0, 3)
            with pytest.raises(ValueError, match=r"a\.h5ad"):
                source.rows(0, 23)


@pytest.fixture(params=[2, 3])
def folder(tmp_path, request):
    data = anndata(sp.csr_matrix(poisson(23, 11)), obs={"donor": ["d"] * 23})
    return write(data, tmp_path / "a.zarr", version=request.param), request.param


def change(folder, version, name, how):
    """Another description of an array; what repeats all descriptions in one place goes."""
    edited(Path(folder, name, ".zarray" if version == 2 else "zarr.json"), how)
    Path(folder, ".zmetadata").unlink(missing_ok=True)
    if version == 3:
        edited(Path(folder, "zarr.json"), lambda about: about.pop("consolidated_metadata", None))


def edited(file, how):
    about = json.loads(file.read_text())
    how(about)
    file.write_text(json.dumps(about))


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_zarr_never_unpickles(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    path = write(anndata(poisson(23, 11), obs={"donor": ["d"] * 23}), tmp_path / "a.zarr", version=2)

    def pickled(about):
        about.update(filters=None, compressor={"id": "pickle", "protocol": 5})

    change(path, 2, "obs/donor/codes", pickled)
    Path(path, "obs", "donor", "codes", "0").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"a\.zarr.*pickle"), open_source(path) as source:
        source.obs(["donor"])
    assert not (tmp_path / "exploded").exists()


def test_codecs_that_are_not_known_to_only_unpack_are_named(tmp_path):
    path = write(anndata(sp.csr_matrix(poisson(23, 11))), tmp_path / "a.zarr", version=2)
    odd = {"id": "fixedscaleoffset", "offset": 0, "scale": 2, "dtype": "<f4"}
    change(path, 2, "X/data", lambda about: about.update(filters=[odd]))
    refused(path, "/X/data is packed with the codec 'fixedscaleoffset'")


def test_a_column_name_cannot_lead_out_of_a_folder(folder):
    path, version = folder
    group = zarr.open_group(path, mode="a", use_consolidated=False)["obs"]
    for name in ("../../secret", "/etc/passwd", "./donor", "a\\b"):
        group.attrs["column-order"] = [name]
        change(path, version, "X/data", lambda about: None)
        with (
            open_source(path) as source,
            pytest.raises(ValueError, match=r"is named .*, which is not followed"),
        ):
            source.obs([name])


def test_links_out_of_a_folder_are_refused(tmp_path, folder):
    path, _ = folder
    (tmp_path / "secret").write_text("secret")
    os.symlink(tmp_path / "secret", os.path.join(path, "X", "data", "elsewhere"))
    refused(path, "is a link out of the folder")
    os.remove(os.path.join(path, "X", "data", "elsewhere"))
    os.symlink(os.path.join(path, "obs"), os.path.join(path, "same"))
    os.symlink(path, tmp_path / "b.zarr")
    with open_source(str(tmp_path / "b.zarr")) as source:
        assert source.rows(0, 23).shape == (23, 11)


def test_chunks_of_a_folder_that_need_too_much_memory_are_refused(folder):
    path, version = folder

    def large(about):
        if version == 2:
            about["chunks"] = [10**10]
        else:
            about["chunk_grid"]["configuration"]["chunk_shape"] = [10**10]

    change(path, version, "X/data", large)
    refused(path, "/X/data has chunks of .* bytes")


def test_a_folder_that_declares_terabytes_of_names_is_refused(folder):
    path, version = folder
    change(path, version, "obs/_index", lambda about: about.update(shape=[10**12]))
    refused(path, "1,000,000,000,000 cell names")
    change(path, version, "X/indptr", lambda about: about.update(shape=[10**12 + 1]))
    if version == 2:
        edited(Path(path, "X", ".zattrs"), lambda about: about.update(shape=[10**12, 11]))
    else:
        edited(Path(path, "X", "zarr.json"), lambda about: about["attributes"].update(shape=[10**12, 11]))
    refused(path, "more than there can be")


def test_sharded_folders_are_read_and_shards_with_huge_indices_refused(tmp_path):
    whole = poisson(23, 11)
    path = write(anndata(sp.csr_matrix(whole)), tmp_path / "a.zarr")
    group = zarr.open_group(path, mode="a", use_consolidated=False, path="X")
    values = np.asarray(group["data"][...])  # type: ignore[index]
    del group["data"]
    group.create_array("data", data=values, chunks=(10,), shards=(50,))
    change(path, 3, "X/data", lambda about: None)
    with open_source(path) as source:
        np.testing.assert_array_equal(source.rows(3, 20).toarray(), whole[3:20])

    def huge(about):
        about["chunk_grid"]["configuration"]["chunk_shape"] = [10**10]
        about["shape"] = [10**10]

    change(path, 3, "X/data", huge)
    refused(path, "/X/data has chunks of 16,000,000,000 bytes")


def test_addresses_of_soma_experiments_are_named_with_the_way_out():
    refused("soma://bucket/experiment", "TileDB-SOMA experiment.*s3://")
    refused("tiledb://bucket/experiment", "TileDB-SOMA experiment.*s3://")


@pytest.mark.parametrize("url", ["reference://a.json", "reference::s3://bucket/a.json", "kerchunk://a"])
def test_stores_that_refer_to_other_files_are_refused(url):
    refused(url, "takes its content from other files")
