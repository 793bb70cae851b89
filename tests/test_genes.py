import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data.gene_tables import read_genes
from cellray.data.genes import KINDS, UNRESOLVED, Genes, gene_id, genome
from tests.gene_tables import (
    CODING,
    HUMAN,
    M_MYC,
    M_ND1,
    M_ONLY,
    M_SAME,
    M_TP53,
    M_TWIN,
    MOUSE,
    MYC,
    ND1,
    NEW,
    OTHER_TWIN,
    POSITIONS,
    SPARE,
    TABLES,
    TP53,
    TWIN,
    folder,
    found,
)


@pytest.fixture(scope="module")
def genes(tmp_path_factory):
    return read_genes(folder(tmp_path_factory.mktemp("genes"), TABLES))


# Names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ENSG00000141510", ("ENSG00000141510", "human")),
        ("ENSG00000141510.18", ("ENSG00000141510", "human")),
        ("ENSG00000124333.16_PAR_Y", ("ENSG00000124333", "human")),
        ("ENSMUSG00000059552.1", ("ENSMUSG00000059552", "mouse")),
        ("ENSRNOG00000010756", ("ENSRNOG00000010756", "rat")),
        ("FBgn0000490", ("FBgn0000490", "fly")),
        ("ENSG00000141510.x", ("", "")),
        ("ENSG00000141510.", ("", "")),
        ("ENSG1", ("", "")),
        ("ENST00000269305", ("", "")),
        ("TP53", ("", "")),
        ("", ("", "")),
    ],
)
def test_a_gene_id_says_its_species(name, said):
    assert gene_id(name) == said


def test_a_genome_before_a_name_says_its_species():
    assert genome("mm10___Xkr4") == ("mouse", "Xkr4")
    assert genome("GRCh38_TP53") == ("human", "TP53")
    assert genome("Y_RNA") == ("", "Y_RNA")
    assert genome("hg19") == ("", "hg19")


@pytest.mark.parametrize(
    ("name", "second", "said"),
    [
        (TP53, "", (TP53, "TP53", "ensembl id")),
        (f"{TP53}.15", "", (TP53, "TP53", "versioned id")),
        (f" {TP53}_PAR_Y ", "", (TP53, "TP53", "versioned id")),
        ("ENSG00000000777", "", ("ENSG00000000777", "", "retired id")),
        ("ENSG00000000777.2", "MYC", ("ENSG00000000777", "MYC", "retired id")),
        ("TP53", "", (TP53, "TP53", "symbol")),
        ("P53", "", (TP53, "TP53", "alias")),
        ("ND1", "", (ND1, "MT-ND1", "alias")),
        ("tp53", "", (TP53, "TP53", "other case")),
        ("p53", "", (TP53, "TP53", "other case")),
        ("AC000001.1", "", (SPARE, "AC000001.1", "alias")),
        ("gene7", "MYC", (MYC, "MYC", "second name")),
        ("MYC", TP53, (TP53, "TP53", "second name")),
        ("TWIN", OTHER_TWIN, (OTHER_TWIN, "TWIN", "second name")),
        ("LOST", "ENSG00000000777.2", ("ENSG00000000777", "LOST", "retired id")),
        ("", "MYC", (MYC, "MYC", "second name")),
        ("HALF", "", (CODING, "HALF", "symbol")),
        ("OLD", "", ("ENSG00000000099", "OLD", "alias")),
        ("SAME", "", (NEW, "SAME", "symbol")),
        ("TWIN", "", ("TWIN", "", "ambiguous")),
        ("twin", "", ("twin", "", "ambiguous")),
        ("EGFP", "", ("EGFP", "", "unknown")),
        ("EGFP", "green", ("EGFP", "green", "unknown")),
        ("GRCh38_TP53", "", (TP53, "TP53", "symbol")),
        (f"GRCh38___{TP53}.1", "", (TP53, "TP53", "versioned id")),
        ("GRCh38_EGFP", "", ("EGFP", "", "unknown")),
        (M_TP53, "Trp53", (M_TP53, "Trp53", "other species")),
        ("mm10___Myc", "", ("mm10___Myc", "", "other species")),
        ("7157", "", ("7157", "", "unknown")),
        ("", "", ("unnamed", "", "unnamed")),
    ],
)
def test_a_name_of_the_reference_species_is_found_by_the_documented_rule(genes, name, second, said):
    columns = ["a", "b", "c", name]
    resolved = genes.resolve(columns, ["", "", "", second], "human")
    assert (resolved.ids[3], resolved.symbols[3], resolved.kinds[3]) == said
    assert said[2] in KINDS


