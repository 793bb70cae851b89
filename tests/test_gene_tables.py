import gzip
import json
import pickle

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data.gene_tables import read_genes
from cellray.data.genes import Genes
from tests.gene_tables import (
    HUMAN,
    M_MYC,
    M_TP53,
    MOUSE,
    MYC,
    NEW,
    ORTHOLOGS,
    POSITIONS,
    TABLES,
    TP53,
    TWIN,
    folder,
    found,
)


@pytest.fixture(scope="module")
def genes(tmp_path_factory):
    return read_genes(folder(tmp_path_factory.mktemp("genes"), TABLES))


def test_tables_are_known_by_their_columns_not_by_their_names(genes, tmp_path):
    other = folder(
        tmp_path, {"z.tsv": HUMAN.replace(",", "\t"), "y.txt.gz": MOUSE, "x.csv": ORTHOLOGS, "README.md": "#"}
    )
    again = read_genes(other)
    assert again.tables["mouse"] == genes.tables["mouse"]
    assert again.orthologs == genes.orthologs == {M_TP53: TP53, M_MYC: MYC}
    assert again.about["tables"][-1] == {
        "file": "x.csv",
        "orthologs": {"pairs": 6, "not one to one": 2, "unknown symbols": 2, "used": 2},
    }
    assert again.about["tables"][1] == {"file": "z.tsv", "genes": {"human": 9}}, "the spike-in is no gene"


def test_one_table_may_hold_several_species(genes, tmp_path):
    both = HUMAN + MOUSE.split("\n", 1)[1]
    again = read_genes(folder(tmp_path, {"all.csv": both, "c.csv": POSITIONS, "d.csv": ORTHOLOGS}))
    assert again.tables == genes.tables
    assert again.orthologs == genes.orthologs


def test_the_hash_is_of_the_content(genes, tmp_path):
    assert read_genes(folder(tmp_path / "same", {**TABLES, "about.md": "text"})).hash == genes.hash
    packed = {f"{name}.gz": text for name, text in TABLES.items()}
    assert read_genes(folder(tmp_path / "packed", packed)).hash == genes.hash
    other = read_genes(folder(tmp_path / "other", {**TABLES, "b.csv": MOUSE.replace("Only", "Lone")}))
    assert other.hash != genes.hash
    assert len(genes.hash) == 64
    assert Genes().hash == ""


def test_tables_are_read_at_any_url_and_travel_to_workers(genes):
    fs = fsspec.filesystem("memory")
    for name, text in TABLES.items():
        fs.pipe_file(f"/gene_tables_test/{name}", text.encode())
    try:
        away = read_genes("memory://gene_tables_test")
    finally:
        fs.rm("/gene_tables_test", recursive=True)
    assert away == genes == pickle.loads(pickle.dumps(away))  # noqa: S301
    assert json.loads(json.dumps(genes.about)) == genes.about


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({}, "no gene tables, which end in .csv"),
        ({"README.md": "#"}, "it has README.md"),
        (
            {"a.csv": "chromosome,length\n1,2\n"},
            "a.csv is no gene table: it has the columns chromosome,length",
        ),
        ({"a.csv": "ensembl_id,name\nENSG00000000001,A\n"}, "a.csv is no gene table"),
        ({"a.csv": "a.gff\nno table\n"}, "a.csv is no gene table"),
        ({"a.csv": "symbol_human,one_to_one\nA,True\n"}, "a.csv is no gene table"),
        ({"a.csv": "ensembl_id,symbol\n"}, "a.csv has no rows"),
        ({"a.csv": ""}, "a.csv cannot be read as a table"),
        ({"a.csv": 'ensembl_id,symbol\n"ENSG00000000001,A\n'}, "a.csv cannot be read as a table"),
        ({"a.csv": "ensembl_id,symbol\nAT1G01010,NAC001\n"}, "no gene ids of a known species but AT1G01010"),
        ({"a.csv": HUMAN, "d.csv": ORTHOLOGS}, "d.csv has orthologs of mouse, but there is no table"),
        ({"d.csv": ORTHOLOGS}, "there are those of none"),
        (
            {**TABLES, "e.csv": "symbol_mouse,symbol_human\nTrp53,TP53\n"},
            "e.csv begins with mouse, other orthologs with human",
        ),
        ({**TABLES, "e.csv": ORTHOLOGS}, "another table has too: ENSMUSG"),
    ],
)
def test_what_is_no_table_is_refused_by_name(tmp_path, tables, said):
    with pytest.raises(ValueError, match="(?s)" + said.replace(".", r"\.").replace("(", r"\(")):
        read_genes(folder(tmp_path, tables))


