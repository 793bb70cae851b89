"""Peaks of any peak set -> one fixed genomic vocabulary, by overlap.

The vocabulary is either genome bins or a list of elements. A peak goes whole to the one feature
with which it shares the most bases, so what is counted is conserved; peaks that share none are
left out, with the reason. Coordinates are those of BED: counted from 0, the end not included.

A feature's name begins with its species, e.g. `human:chr1:5000-10000`: chr1 of two species never
meets. All peak sets of one species have to be on the same assembly; coordinates do not say which
one they are of, so peaks of an older assembly are to be lifted over first.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cellray.data.intervals import LONGEST, MAPPED, chromosome, intervals, read_bed

RULE = 1
"""Version of how a peak finds its feature; part of a map's hash."""
REASONS = ("mapped", "no_interval", "empty_interval", "unknown_chromosome", "no_overlap")
"""What becomes of a peak: its name is no interval, the interval has no base, no element lies on its
chromosome, or none overlaps it."""
UNKNOWN_CHROMOSOME, NO_OVERLAP = 3, 4

BINS = re.compile(r"bins:([0-9]+)")
NAMED = re.compile(r"([A-Za-z][A-Za-z0-9 _-]*)=(.+)")

SPAN = LONGEST
"""Chromosome number times SPAN plus position is a place in the genome."""
SMALLEST, LARGEST = 100, 10_000_000
"""Sizes a bin may have, in bases."""
PAIRS = 1 << 22
"""Pairs of a peak and an element that begins in it, looked at at a time."""


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """What the peaks of one file are in the vocabulary."""

    features: np.ndarray
    """Names of the features that some peak goes to, each once, str [features]."""
    columns: np.ndarray
    """Which of `features` each peak goes to, -1 for none, int32 [peaks]. Peaks may share one."""
    reasons: np.ndarray
    """Index into REASONS, uint8 [peaks]; 0 where the peak is mapped."""

    def summary(self, names: Sequence[str] | np.ndarray) -> dict[str, Any]:
        """Numbers of peaks and features, of unmapped peaks by reason, and up to three names of each."""
        found = np.bincount(self.reasons, minlength=len(REASONS))
        odd = [number for number in range(1, len(REASONS)) if found[number]]
        return {
            "peaks": len(self.reasons),
            "mapped": int(found[MAPPED]),
            "features": len(self.features),
            "unmapped": {REASONS[number]: int(found[number]) for number in odd},
            "examples": {
                REASONS[number]: [str(names[at]) for at in np.flatnonzero(self.reasons == number)[:3]]
                for number in odd
            },
        }


class PeakMap(Protocol):
    """A fixed genomic vocabulary."""

    hash: str
    """sha256 of all that decides where a peak goes: one map, one hash."""

    def check(self, species: Iterable[str]) -> None:
        """ValueError unless peaks of each of these species can be mapped, and told apart."""

    def assign(self, names: Sequence[str] | np.ndarray, species: str) -> Mapped:
        """The feature of each peak of one file. ValueError if no peak of it has one."""


def peak_map(setting: str) -> PeakMap | None:
    """The vocabulary of a setting; None for "", where peaks are matched by name.

    "bins:5000" is genome bins of 5,000 bases. All else is a BED file of elements: one URL if all
    peaks are of one species, or one a species as "human=URL,mouse=URL". A file whose path holds
    "=" can be written "./a=b.bed". ValueError for a setting that is neither, and for a BED file
    that is missing or damaged.
    """
    if not setting:
        return None
    if setting.split(":")[0] == "bins":
        found = BINS.fullmatch(setting)
        size = int(found[1]) if found else 0
        if not SMALLEST <= size <= LARGEST:
            raise ValueError(
                f"ingest.peaks is {setting!r}: write bins:SIZE with a size in bases from {SMALLEST:,} to "
                f"{LARGEST:,} without separators, e.g. bins:5000"
            )
        return Bins(size)
    return Elements(_beds(setting))