@pytest.mark.parametrize(
    ("name", "second", "said"),
    [
        ("Trp53", "", (TP53, "TP53", "symbol")),
        (f"{M_TP53}.3", "Trp53", (TP53, "TP53", "versioned id")),
        ("Twin", "", (M_TWIN, "Twin", "symbol")),
        ("mt-Nd1", "", (M_ND1, "mt-Nd1", "symbol")),
        ("SAME", "", (M_SAME, "mouse:SAME", "symbol")),
        ("TP53", "", ("mouse:TP53", "", "unknown")),
        ("mouse:Xyz", "", ("mouse:Xyz", "", "unknown")),
        ("Xyz", "long", ("mouse:Xyz", "mouse:long", "unknown")),
        ("ENSMUSG00000000777", "TP53", ("ENSMUSG00000000777", "mouse:TP53", "retired id")),
        (TP53, "", (TP53, "TP53", "other species")),
        ("GRCh38_MYC", "", ("mouse:GRCh38_MYC", "", "other species")),
        ("", "", ("mouse:unnamed", "", "unnamed")),
    ],
)
def test_another_species_takes_the_ids_of_the_reference_and_marks_what_it_does_not_know(
    genes, name, second, said
):
    assert found(genes, name, second, "mouse") == said


def test_without_orthologs_human_is_the_reference_or_the_only_species_there_is(tmp_path):
    alone = read_genes(folder(tmp_path / "mouse", {"b.csv": MOUSE}))
    assert alone.reference == "mouse"
    assert found(alone, "Xyz", species="mouse") == ("Xyz", "", "unknown")
    both = read_genes(folder(tmp_path / "both", {"a.csv": HUMAN, "b.csv": MOUSE}))
    assert both.reference == "human"
    assert found(both, "Trp53", species="mouse") == (M_TP53, "Trp53", "symbol")
    assert found(both, "Xyz", species="mouse") == ("mouse:Xyz", "", "unknown")


def test_the_first_ortholog_column_is_the_reference(tmp_path):
    turned = "symbol_mouse,symbol_human\nTrp53,TP53\n"
    genes = read_genes(folder(tmp_path, {"a.csv": HUMAN, "b.csv": MOUSE, "d.csv": turned}))
    assert genes.reference == "mouse"
    assert found(genes, "TP53") == (M_TP53, "Trp53", "symbol")
    assert found(genes, "EGFP") == ("human:EGFP", "", "unknown")


def test_columns_of_synonyms_are_aliases_after_those_of_other_tables(tmp_path):
    rows = f"ensembl_id,symbol,aliases,prev_symbol\n{TP53},TP53,LFS1 | P53|MYC,-\n{MYC},MYC,,BHLH;MRTL\n"
    genes = read_genes(folder(tmp_path, {"a.csv": rows}))
    for name, gene in {"LFS1": TP53, "P53": TP53, "BHLH": MYC, "MRTL": MYC}.items():
        assert found(genes, name)[::2] == (gene, "alias")
    assert found(genes, "MYC")[::2] == (MYC, "symbol"), "a current symbol comes before an alias"
    assert found(genes, "-")[2] == "unknown"


