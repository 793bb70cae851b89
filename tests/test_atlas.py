import pytest

from cellray.data.atlas import files, from_dataset, read_atlas
from cellray.train.recipe import DataSet, Recipe, override
from pipelines.full import with_rna
from tests.files import table

KNOWN = ("rna", "atac", "protein")


def read(path, text):
    path.write_text(text)
    return read_atlas(str(path), KNOWN)


def refused(tmp_path, text, match):
    with pytest.raises(ValueError, match=match) as error:
        read(tmp_path / "atlas.csv", text)
    assert "atlas.csv" in str(error.value)


def test_urls_are_relative_to_the_table(tmp_path):
    here, there, far = read(
        tmp_path / "atlas.csv",
        "dataset,modality,url\na,rna,files/a.h5ad\nb,rna,/data/b.h5ad\nc,atac,s3://bucket/c.zarr\n",
    )
    assert here.url == str(tmp_path / "files/a.h5ad")
    assert here.given == "files/a.h5ad"
    assert (there.url, far.url) == ("/data/b.h5ad", "s3://bucket/c.zarr")
    assert far.modality == "atac"


def test_a_table_may_lie_at_any_url():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/atlas/t.csv", b"dataset,url\na,a.h5ad\n")
    try:
        assert read_atlas("memory://atlas/t.csv", KNOWN)[0].url == "memory://atlas/a.h5ad"
    finally:
        memory.rm("/atlas", recursive=True)


def test_every_column_is_kept_and_missing_ones_are_empty(tmp_path):
    row = {
        **{"dataset": "a", "modality": "rna", "url": "a.h5ad", "label": "cell_type", "batch": "lane"},
        **{"donor": "=d1", "assay": "kit", "species": "=mouse", "tissue": "=brain", "layer": "counts"},
        **{"names": "gene_ids", "label_from": "protein"},
    }
    (file,) = read_atlas(table(tmp_path / "t.csv", row), KNOWN)
    assert {key: getattr(file, key) for key in row if key != "url"} == {
        k: v for k, v in row.items() if k != "url"
    }
    (bare,) = read_atlas(table(tmp_path / "t.csv", {"dataset": "a", "url": "a.h5ad"}), KNOWN)
    assert bare.label == bare.layer == bare.modality == ""


def test_blank_lines_spaces_and_a_byte_order_mark_do_not_matter(tmp_path):
    found = read(tmp_path / "atlas.csv", "\ufeffdataset , url\n\n a , a.h5ad \n,\n")
    assert [(file.dataset, file.given) for file in found] == [("a", "a.h5ad")]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("dataset,ulr\na,b\n", "no column 'ulr'.*Did you mean 'url'"),
        ("dataset;url\na;b\n", "no column 'dataset;url'"),
        ("dataset,label\na,b\n", "has no column url"),
        ("dataset,url,url\na,b,c\n", "url twice"),
        ("", "is empty"),
        ("dataset,url\n", "has no rows"),
        ("dataset,url\na,b,c\n", "line 2 has 3 values, the header 2"),
        ("dataset,url\na,b\n,c\n", "line 3 has no dataset"),
        ("dataset,url\na,\n", "line 2 has no url"),
        ("dataset,modality,url\na,rnaa,b\n", "line 2: there is no modality 'rnaa'.*Did you mean 'rna'"),
        ("dataset,url,label_from\na,b,protien\n", "label_from: .*Did you mean 'protein'"),
        ("dataset,modality,url\na,rna,b\na,atac,b\na,rna,b\n", "line 4 repeats line 2"),
        ("dataset,url\na:b,c\n", "line 2: dataset is 'a:b'"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused_with_its_line(tmp_path, text, match):
    refused(tmp_path, text, match)


def test_a_missing_table_and_a_file_that_is_no_table_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.csv does not exist"):
        read_atlas(str(tmp_path / "nowhere.csv"), KNOWN)
    (tmp_path / "a.h5ad").write_bytes(b"\x89HDF\r\n\x1a\n\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.h5ad is no CSV text.*dataset\.rna"):
        read_atlas(str(tmp_path / "a.h5ad"), KNOWN)


def test_a_single_data_set_needs_no_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rna, atac = from_dataset(DataSet(name="d", rna="r.h5ad", atac="a.h5ad", label="type", layer="raw"), KNOWN)
    assert (rna.modality, rna.url, rna.label, rna.layer) == ("rna", str(tmp_path / "r.h5ad"), "type", "raw")
    assert (atac.modality, atac.label, atac.layer) == ("atac", "type", "")
    (multi,) = from_dataset(DataSet(multi="m.h5mu"), KNOWN)
    assert (multi.dataset, multi.modality) == ("dataset", "")


def test_a_recipe_reads_either_a_table_or_a_data_set(tmp_path):
    path = table(tmp_path / "t.csv", {"dataset": "a", "url": "a.h5ad"})
    assert len(files(Recipe(atlas=path))) == 1
    assert len(files(override(Recipe(), {"dataset.rna": "x.h5ad"}))) == 1
    with pytest.raises(ValueError, match="both atlas="):
        files(override(Recipe(atlas=path), {"dataset.rna": "x.h5ad"}))
    with pytest.raises(ValueError, match="nothing to read: set atlas="):
        files(Recipe())
    with pytest.raises(ValueError, match="the data set has no file"):
        files(override(Recipe(), {"dataset.label": "x"}))


def test_the_whole_path_is_refused_without_rna_before_anything_is_read():
    with pytest.raises(ValueError, match=r"names atac and protein alone: add the RNA, .*=unimodal,joint"):
        with_rna(override(Recipe(), {"dataset.atac": "a.h5ad", "dataset.protein": "p.h5ad"}))
    with_rna(override(Recipe(), {"dataset.atac": "a.h5ad", "dataset.rna": "r.h5ad"}))
    with_rna(override(Recipe(), {"dataset.multi": "m.h5mu"}))