def test_damaged_tables_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder of gene tables at"):
        read_genes(str(tmp_path / "nowhere"))
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(HUMAN.encode())[:-20])
    with pytest.raises(ValueError, match=r"cut\.csv\.gz cannot be read"):
        read_genes(str(tmp_path))
    (tmp_path / "cut.csv.gz").write_bytes("ensembl_id,symbol\nENSG00000000001,é\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"cut\.csv\.gz cannot be read"):
        read_genes(str(tmp_path))


def test_a_pair_is_an_ortholog_only_if_both_sides_occur_once_whatever_the_table_says(tmp_path):
    def orthologs(*rows, head="symbol_human,symbol_mouse,one_to_one"):
        tables = {"a.csv": HUMAN, "b.csv": MOUSE, "c.csv": POSITIONS, "d.csv": "\n".join([head, *rows, ""])}
        return read_genes(folder(tmp_path, tables)).orthologs

    assert orthologs("TP53,Trp53,True") == {M_TP53: TP53}
    assert orthologs("TP53,Trp53", head="symbol_human,symbol_mouse") == {M_TP53: TP53}
    assert orthologs("TP53,Trp53,True", "TP53,Trp53,True") == {M_TP53: TP53}
    assert orthologs("TP53,Trp53,False") == {}
    assert orthologs("TP53,Trp53,True", "TP53,Trp53,False") == {}
    assert orthologs("TP53,Trp53,True", "TP53,Myc,True") == {}
    assert orthologs("TP53,Trp53,True", "MYC,Trp53,False") == {}
    assert orthologs("TP53,Trp53,True", "P53,Myc,True") == {}, "two symbols of one gene"
    assert orthologs("P53,Trp53,True") == {M_TP53: TP53}, "an alias serves"
    assert orthologs("TWIN,Twin,True") == {}, "a symbol of two genes"


def choose(rows, name):
    """The documented rule, gene by gene; rows are (symbol, id, level, coding, primary, numbered)."""
    level = min((row[2] for row in rows if row[0] == name), default=None)
    if level is None:
        return None
    left = {row[1] for row in rows if row[0] == name and row[2] == level}
    first = {row[1] for row in rows if row[2] == 0}
    for place in (None, 3, 4, 5):
        better = first if place is None else {row[1] for row in rows if row[place]}
        left = left & better or left
    return left.pop() if len(left) == 1 else ""


ROW = st.tuples(
    st.sampled_from("ABC"),
    st.sampled_from([TP53, MYC, TWIN, NEW]),
    st.sampled_from([0, 1]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows=st.lists(ROW, min_size=1, max_size=10))
def test_a_symbol_of_several_genes_is_chosen_as_a_plain_loop_over_the_rule_does(tmp_path_factory, rows):
    rows = [(*row[:4], row[4] and row[2] == 1, row[5] and row[2] == 1) for row in rows]
    rows.append(("Z", TP53, 0, False, False, False))  # so that there is a first table
    tables = {0: ["ensembl_id,symbol,biotype"], 1: ["ensgene,symbol,biotype,chr,entrez"]}
    for symbol, gene, level, coding, primary, numbered in rows:
        line = f"{gene},{symbol},{'protein_coding' if coding else 'lncRNA'}"
        place = f",{'chr7' if primary else 'KI270733.1'},{'12.0' if numbered else ''}"
        tables[level].append(line + place * level)
    texts = {f"{level}.csv": "\n".join(lines) + "\n" for level, lines in tables.items() if len(lines) > 1}
    genes = read_genes(folder(tmp_path_factory.mktemp("rule"), texts))
    for name in "ABC":
        expected = choose(rows, name)
        gene, _, kind = found(genes, name)
        assert gene == (expected or name)
        assert (kind in ("unknown", "ambiguous")) == (not expected)
        assert (kind == "unknown") == (expected is None)
