import gzip
import itertools

import numpy as np
import pytest

from cellray.data.modalities import ATAC, RNA, normalise_names
from cellray.data.programmes import Groups, programmes, read_gmt, regions
from cellray.data.reading import open_source
from cellray.data.tokens import POOLED, Vocabulary


def vocabulary(modality, ids, symbols=None):
    ones = {POOLED: np.ones(len(ids), np.int64)}
    return Vocabulary(modality, tuple(ids), tuple(symbols or [""] * len(ids)), ones, ones, {POOLED: 9})


GENES = vocabulary(RNA, [f"ENSG{i:011d}" for i in range(8)], [f"G{i}" for i in range(8)])


def gmt(folder, text):
    path = folder / "sets.gmt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_gmt_file_is_a_set_a_line(tmp_path, pack):
    text = "\ufeffONE\thttps://a b\tG1\tG2\tG1\r\n\n  \nTWO\t\tG3\t\t\n"
    assert read_gmt(gmt(tmp_path, pack(text.encode()))) == {"ONE": ("G1", "G2"), "TWO": ("G3",)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no gene sets"),
        ("\n \n", "has no gene sets"),
        ("A\tb\tG1\n\nB\tabout it\n", r"line 3 is 'B\\tabout it', with 2 fields between tabs and 0 genes"),
        ("A\tb\tG1\nB\tabout\t\t \n", "line 2 .* with 4 fields between tabs and 0 genes"),
        ("A G1 G2\n", "line 1 is 'A G1 G2', with 1 fields"),
        ("\tb\tG1\n", "line 1"),
        ("A\tb\tG1\nC\tb\tG1\nA\tb\tG2\n", "line 3 is a set 'A', as is line 1"),
        (b"A\tb\t\xff\xfe\n", "is no .gmt file"),
        (gzip.compress(b"A\tb\tG1\n" * 99)[:-15], "damaged gzip"),
    ],
)
def test_what_is_no_gmt_file_is_refused_with_the_line(tmp_path, text, says):
    with pytest.raises(ValueError, match=says) as raised:
        read_gmt(gmt(tmp_path, text))
    assert "sets.gmt" in str(raised.value)


def test_a_gmt_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unimodal\.programmes: there is no file"):
        read_gmt(str(tmp_path / "none.gmt"))


def test_genes_are_found_by_symbol_or_id_and_counted(tmp_path):
    url = gmt(
        tmp_path, "A\t\tG1\tENSG00000000002.7\tG9\nB\t\tG3\nC\t\tG2\tG4\nALL\t\t" + "\t".join(GENES.ids)
    )
    found = programmes(url, GENES)
    assert found.names == ("A", "C")  # B has one gene, ALL is the cell
    assert np.split(found.members, found.offsets[1:-1])[0].tolist() == [1, 2]
    assert np.split(found.members, found.offsets[1:-1])[1].tolist() == [2, 4]
    assert "2 of 4 programmes are used, with 3 of 8 features" in found.note
    assert found.note.startswith("13 of the 14 genes of ")


def test_a_file_of_other_genes_is_refused_with_examples_of_both(tmp_path):
    with pytest.raises(
        ValueError, match=r"has 2 genes, such as x, y, of which 0 .* ENSG00000000000, .* G0, G1"
    ):
        programmes(gmt(tmp_path, "A\tb\tx\ty\n"), GENES)


def test_the_groups_of_a_feature_are_those_it_is_a_member_of():
    rng = np.random.default_rng(0)
    sets = {f"g{i}": rng.choice(30, rng.integers(0, 12), replace=False) for i in range(20)}
    groups = Groups.of(sets, 30)
    offsets, of = groups.by_feature
    for feature in range(30):
        wanted = [i for i, members in enumerate(sets.values()) if feature in members]
        assert of[offsets[feature] : offsets[feature + 1]].tolist() == wanted


@pytest.mark.parametrize("size", [2, 3, 7, 1000])
def test_regions_are_runs_of_neighbours_on_one_chromosome(size):
    rng = np.random.default_rng(size)
    places = [
        ("human", f"chr{c}", 100 * i) for c in (1, 2, 10, "X") for i in rng.permutation(rng.integers(1, 20))
    ]
    places += [("mouse", "chr1", 100 * i) for i in range(5)]
    names = [f"{s}:{c}:{start}-{start + 50}" for s, c, start in places]
    names = [*rng.permutation(names).tolist(), "nowhere"]
    groups = regions(vocabulary(ATAC, names), size)
    spelled = {f"{s}:{c}:{start}-{start + 50}": (s, c, start) for s, c, start in places}
    seen = []
    for first, last in itertools.pairwise(groups.offsets):
        own = sorted(spelled[names[i]] for i in groups.members[first:last])
        assert 1 <= len(own) <= size
        assert len({(s, c) for s, c, _ in own}) == 1
        between = [p for p in places if p[:2] == own[0][:2] and own[0][2] <= p[2] <= own[-1][2]]
        assert sorted(between) == own
        seen += own
    assert sorted(seen) == sorted(places)
    chromosomes = {(s, c): sum(p[:2] == (s, c) for p in places) for s, c, _ in places}
    assert len(groups) == sum(-(-n // size) for n in chromosomes.values())
    assert f"1 of {len(names)} features have no coordinates" in groups.note


def test_names_without_coordinates_are_refused():
    with pytest.raises(
        ValueError, match="2 features of atac have no coordinates in their names, such as a, b"
    ):
        regions(vocabulary(ATAC, ["a", "b"]), 8)


@pytest.mark.parametrize(
    ("file", "used", "says"),
    [
        ("hallmark_v7.0", 50, "1,361 of the 4,384 genes"),
        ("kegg_v7.5.1", 177, "1,181 of the 5,245 genes"),
        ("GO_Biological_Process_2021", 4729, "2,968 of the 14,937 genes"),
    ],
)
def test_real_programmes_are_found_in_a_real_vocabulary(shared_data, file, used, says):
    sets, cells = shared_data / "gene_function" / f"{file}.gmt", shared_data / "pbmc_cite_10x" / "rna.h5ad"
    if not sets.exists() or not cells.exists():
        pytest.skip(f"no file {sets} or {cells}")
    with open_source(str(cells)) as source:
        names = normalise_names(list(source.feature_names), "gene")
    found = programmes(str(sets), vocabulary(RNA, names))
    assert len(found) == used
    assert found.note.startswith(says)


def test_real_peaks_are_cut_into_regions_of_each_chromosome(shared_data):
    path = shared_data / "mop_snareseq" / "atac.h5ad"
    if not path.exists():
        pytest.skip(f"no file {path}")
    with open_source(str(path)) as source:
        names = normalise_names(list(source.feature_names), "peak")
    found = regions(vocabulary(ATAC, names), 32)
    assert "on 20 chromosomes; 0 of 25,734 features" in found.note
    contigs = np.array([name.partition(":")[0] for name in names])[found.members]
    assert all(len(set(part)) == 1 for part in np.split(contigs, found.offsets[1:-1]))
