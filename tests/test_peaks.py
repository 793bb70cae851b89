import gzip

import anndata
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellray.data import peaks
from cellray.data.intervals import chromosome
from cellray.data.peaks import NO_OVERLAP, REASONS, UNKNOWN_CHROMOSOME, peak_map

steady = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
INTERVAL = st.tuples(st.sampled_from("12X"), st.integers(0, 30), st.integers(1, 15))
"""Chromosome, start and length: close together, so that they overlap, nest and tie."""


def made(setting):
    found = peak_map(setting)
    assert found is not None
    return found


def bed(path, elements):
    path.write_text("".join(f"chr{c}\t{start}\t{start + size}\n" for c, start, size in elements))
    return str(path)


def names_of(intervals):
    return [f"{c}:{start}-{start + size}" for c, start, size in intervals]


def assigned(found):
    """The feature of each peak, None where it has none."""
    return [found.features[at] if at >= 0 else None for at in found.columns]


def slow_bin(c, start, end, size):
    """By counting the bases of the peak in every bin."""
    bases = [base // size for base in range(start, end)]
    best = min(set(bases), key=lambda number: (-bases.count(number), number))
    return f"human:chr{c}:{best * size}-{(best + 1) * size}"


def slow_element(c, start, end, elements):
    """By looking at every element."""
    shared = [
        (-(min(end, first + size) - max(start, first)), first, first + size)
        for chromosome, first, size in elements
        if chromosome == c and min(end, first + size) > max(start, first)
    ]
    return f"human:chr{c}:{min(shared)[1]}-{min(shared)[2]}" if shared else None


@steady
@given(intervals=st.lists(INTERVAL, min_size=1, max_size=30), size=st.integers(1, 12))
def test_a_peak_goes_to_the_bin_with_most_of_its_bases(intervals, size):
    found = peaks.Bins(size).assign(names_of(intervals), "human")
    assert assigned(found) == [slow_bin(c, start, start + length, size) for c, start, length in intervals]


@steady
@given(
    intervals=st.lists(INTERVAL, min_size=1, max_size=30),
    elements=st.lists(INTERVAL, min_size=1, max_size=30),
    pairs=st.sampled_from([1, 3, peaks.PAIRS]),
)
def test_a_peak_goes_to_the_element_that_a_search_of_all_finds(
    tmp_path, monkeypatch, intervals, elements, pairs
):
    monkeypatch.setattr(peaks, "PAIRS", pairs)
    expected = [slow_element(c, start, start + length, elements) for c, start, length in intervals]
    track = made(bed(tmp_path / "a.bed", elements))
    if not any(expected):
        with pytest.raises(ValueError, match="is in the vocabulary"):
            track.assign(names_of(intervals), "human")
        return
    found = track.assign(names_of(intervals), "human")
    assert assigned(found) == expected
    assert sorted(found.features) == sorted(set(expected) - {None})
    there = {c for c, _, _ in elements}
    for (c, _, _), feature, reason in zip(intervals, expected, found.reasons, strict=True):
        wanted = "mapped" if feature else "no_overlap" if c in there else "unknown_chromosome"
        assert REASONS[reason] == wanted


def test_many_wide_elements_over_many_peaks_agree_with_a_search_of_all(tmp_path):
    random = np.random.default_rng(3)
    elements = [
        ("1", int(s), int(n))
        for s, n in zip(random.integers(0, 9000, 400), random.zipf(1.3, 400) % 5000 + 1, strict=True)
    ]
    own = [
        ("1", int(s), int(n))
        for s, n in zip(random.integers(0, 12_000, 600), random.integers(1, 900, 600), strict=True)
    ]
    found = made(bed(tmp_path / "a.bed", elements)).assign(names_of(own), "human")
    assert assigned(found) == [slow_element(c, start, start + size, elements) for c, start, size in own]


def test_ties_go_to_the_lower_feature():
    assert assigned(peaks.Bins(100).assign(["chr1:50-150", "chr1:0-300", "chr1:99-300"], "human")) == [
        "human:chr1:0-100",
        "human:chr1:0-100",
        "human:chr1:100-200",
    ]


def test_bins_respect_chromosomes_and_species():
    names = ["chr1:10-20", "1:30-40", "chr2:10-20", "MT:1-2", "chrM:3-4"]
    human, mouse = (made("bins:5000").assign(names, species) for species in ("human", "mouse"))
    assert human.columns[0] == human.columns[1]
    assert human.columns[3] == human.columns[4]
    assert len(human.features) == 3
    assert not set(human.features) & set(mouse.features)


def test_counts_are_conserved():
    random = np.random.default_rng(0)
    names = [
        f"chr{c}:{s}-{s + 600}"
        for c, s in zip(random.integers(1, 4, 500), random.integers(0, 50_000, 500), strict=True)
    ]
    counts = random.integers(0, 9, 500)
    found = made("bins:5000").assign([*names, "GAPDH", "chr1:9-9"], "human")
    moved = np.bincount(found.columns[:500], counts, minlength=len(found.features))
    assert moved.sum() == counts.sum()
    assert len(found.features) < 40
    assert found.columns[500:].tolist() == [-1, -1]


def test_what_is_not_mapped_is_told_with_its_reason(tmp_path):
    track = made(bed(tmp_path / "a.bed", [("1", 100, 50), ("2", 100, 50)]))
    names = np.array(["chr1:90-110", "chr1:200-300", "chr9:1-9", "chr1:7-7", "GAPDH", "1:300-310"], object)
    found = track.assign(names, "human")
    assert found.summary(names) == {
        "peaks": 6,
        "mapped": 1,
        "features": 1,
        "unmapped": {"no_interval": 1, "empty_interval": 1, "unknown_chromosome": 1, "no_overlap": 2},
        "examples": {
            "no_interval": ["GAPDH"],
            "empty_interval": ["chr1:7-7"],
            "unknown_chromosome": ["chr9:1-9"],
            "no_overlap": ["chr1:200-300", "1:300-310"],
        },
    }
    assert found.reasons[1] == NO_OVERLAP
    assert found.reasons[2] == UNKNOWN_CHROMOSOME


def test_touching_is_no_overlap(tmp_path):
    track = made(bed(tmp_path / "a.bed", [("1", 100, 50)]))
    assert assigned(track.assign(["chr1:50-100", "chr1:150-200", "chr1:149-200"], "human")) == [
        None,
        None,
        "human:chr1:100-150",
    ]


def test_a_file_of_which_no_peak_is_known_is_refused_with_examples(tmp_path):
    track = made(bed(tmp_path / "a.bed", [("1", 100, 50)]))
    with pytest.raises(
        ValueError, match=r"none of 2 peaks .* 1 no interval, such as 'GAPDH'; 1 unknown chrom"
    ):
        track.assign(["GAPDH", "chr7:1-2"], "human")
    assert len(track.assign([], "human").features) == 0


def test_each_species_has_elements_of_its_own(tmp_path):
    human = bed(tmp_path / "human.bed", [("1", 100, 50)])
    mouse = bed(tmp_path / "mouse.bed", [("1", 200, 50)])
    both = made(f"human={human},mouse={mouse}")
    both.check(["human", "mouse"])
    names = ["chr1:110-120", "chr1:210-220"]
    assert assigned(both.assign(names, "human")) == ["human:chr1:100-150", None]
    assert assigned(both.assign(names, "mouse")) == [None, "mouse:chr1:200-250"]
    with pytest.raises(ValueError, match=r"peaks of rat, but ingest\.peaks has elements of human, mouse"):
        both.check(["rat"])
    one = made(human)
    one.check(["human", "human"])
    with pytest.raises(ValueError, match="human=URL,mouse=URL"):
        one.check(["human", "mouse"])
    with pytest.raises(ValueError, match="names human twice"):
        made(f"human={human},human={mouse}")


@pytest.mark.parametrize("species", ["", "human:2"])
def test_a_species_that_is_not_known_is_refused(tmp_path, species):
    for found in (made("bins:5000"), made(bed(tmp_path / "a.bed", [("1", 100, 50)]))):
        with pytest.raises(ValueError, match="only where their species is known"):
            found.check([species])
        with pytest.raises(ValueError, match="only where their species is known"):
            found.assign(["chr1:110-120"], species)


def test_no_setting_is_no_map():
    assert peak_map("") is None


@pytest.mark.parametrize(
    "setting", ["bins", "bins:", "bins:5k", "bins:0", "bins:-5", "bins:99", "bins:10000001"]
)
def test_a_bin_size_that_is_none_is_refused(setting):
    with pytest.raises(ValueError, match="write bins:SIZE"):
        made(setting)


def test_a_setting_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*none.bed"):
        made(str(tmp_path / "none.bed"))


def test_the_hash_follows_the_elements_and_not_how_they_are_written(tmp_path):
    elements = [("1", 100, 50), ("2", 5, 9), ("1", 100, 60)]
    first = made(bed(tmp_path / "a.bed", elements)).hash
    (tmp_path / "b.bed.gz").write_bytes(
        gzip.compress(b"#header\n2\t5\t14\tx\n1\t100\t160\ty\n1\t100\t150\tz\n1\t100\t150\tz\n")
    )
    assert made(str(tmp_path / "b.bed.gz")).hash == first
    others = {
        made(bed(tmp_path / "c.bed", elements[:2])).hash,
        made(bed(tmp_path / "d.bed", [*elements[:2], ("X", 100, 60)])).hash,
        made(f"human={tmp_path / 'a.bed'}").hash,
        made("bins:5000").hash,
        made("bins:1000").hash,
    }
    assert len(others | {first}) == 6
    assert made("bins:5000").hash == made("bins:5000").hash


def test_the_order_of_peaks_changes_no_feature(tmp_path):
    random = np.random.default_rng(1)
    own = [
        (str(c), int(s), 40)
        for c, s in zip(random.integers(1, 4, 200), random.integers(0, 3000, 200), strict=True)
    ]
    track = made(bed(tmp_path / "a.bed", own[::2]))
    order = random.permutation(200)
    names = np.array(names_of(own), object)
    straight, mixed = assigned(track.assign(names, "human")), assigned(track.assign(names[order], "human"))
    assert mixed == [straight[at] for at in order]


def test_real_peaks_fall_into_bins(shared_data):
    path = shared_data / "mop_snareseq" / "atac.h5ad"
    if not path.exists():
        pytest.skip(f"no file {path}")
    file = anndata.read_h5ad(path, backed="r")
    names = file.var_names.to_numpy()
    file.file.close()
    found = made("bins:5000").assign(names, "mouse")
    assert (found.columns >= 0).all()
    for name, feature in list(zip(names, assigned(found), strict=True))[::997]:
        contig, start, end = name.rsplit("_", 2)
        species, where, span = feature.split(":")
        first, last = map(int, span.split("-"))
        assert (species, where) == ("mouse", chromosome(contig))
        assert min(int(end), last) - max(int(start), first) >= (int(end) - int(start)) / 2