class Bins:
    """Bins of one size, from the first base of each chromosome; the last one is as long as the rest.

    The length of no chromosome is needed, and no bin holds bases of two.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.hash = _hash("bins", size)

    def check(self, species: Iterable[str]) -> None:
        for name in species:
            _check_species(name)

    def assign(self, names: Sequence[str] | np.ndarray, species: str) -> Mapped:
        """Of several bins a peak lies in, it goes to the one with most of it; ties to the lower."""
        _check_species(species)
        peaks = intervals(names)
        good = np.flatnonzero(peaks.reasons == MAPPED)
        start, end = peaks.start[good], peaks.end[good]
        edge = (start // self.size + 1) * self.size
        # A bin after the first two cannot hold more than the second, which the peak then fills.
        number = start // self.size + (np.minimum(end, edge + self.size) - edge > edge - start)
        keys, places = np.unique(peaks.codes[good] * SPAN + number * self.size, return_inverse=True)
        columns = np.full(len(peaks.codes), -1, np.int32)
        columns[good] = places
        features = _feature_names(species, peaks.chromosomes, keys, keys + self.size)
        return _mapped(names, Mapped(features=features, columns=columns, reasons=peaks.reasons))


class Elements:
    """The intervals of BED files, one a species. They may overlap each other, and repeat."""

    def __init__(self, beds: dict[str, str]) -> None:
        """`beds` is species -> URL; the species "" alone stands for whichever the peaks are of."""
        self._tracks = {species: _track(beds[species]) for species in sorted(beds)}
        self.hash = _hash("elements", {name: track.hash() for name, track in self._tracks.items()})

    def check(self, species: Iterable[str]) -> None:
        wanted = sorted(set(species))
        for name in wanted:
            self._of(name)
        if len(wanted) > 1 and "" in self._tracks:
            raise ValueError(
                f"there are peaks of {' and '.join(wanted)}, but ingest.peaks is one BED file: give one a "
                "species, as " + ",".join(f"{name}=URL" for name in wanted)
            )

    def assign(self, names: Sequence[str] | np.ndarray, species: str) -> Mapped:
        """Of several elements that overlap a peak, it goes to the one with most of it.

        Ties go to the element that starts, then the one that ends lower. Takes time in the
        logarithm of the elements for each peak, and in the elements that start within it.
        """
        track = self._of(species)
        peaks = intervals(names)
        columns = np.full(len(peaks.codes), -1, np.int32)
        number = {name: i for i, name in enumerate(track.chromosomes)}
        translate = np.array([number.get(name, -1) for name in peaks.chromosomes] or [-1], np.int64)
        codes = translate[peaks.codes]
        reasons = peaks.reasons.copy()
        reasons[(reasons == MAPPED) & (codes < 0)] = UNKNOWN_CHROMOSOME
        good = np.flatnonzero(reasons == MAPPED)
        good = good[np.lexsort((peaks.start[good], codes[good]))]  # searching in order is six times faster
        base = codes[good] * SPAN
        best = track.best(base + peaks.start[good], base + peaks.end[good])
        reasons[good[best < 0]] = NO_OVERLAP
        used, places = np.unique(best[best >= 0], return_inverse=True)
        columns[good[best >= 0]] = places
        features = _feature_names(species, track.chromosomes, track.starts[used], track.ends[used])
        return _mapped(names, Mapped(features=features, columns=columns, reasons=reasons))

    def _of(self, species: str) -> "_Track":
        _check_species(species)
        track = self._tracks.get("") or self._tracks.get(species)
        if track is None:
            raise ValueError(
                f"there are peaks of {species}, but ingest.peaks has elements of "
                f"{', '.join(self._tracks)} only: add {species}=URL"
            )
        return track


@dataclass(frozen=True, kw_only=True)
class _Track:
    """Elements of one species, each once, by start and then by end. Arrays are [elements]."""

    chromosomes: Sequence[str]
    """Sorted."""
    starts: np.ndarray
    """Place of the first base, int64: the number of the chromosome times SPAN, plus the position."""
    ends: np.ndarray
    """Place after the last base, int64."""
    reach: np.ndarray
    """The largest end of this and all elements before, int64: it only rises, so it can be searched."""

    def hash(self) -> str:
        digest = hashlib.sha256(json.dumps(list(self.chromosomes)).encode())
        digest.update(self.starts.astype("<i8").tobytes())
        digest.update(self.ends.astype("<i8").tobytes())
        return digest.hexdigest()

    def best(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """The element that shares most bases with each interval of places, -1 for none, int64 [intervals].

        Of the elements that start at or before the interval, the best is the first that reaches as
        far as any of them does, or to the interval's end. Those that start within are compared.
        """
        upto = np.searchsorted(self.starts, start, side="right")
        furthest = np.where(upto > 0, self.reach[upto - 1], -1)
        furthest = np.minimum(furthest, end)
        shared = np.maximum(furthest - start, 0)
        found = np.where(shared > 0, np.searchsorted(self.reach, furthest, side="left"), -1)
        within = np.searchsorted(self.starts, end, side="left") - upto
        within[shared == end - start] = 0
        rows = np.flatnonzero(within)
        cuts = np.flatnonzero(np.diff(np.cumsum(within[rows]) // PAIRS)) + 1
        for part in np.split(rows, cuts) if len(rows) else []:
            more, winner = self._within(upto[part], within[part], end[part])
            better = more > shared[part]
            found[part[better]] = winner[better]
        return found

    def _within(self, first: np.ndarray, sizes: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Most bases shared by one of `sizes` elements from `first`, which start within, and that element."""
        begin = np.cumsum(sizes) - sizes
        owner = np.repeat(np.arange(len(sizes)), sizes)
        element = np.arange(len(owner)) - (begin - first)[owner]
        shared = np.minimum(self.ends[element], end[owner]) - self.starts[element]
        most = np.maximum.reduceat(shared, begin)
        top = np.flatnonzero(shared == most[owner])
        return most, element[top[np.unique(owner[top], return_index=True)[1]]]


