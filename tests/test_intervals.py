import gzip

import numpy as np
import pytest

from cellray.data.intervals import EMPTY_INTERVAL, MAPPED, NO_INTERVAL, chromosome, intervals, read_bed

SPELLINGS = {
    "chr1:100-200": ("chr1", 100, 200),
    "chr1-100-200": ("chr1", 100, 200),
    "chr1_100_200": ("chr1", 100, 200),
    "1:100-200": ("chr1", 100, 200),
    "CHR1:0-1": ("chr1", 0, 1),
    "x_5_6": ("chrX", 5, 6),
    "MT:7-9": ("chrM", 7, 9),
    "chrM-7-9": ("chrM", 7, 9),
    "2L:3-4": ("chr2L", 3, 4),
    "GL000194.1:100-200": ("GL000194", 100, 200),
    "chrGL000194.1:100-200": ("GL000194", 100, 200),
    "chrUn_GL000194v1_100_200": ("GL000194", 100, 200),
    "chr14_GL000194v1_random-100-200": ("GL000194", 100, 200),
    "KI270728.1-100-200": ("KI270728", 100, 200),
    "chr16_KI270728v1_random:100-200": ("KI270728", 100, 200),
    "chr1_GL456210_random:1-2": ("GL456210", 1, 2),
    "HLA-A*01:01:01:01:100-200": ("chrHLA-A*01:01:01:01", 100, 200),
    "chr6_ctg9_hap1_10_20": ("chr6_ctg9_hap1", 10, 20),
}
NAMELESS = ["", "GAPDH", "chr1", "chr1:100", "chr1:-100-200", "chr1:1.5-2", "chr1:1-2:+", ":1-2", "chr 1:1-2"]


def test_peak_names_are_read_in_all_usual_spellings():
    found = intervals(list(SPELLINGS))
    got = [
        (found.chromosomes[code], int(start), int(end))
        for code, start, end in zip(found.codes, found.start, found.end, strict=True)
    ]
    assert got == list(SPELLINGS.values())
    assert len(found.chromosomes) == len(set(found.chromosomes))
    assert (found.reasons == MAPPED).all()


def test_names_that_are_no_interval_keep_their_place():
    names = [*NAMELESS, "chr1:5-9", "chr2:" + "9" * 13 + "-" + "9" * 14]
    found = intervals(np.array(names, object))
    assert found.reasons.tolist() == [NO_INTERVAL] * len(NAMELESS) + [MAPPED, NO_INTERVAL]
    assert (found.codes[found.reasons == NO_INTERVAL] == -1).all()
    assert (found.start[-2], found.end[-2]) == (5, 9)


def test_an_interval_without_a_base_is_told_from_a_name_that_is_none():
    found = intervals(np.array(["chr1:5-5", "chr1:9-5", "chr1:5-6"]))
    assert found.reasons.tolist() == [EMPTY_INTERVAL, EMPTY_INTERVAL, MAPPED]


def test_no_names_are_no_intervals():
    assert len(intervals([]).codes) == 0


def test_a_chromosome_of_the_assembled_genome_stays_apart_from_its_scaffolds():
    names = ["chr1", "chr10", "chr1_KI270706v1_random", "chrUn_KI270302v1", "chr"]
    assert len({chromosome(name) for name in names}) == len(names)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_bed_file_is_read_past_headers_blank_lines_and_further_columns(tmp_path, pack):
    text = (
        '\nbrowser position chr7:1-2\ntrack name="a b"\n#chrom\tstart\tend\n\n'
        "chr1\t10\t20\tname\t0\t+\r\n2\t0\t5\nNA\t7\t9\t#1\n\n"
    )
    path = tmp_path / "a.bed"
    path.write_bytes(pack(text.encode()))
    table = read_bed(str(path))
    rows = list(zip(table["contig"], table["start"], table["end"], strict=True))
    assert rows == [("chr1", 10, 20), ("2", 0, 5), ("NA", 7, 9)]
    assert set(table["contig"].cat.categories) == {"chr1", "2", "NA"}


def test_a_bed_file_may_have_spaces_for_tabs_and_bare_chromosome_numbers(tmp_path):
    path = tmp_path / "a.bed"
    path.write_text("1 10 20\n2  30 40\n")
    table = read_bed(str(path))
    assert list(zip(table["contig"], table["start"], table["end"], strict=True)) == [
        ("1", 10, 20),
        ("2", 30, 40),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no elements"),
        (b"\n\n", "no BED file"),
        (b"chr1 1 2\n\nchr1 1 b c\n", "line 3 is 'chr1 1 b c'"),
        (b"#chrom\tstart\tend\n", "no elements"),
        (b"chrom\tstart\tend\nchr1\t1\t2\n", "line 1 is 'chrom\\\\tstart"),
        (b"#a\nchr1\t1\t2\nchr1\t5\t5\n", "line 3 is 'chr1\\\\t5"),
        (b"chr1\t1\t2\n\nchr1\t-1\t5\n", "line 3"),
        (b"chr1\t1\t2\nchr1\t1.5\t5\n", "line 2"),
        (b"chr1\t1\t2\nchr1\n", "line 2"),
        (b"chr1\t1\t2\n\t5\t6\n", "line 2"),
        (b"chr1\t1\t2\nchr1\t5\t99999999999999\n", "line 2"),
        (b"chr1\t1\t2\nchr1\t5\t" + b"9" * 40 + b"\n", "line 2"),
        (bytes(range(128, 256)) * 9, "no BED file"),
        (gzip.compress(b"chr1\t1\t2\n" * 99)[:-20], "damaged gzip"),
        (b"\x1f\x8b" + b"\xff" * 99, "damaged gzip"),
    ],
)
def test_what_is_no_bed_file_is_refused_with_the_line(tmp_path, text, message):
    path = tmp_path / "a.bed"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_bed(str(path))
    assert str(path) in str(raised.value)


def test_a_bed_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        read_bed(str(tmp_path / "none.bed"))
    with pytest.raises(ValueError, match="there is no file"):
        read_bed(str(tmp_path))