def test_a_suffix_is_taken_off_only_if_the_base_is_a_gene_of_the_file_and_the_whole_is_none(genes):
    def kinds(*names):
        resolved = genes.resolve(names, [], "human")
        return list(zip(resolved.ids, resolved.kinds, strict=True))

    assert kinds("MYC", "MYC-1", "MYC.2") == [(MYC, "symbol"), (MYC, "suffixed"), (MYC, "suffixed")]
    assert kinds("MYC-1") == [("MYC-1", "unknown")]
    assert kinds("EGFP", "EGFP-1") == [("EGFP", "unknown"), ("EGFP-1", "unknown")]
    assert kinds("TWIN", "TWIN-1") == [("TWIN", "ambiguous"), ("TWIN-1", "unknown")]
    assert kinds("MT", "MT-ND1") == [("MT", "unknown"), (ND1, "symbol")]
    assert kinds("AC000001", "AC000001.1")[1] == (SPARE, "alias")
    assert kinds("TP", "TP53") == [("TP", "unknown"), (TP53, "symbol")]


def test_numbers_are_entrez_ids_only_where_most_names_are_numbers_but_not_row_numbers(genes):
    def kinds(*names):
        return genes.resolve(names, [], "human").kinds.tolist()

    assert kinds("7157", "4609", "EGFP") == ["entrez id", "entrez id", "unknown"]
    assert genes.resolve(["7157", "99991", "4609"], [], "human").ids.tolist() == [TP53, TP53, MYC]
    assert kinds("7157", "TP53", "MYC") == ["unknown", "symbol", "symbol"]
    assert kinds("7156", "7157", "7158") == ["unknown"] * 3
    assert genes.detect(["7157", "4609", "99991"]).species == "human"


def test_without_tables_the_files_own_ids_stand():
    resolved = Genes().resolve([f"{TP53}.3", MYC, "Xyz", "MYC-1", "", ""], ["TP53", MYC, "", "", "a", ""], "")
    assert resolved.ids.tolist() == [TP53, MYC, "Xyz", "MYC-1", "a", "unnamed"]
    assert resolved.symbols.tolist() == ["TP53", "", "", "", "", ""]
    assert resolved.summary()["kinds"] == {"ensembl id": 1, "versioned id": 1, "own name": 3, "unnamed": 1}
    assert Genes().resolve([], [], "").summary()["columns"] == 0


def test_a_species_with_an_id_prefix_needs_no_table_and_one_without_is_refused(genes):
    assert found(genes, "ENSRNOG00000010756.2", species="rat")[::2] == ("ENSRNOG00000010756", "versioned id")
    assert found(genes, "Tp53", species="rat") == ("rat:Tp53", "", "unknown")
    for species in ("", "hunam"):
        with pytest.raises(ValueError, match=f"no genes are known of the species '{species}'; write one of"):
            genes.resolve(["TP53"], [], species)


def test_the_summary_is_json_that_counts_every_column_and_names_what_is_unknown(genes):
    names = [TP53, "TP53", "P53", "zz", "aa", "TWIN", "ENSG00000000777", "Trp53", "mm10_Myc"]
    resolved = genes.resolve(names, [], "human")
    summary = resolved.summary()
    assert summary == json.loads(json.dumps(summary))
    assert summary == {
        "columns": 9,
        "resolved": 3 / 9,
        "duplicates": 2,
        "orthologs": 0,
        "kinds": {"ensembl id": 1, "symbol": 1, "alias": 1, "retired id": 1, "other species": 1}
        | {"ambiguous": 1, "unknown": 3},
        "examples": {
            "retired id": ["ENSG00000000777"],
            "other species": ["mm10_Myc"],
            "ambiguous": ["TWIN"],
            "unknown": ["Trp53", "aa", "zz"],
        },
    }
    assert genes.resolve(["Trp53", "Myc", "Twin"], [], "mouse").summary()["orthologs"] == 2


# Species


def test_a_species_is_known_by_its_symbols_in_their_own_capitals(genes):
    human = genes.detect(["TP53", "MYC", "HALF", "EGFP"])
    assert (human.species, human.verdict, dict(human.shares)) == ("human", "sure", {"human": 0.75})
    assert genes.detect(["Trp53", "Myc", "Twin", "EGFP"]).species == "mouse"
    assert genes.detect(["g1", "g2"], ["Trp53", "Myc"]).species == "mouse"