def _beds(setting: str) -> dict[str, str]:
    """Species -> URL; the species is "" where the setting is one URL."""
    if not NAMED.fullmatch(setting):
        return {"": setting}
    beds: dict[str, str] = {}
    for part in re.split(r",(?=[A-Za-z][A-Za-z0-9 _-]*=)", setting):
        found = NAMED.fullmatch(part)
        assert found is not None
        if found[1] in beds:
            raise ValueError(f"ingest.peaks names {found[1]} twice: give one BED file a species")
        beds[found[1]] = found[2]
    return beds


def _track(url: str) -> _Track:
    """The elements of a BED file. ValueError, naming file and line, for what is no interval."""
    table = read_bed(url)
    contigs = [chromosome(name) for name in table["contig"].cat.categories]
    chromosomes = sorted(set(contigs))
    number = {name: i for i, name in enumerate(chromosomes)}
    codes = np.array([number[name] for name in contigs], np.int64)[table["contig"].cat.codes.to_numpy()]
    starts = codes * SPAN + table["start"].to_numpy(np.int64)
    ends = codes * SPAN + table["end"].to_numpy(np.int64)
    order = np.lexsort((ends, starts))
    starts, ends = starts[order], ends[order]
    fresh = np.ones(len(starts), bool)
    fresh[1:] = (np.diff(starts) > 0) | (np.diff(ends) > 0)
    starts, ends = starts[fresh], ends[fresh]
    return _Track(chromosomes=chromosomes, starts=starts, ends=ends, reach=np.maximum.accumulate(ends))


def _hash(kind: str, content: object) -> str:
    return hashlib.sha256(json.dumps([RULE, kind, content], sort_keys=True).encode()).hexdigest()


def _feature_names(
    species: str, chromosomes: Sequence[str], starts: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """`species:chromosome:start-end` for places in the genome, str [features]."""
    codes = (starts // SPAN).tolist()
    first, last = (starts % SPAN).tolist(), (ends % SPAN).tolist()
    names = [
        f"{species}:{chromosomes[code]}:{start}-{end}"
        for code, start, end in zip(codes, first, last, strict=True)
    ]
    return np.array(names, dtype=object)


def _check_species(species: str) -> None:
    if not species or ":" in species:
        raise ValueError(
            f"peaks can be mapped only where their species is known, but it is {species!r}: "
            "set the species of the data set, e.g. =human"
        )


def _mapped(names: Sequence[str] | np.ndarray, found: Mapped) -> Mapped:
    if len(found.reasons) and not len(found.features):
        about = found.summary(names)
        why = "; ".join(
            f"{count:,} {reason.replace('_', ' ')}, such as {about['examples'][reason][0]!r}"
            for reason, count in about["unmapped"].items()
        )
        raise ValueError(
            f"none of {len(found.reasons):,} peaks is in the vocabulary of ingest.peaks: {why}. Peaks are "
            "named like chr1:100-200, and are of the same species and assembly as the elements."
        )
    return found
