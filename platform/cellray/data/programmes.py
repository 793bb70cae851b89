"""Groups of features: gene programmes from a .gmt file, regions of neighbouring peaks from their names.

A programme is any set of genes: a pathway, the targets of a transcription factor, a marker list.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cellray.data.intervals import MAPPED, intervals
from cellray.data.modalities import normalise_names
from cellray.data.plain import read_plain
from cellray.data.tokens import Vocabulary

MOST = 1 << 28
"""Bytes a .gmt file may have, unpacked."""
LEAST = 2
"""Known genes a programme needs: fewer are not hidden together."""
LARGEST = 0.5
"""Share of the vocabulary above which a programme is none: to hide it would be to hide the cell."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Sets of features of one vocabulary, which may overlap and need not hold every feature."""

    names: tuple[str, ...]
    offsets: np.ndarray
    """int64 [groups + 1]; group g owns `members[offsets[g]:offsets[g + 1]]`."""
    members: np.ndarray
    """Feature indices, each once in a group, int64 [memberships]."""
    features: int
    """Size of the vocabulary."""
    note: str = ""
    """What was found, for who started the run."""

    @classmethod
    def of(cls, groups: Mapping[str, Sequence[int] | np.ndarray], features: int, note: str = "") -> "Groups":
        """`groups`: name -> features."""
        parts = [np.unique(np.asarray(members, np.int64)) for members in groups.values()]
        offsets = np.cumsum([0, *(len(part) for part in parts)])
        members = np.concatenate([np.empty(0, np.int64), *parts])
        return cls(names=tuple(groups), offsets=offsets, members=members, features=features, note=note)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def by_feature(self) -> tuple[np.ndarray, np.ndarray]:
        """Offsets, int64 [features + 1], and the groups of each feature, int64 [memberships], rising."""
        group = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        sizes = np.bincount(self.members, minlength=self.features)
        order = np.argsort(self.members, kind="stable")
        return np.concatenate([[0], np.cumsum(sizes)]), group[order]


def programmes(url: str, vocabulary: Vocabulary) -> Groups:
    """The programmes of a .gmt file as sets of features of `vocabulary`, found by id or by symbol.

    A programme of which fewer than LEAST genes are known is left out, and so is one that holds more
    than LARGEST of the vocabulary. ValueError, with examples, where none is left.
    """
    sets = read_gmt(url)
    genes = list(dict.fromkeys(gene for members in sets.values() for gene in members))
    spelled = normalise_names(genes, vocabulary.modality.features)
    at = {
        gene: vocabulary.index[name]
        for gene, name in zip(genes, spelled, strict=True)
        if name in vocabulary.index
    }
    found = {name: sorted({at[gene] for gene in members if gene in at}) for name, members in sets.items()}
    most = LARGEST * len(vocabulary)
    kept = {name: members for name, members in found.items() if LEAST <= len(members) <= most}
    if not kept:
        raise ValueError(
            f"{url} has {len(genes):,} genes, such as {', '.join(genes[:3])}, of which {len(at):,} are in "
            f"the vocabulary, which has ids such as {', '.join(vocabulary.ids[:3])} and symbols such as "
            f"{', '.join(filter(None, vocabulary.symbols[:3])) or 'none'}; no programme has from {LEAST} "
            "genes to half of the vocabulary. Give a .gmt of the same species and naming as the data."
        )
    covered = len({feature for members in kept.values() for feature in members})
    note = (
        f"{len(at):,} of the {len(genes):,} genes of {url} are in the vocabulary; {len(kept):,} of "
        f"{len(sets):,} programmes are used, with {covered:,} of {len(vocabulary):,} features"
    )
    return Groups.of(kept, len(vocabulary), note)


def regions(vocabulary: Vocabulary, size: int) -> Groups:
    """Neighbouring peaks in groups of at most `size`, none of two chromosomes or two species.

    The peaks of a chromosome, by position, are cut into as many groups of like size as are needed.
    Peaks are named as chr1:100-200 or, in a genomic vocabulary, as human:chr1:5000-10000. Those whose
    names have no coordinates are in no group; ValueError where that is so for all.
    """
    species, places = zip(*(_split(name) for name in vocabulary.ids), strict=True)
    found = intervals(places)
    kinds = np.unique(np.array(species), return_inverse=True)[1]
    good = np.flatnonzero(found.reasons == MAPPED)
    if not len(good):
        raise ValueError(
            f"the {len(vocabulary):,} features of {vocabulary.modality.name} have no coordinates in their "
            f"names, such as {', '.join(vocabulary.ids[:3])}: regions are made of names like chr1:100-200. "
            "Leave region out of unimodal.mask_by."
        )
    order = good[np.lexsort((found.end[good], found.start[good], found.codes[good], kinds[good]))]
    edges = np.flatnonzero((np.diff(kinds[order]) != 0) | (np.diff(found.codes[order]) != 0)) + 1
    groups = {}
    for chromosome in np.split(order, edges):
        for part in np.array_split(chromosome, -(-len(chromosome) // size)):
            groups[f"{vocabulary.ids[part[0]]} … {vocabulary.ids[part[-1]]}"] = part
    note = (
        f"{len(groups):,} regions of at most {size} neighbouring features on {len(edges) + 1:,} chromosomes; "
        f"{len(vocabulary) - len(good):,} of {len(vocabulary):,} features have no coordinates"
    )
    return Groups.of(groups, len(vocabulary), note)


def _split(name: str) -> tuple[str, str]:
    """Species and place of a feature's name; the species is "" where there is none before two colons."""
    if name.count(":") < 2:
        return "", name
    species, _, place = name.partition(":")
    return species, place


def read_gmt(url: str) -> dict[str, tuple[str, ...]]:
    """Name -> genes of every set in a .gmt file, plain or gzipped, in its order; each gene once.

    A line is a set: name, description and genes, with tabs between them. Blank lines are passed
    over. ValueError, naming file and line, for a line that is no set or has the name of another one,
    and for a file that is missing, empty, damaged or no text.
    """
    try:
        text = read_plain(
            url,
            most=MOST,
            setting="unimodal.programmes",
            wanted="the path or URL of a .gmt file",
            kind="list of gene sets",
        ).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{url} is no .gmt file: {error}. Give a text file of gene sets.") from error
    found: dict[str, tuple[str, ...]] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        name, *rest = [field.strip() for field in line.rstrip("\r\n").split("\t")]
        genes = tuple(dict.fromkeys(gene for gene in rest[1:] if gene))
        if not name or not genes:
            raise ValueError(
                f"{url} line {number} is {line.rstrip()[:80]!r}, with {len(rest) + 1} fields between tabs "
                f"and {len(genes)} genes: a line has a name, a description and genes, tabs between them"
            )
        if name in lines:
            raise ValueError(
                f"{url} line {number} is a set {name!r}, as is line {lines[name]}: "
                "give each a name of its own"
            )
        found[name], lines[name] = genes, number
    if not found:
        raise ValueError(f"{url} has no gene sets; it should have a line for each")
    return found