def test_a_species_is_known_by_id_prefixes_even_without_tables(genes):
    for tables in (genes, Genes()):
        assert tables.detect(["ENSG00000000777.1", "ENSG00000000778"]).species == "human"
        assert tables.detect(["ENSRNOG00000000777", "ENSRNOG00000000778"]).species == "rat"
        assert tables.detect(["a", "b"], ["ENSMUSG00000000777", "ENSMUSG00000000778.3"]).species == "mouse"
        assert tables.detect(["GRCh38_EGFP", "GRCh38_X"]).species == "human"
        assert tables.detect(["ENSRNOG00000000777"] * 30 + ["Myc"]).species == "rat"
        assert tables.detect([TP53] * 30 + ["Only"]).species == "human"


def test_several_species_in_bulk_are_mixed_however_they_are_told_apart(genes):
    for names in (
        [TP53, MYC, M_TP53, M_MYC],
        ["GRCh38_TP53", "GRCh38_MYC", "mm10___Trp53", "mm10___Myc"],
        ["hg19_A", "mm10_A"],
        ["TP53", "MYC", "Trp53", "Myc"],
        ["TP53"] * 18 + ["Trp53"],
        [TP53, M_TP53] + ["unknown"] * 10,
    ):
        said = genes.detect(names)
        assert (said.species, said.verdict) == ("", "mixed"), names
        assert "human and mouse" in said.reason or "mouse and human" in said.reason
        assert set(said.shares) == {"human", "mouse"}
    assert genes.detect(["TP53"] * 30 + ["Trp53"]).species == "human"


def test_species_that_cannot_be_told_apart_are_ambiguous(genes, tmp_path):
    capitals = genes.detect(["TRP53", "MYC", "TP53", "ONLY"])
    assert (capitals.species, capitals.verdict) == ("", "ambiguous")
    assert "human as well as mouse without regard to capitals" in capitals.reason
    macaque = HUMAN.replace("ENSG", "ENSMMUG").replace("ENSMMUG00000000002,MYC", "ENSMMUG00000000002,MYCQ")
    apes = read_genes(folder(tmp_path, {"a.csv": HUMAN, "m.csv": macaque}))
    for names in (["TP53", "HALF", "SAME"], ["TP53"] * 20 + ["MYC"]):
        said = apes.detect(names)
        assert (said.species, said.verdict) == ("", "ambiguous")
    assert apes.detect(["ENSMMUG00000000001"]).species == "macaque"


def test_too_few_known_names_are_unknown(genes):
    for names in (["TP53", "x", "y"], ["tp53", "myc", "half"], ["x"], []):
        said = genes.detect(names)
        assert (said.species, said.verdict) == ("", "unknown")
        assert "too few names" in said.reason
    assert "no gene tables were given" in Genes().detect(["TP53"]).reason


# Mitochondrial genes


def test_mitochondrial_genes_are_known_by_chromosome_else_by_symbol(genes):
    names = [ND1, TP53, M_ND1, M_TP53, "MT-CO1", "mt-Co1", "mouse:mt-Xyz", "MTOR", "EGFP"]
    assert genes.mitochondrial(names).tolist() == [True, False, True, False, True, True, True, False, False]
    assert genes.mitochondrial([f"{ND1}.2", TP53], ["", "MT-CO1"]).tolist() == [True, False], (
        "chromosome first"
    )
    assert Genes().mitochondrial(["ENSG00000198888", "g"], ["MT-ND1", ""]).tolist() == [True, False]
    assert Genes().mitochondrial(["ENSG00000198888"]).tolist() == [False]


