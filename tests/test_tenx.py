import h5py
import numpy as np
import pytest
import scanpy
import scipy.sparse as sp

from cellray.data.formats import opened
from cellray.data.reading import modality_keys, open_source

KINDS = ["Gene Expression"] * 6 + ["Antibody Capture"] * 2 + ["Peaks"] * 3
IDS = [f"ENSG{i:011d}" for i in range(6)] + ["CD3_TotalSeqB", "CD4_TotalSeqB"]
IDS += [f"chr1:{i}00-{i}99" for i in (1, 2, 3)]
NAMES = [f"G{i}" for i in range(6)] + ["CD3", "CD4"] + IDS[-3:]
PLACES = {"rna": slice(0, 6), "protein": slice(6, 8), "atac": slice(8, 11)}


def counts(cells=9, features=11, empty=()):
    found = np.random.default_rng(3).poisson(0.8, (cells, features))
    found[list(empty)] = 0
    return found


def store(group, matrix, barcodes, **options):
    """What both versions of the format have: features x cells by columns."""
    columns = sp.csr_matrix(matrix)
    group.create_dataset("barcodes", data=np.array(barcodes, "S"), **options)
    group.create_dataset("data", data=columns.data.astype(np.int32), **options)
    group.create_dataset("indices", data=columns.indices.astype(np.int64), **options)
    group.create_dataset("indptr", data=columns.indptr.astype(np.int64), **options)
    group.create_dataset("shape", data=np.array(matrix.shape[::-1], np.int32))


def version3(path, matrix, *, kinds=KINDS, ids=IDS, names=NAMES, genomes=("GRCh38",) * 11):
    barcodes = [f"AAAC{i:04d}-1" for i in range(len(matrix))]
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        store(group, matrix, barcodes, compression="gzip", shuffle=True)
        features = group.create_group("features")
        for name, values in {"id": ids, "name": names, "feature_type": kinds, "genome": genomes}.items():
            features[name] = np.array(values, "S")
        features["_all_tag_keys"] = np.array(["genome"], "S")
    return str(path), barcodes


def version2(path, matrices):
    with h5py.File(path, "w") as file:
        for genome, matrix in matrices.items():
            group = file.create_group(genome)
            store(group, matrix, [f"AAAC{i:04d}-1" for i in range(len(matrix))])
            group["genes"] = np.array(IDS[: matrix.shape[1]], "S")
            group["gene_names"] = np.array(NAMES[: matrix.shape[1]], "S")
    return str(path)


def read(path, **settings):
    with open_source(path, **settings) as source:
        return source.feature_names, source.cell_names, source.rows(0, 9)


def test_each_kind_of_features_is_a_modality_and_equals_what_scanpy_reads(tmp_path):
    path, barcodes = version3(tmp_path / "filtered_feature_bc_matrix.h5", counts())
    with opened(path) as root:
        assert modality_keys(root) == ["rna", "protein", "atac"]
    whole = scanpy.read_10x_h5(path, gex_only=False)
    for modality, place in PLACES.items():
        with open_source(path, modality=modality) as source:
            assert list(source.cell_names) == barcodes == list(whole.obs_names)
            assert list(source.feature_names) == IDS[place] == list(whole.var.gene_ids[place])
            same = [a == b for a, b in zip(IDS[place], NAMES[place], strict=True)]
            assert list(source.symbols) == ["" if s else n for s, n in zip(same, NAMES[place], strict=True)]
            assert source.genomes == ("GRCh38",)
            assert not source.obs_columns
            assert not source.by_column
            for start, stop in ((0, 9), (2, 2), (3, 8)):
                rows = source.rows(start, stop)
                assert rows.dtype == np.uint32
                np.testing.assert_array_equal(rows.toarray(), whole.X[start:stop, place].toarray())


def test_aliases_of_modalities_hold_and_the_only_one_needs_no_name(tmp_path):
    path, _ = version3(tmp_path / "a.h5", counts())
    with open_source(path, modality="gex") as source:
        assert source.shape == (9, 6)
    with pytest.raises(
        ValueError, match="several modalities, and none was named: it holds rna, protein, atac"
    ):
        open_source(path).__enter__()
    with pytest.raises(ValueError, match=r"a\.h5: it has no modality 'spatial'"):
        open_source(path, modality="spatial").__enter__()
    only, _ = version3(tmp_path / "b.h5", counts(), kinds=["Gene Expression"] * 11)
    with open_source(only) as source:
        assert source.shape == (9, 11)