def test_mitochondrial_genes_stay_so_when_they_take_the_id_of_the_reference(tmp_path):
    pair = "symbol_human,symbol_mouse\nMT-ND1,mt-Nd1\n"
    genes = read_genes(folder(tmp_path, {"a.csv": HUMAN, "b.csv": MOUSE, "c.csv": POSITIONS, "d.csv": pair}))
    resolved = genes.resolve(["mt-Nd1", "Myc"], [], "mouse")
    assert resolved.ids[0] == ND1
    assert genes.mitochondrial(resolved.ids).tolist() == [True, False]


# Properties

TEXT = st.one_of(
    st.sampled_from(
        ["TP53", "P53", "tp53", "MYC", "MYC-1", "Myc.1", "TWIN", "Twin", "TWIN-1", "HALF", "OLD"]
    ),
    st.sampled_from(
        ["Trp53", "SAME", "Only", "MT-ND1", "mt-Nd1", "7157", "4609", "", " ", "ENSG1", "AC000001.1"]
    ),
    st.sampled_from([TP53, f"{MYC}.3", f"{TWIN}_PAR_Y", M_TP53, f"{M_ONLY}.1", "ENSG00000000777", M_SAME]),
    st.sampled_from(["ENSMUSG00000000777", "ENSRNOG00000000001", "mouse:Xyz", "human:Xyz", "mm10_mouse:Xyz"]),
    st.sampled_from(["mm10___Trp53", "GRCh38_TP53", "mouse:", "mm10_", "mouse:TP53", "GRCh38_mm10_MYC"]),
    st.text("AXx-.:_1", max_size=4),
)
COLUMNS = st.lists(st.tuples(TEXT, TEXT), max_size=12)
SETTINGS = settings(max_examples=80, deadline=None, derandomize=True)


@SETTINGS
@given(columns=COLUMNS, species=st.sampled_from(["human", "mouse", "rat"]), data=st.data())
def test_the_order_of_columns_does_not_matter(genes, columns, species, data):
    order = data.draw(st.permutations(range(len(columns))))
    names, second = [c[0] for c in columns], [c[1] for c in columns]
    first = genes.resolve(names, second, species)
    other = genes.resolve([names[i] for i in order], [second[i] for i in order], species)
    for one, two in ((first.ids, other.ids), (first.symbols, other.symbols), (first.kinds, other.kinds)):
        np.testing.assert_array_equal(one[order], two)
    assert first.summary() == other.summary()
    shuffled = genes.detect([names[i] for i in order], [second[i] for i in order])
    assert shuffled == genes.detect(names, second)


@SETTINGS
@given(columns=COLUMNS, species=st.sampled_from(["human", "mouse", "rat", ""]))
def test_every_column_has_an_id_and_resolving_twice_is_resolving_once(genes, columns, species):
    tables = genes if species else Genes()
    names, second = [c[0] for c in columns], [c[1] for c in columns]
    once = tables.resolve(names, second, species)
    assert all(once.ids)
    assert len(once.ids) == len(once.symbols) == len(once.kinds) == len(columns)
    assert sum(once.summary()["kinds"].values()) == len(columns)
    twice = tables.resolve(once.ids, once.symbols, species)
    np.testing.assert_array_equal(twice.ids, once.ids)
    np.testing.assert_array_equal(tables.resolve(once.ids, [], species).ids, once.ids)


@SETTINGS
@given(names=st.lists(TEXT, max_size=12), others=st.lists(TEXT, max_size=12))
def test_names_of_different_species_share_an_id_only_as_one_gene(genes, names, others):
    human, mouse = genes.resolve(names, [], "human"), genes.resolve(others, [], "mouse")
    marked = {gene for gene in human.ids if ":" in gene}
    for gene in set(human.ids) & set(mouse.ids) - marked:
        assert gene_id(gene)[1], f"{gene} is no gene id"
    shown = dict(zip(human.ids, human.symbols, strict=True))
    for gene, symbol, kind in zip(mouse.ids, mouse.symbols, mouse.kinds, strict=True):
        if symbol and kind not in UNRESOLVED:
            same = [other for other, text in shown.items() if text == symbol]
            assert same in ([], [gene]), "a symbol shown stands for one gene"