def test_other_kinds_of_features_are_named_not_dropped(tmp_path):
    kinds = [*KINDS[:-3], *["Multiplexing Capture"] * 3]
    path, _ = version3(tmp_path / "a.h5", counts(), kinds=kinds)
    with opened(path) as root:
        assert modality_keys(root) == ["rna", "protein", "multiplexing_capture"]


def test_droplets_without_a_count_are_cells_without_a_count(tmp_path):
    matrix = counts(40, empty=range(0, 40, 3))
    path, barcodes = version3(tmp_path / "raw_feature_bc_matrix.h5", matrix)
    with open_source(path, modality="rna") as source:
        assert list(source.cell_names) == barcodes
        np.testing.assert_array_equal(source.rows(0, 40).toarray(), matrix[:, :6])
    assert scanpy.read_10x_h5(path).shape == (40, 6)


def test_two_genomes_are_told(tmp_path):
    ids = [f"GRCh38_{i}" if n < 3 else f"mm10___{i}" for n, i in enumerate(IDS)]
    genomes = ["GRCh38"] * 3 + ["mm10"] * 8
    path, _ = version3(tmp_path / "barnyard.h5", counts(), ids=ids, genomes=genomes)
    with open_source(path, modality="rna") as source:
        assert source.genomes == ("GRCh38", "mm10")
        assert list(source.feature_names) == ids[:6]
    with open_source(path, modality="protein") as source:
        assert source.genomes == ("mm10",)


def test_symbols_can_be_the_ids(tmp_path):
    path, _ = version3(tmp_path / "a.h5", counts())
    with open_source(path, modality="rna", names="name") as source:
        assert list(source.feature_names) == NAMES[:6]
        assert list(source.symbols) == IDS[:6]
    with pytest.raises(ValueError, match="no feature names 'ensembl'; it has id, name"):
        open_source(path, modality="rna", names="ensembl").__enter__()
    with pytest.raises(ValueError, match="has no layers"):
        open_source(path, modality="rna", layer="raw").__enter__()
    with open_source(path, modality="rna") as source, pytest.raises(ValueError, match="no column 'donor'"):
        source.obs(["donor"])


def test_files_from_before_version_3_have_one_genome(tmp_path):
    path = version2(tmp_path / "a.h5", {"hg19": counts(features=6)})
    with open_source(path, modality="rna") as source:
        assert source.genomes == ("hg19",)
        assert list(source.feature_names) == IDS[:6]
        assert list(source.symbols) == NAMES[:6]
        np.testing.assert_array_equal(source.rows(1, 9).toarray(), counts(features=6)[1:])
    whole = scanpy.read_10x_h5(path)
    np.testing.assert_array_equal(whole.X.toarray(), counts(features=6))
    both = version2(tmp_path / "b.h5", {"hg19": counts(features=6), "mm10": counts(features=6)})
    with pytest.raises(ValueError, match=r"b\.h5: it holds matrices of 2 genomes, hg19, mm10"):
        open_source(both).__enter__()


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("matrix/indptr", np.zeros(4, np.int64), "indptr has 4 entries, 10 were expected"),
        ("matrix/shape", np.array([11, 8]), "indptr has 10 entries, 9 were expected"),
        ("matrix/shape", np.array([11, -1]), "the shape is"),
        ("matrix/shape", np.array([11.0, 9.0]), "the shape is"),
        ("matrix/features/feature_type", np.array(["Peaks"], "S"), "1 entries for 11 features"),
        ("matrix/features/id", np.array(["A"] * 10, "S"), "10 entries for 11 features"),
        ("matrix/features/id", np.arange(11), "no list of names"),
        ("matrix/barcodes", np.array(["A"] * 9, "S"), "occur more than once"),
        ("matrix/barcodes", np.array(["A", "B"], "S"), "there are 2 cell names"),
        ("matrix/indices", np.full(3, 10**12), "indices"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, name, values, match):
    path, _ = version3(tmp_path / "a.h5", counts())
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = values
    with pytest.raises(ValueError, match=match) as error:
        read(path, modality="rna")
    assert path in str(error.value)


def test_molecules_are_refused_with_the_file_to_give_instead(tmp_path):
    with h5py.File(tmp_path / "molecule_info.h5", "w") as file:
        file["umi"], file["barcodes"] = [1], [b"A"]
    with pytest.raises(ValueError, match="give filtered_feature_bc_matrix"):
        open_source(str(tmp_path / "molecule_info.h5")).__enter__()
