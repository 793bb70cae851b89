"""One vocabulary of genes: which species a file is of, and which gene each of its columns counts.

Ids are Ensembl gene ids without version. The genes of a species that have one counterpart in the
reference species (the first of the ortholog table) take its id; all others keep their own. What is
no known gene keeps the file's name: as it is in the reference species, `mouse:Xyz` in another, so
that no name of one species passes for a gene of another. Nothing is dropped: two columns of one
gene get the same id, and the caller sums them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PREFIXES = {
    **{"ENSG": "human", "ENSMUSG": "mouse", "ENSRNOG": "rat", "ENSMMUG": "macaque", "ENSMFAG": "cynomolgus"},
    **{"ENSPTRG": "chimpanzee", "ENSCJAG": "marmoset", "ENSSSCG": "pig", "ENSBTAG": "cow", "ENSCAFG": "dog"},
    **{"ENSGALG": "chicken", "ENSXETG": "frog", "ENSDARG": "zebrafish", "FBgn": "fly", "WBGene": "worm"},
}
"""What comes before the number of a gene id -> species."""
GENOMES = {
    **dict.fromkeys(("GRCh37", "GRCh38", "hg19", "hg38"), "human"),
    **dict.fromkeys(("GRCm38", "GRCm39", "mm9", "mm10", "mm39"), "mouse"),
}
"""What stands before `_` in the names of files counted against several genomes -> species."""
DIGITS = 7
"""Digits that a gene id has at the least; those of fly have 7, of Ensembl 11."""
KNOWN = 0.5
"""Share of a file's names that a species must know."""
RIVAL = 0.5
"""Share of the names known in a species that another may know too, before it is a question which it is."""
MIXED = 0.05
"""Share of names that only one species knows, from which on a file is partly of it."""
EXAMPLES = 10
"""Names that a summary lists of each kind that is no gene."""

KINDS = {
    "ensembl id": "the name is the id",
    "versioned id": "the id, after its version or the mark of the Y copy (.15, _PAR_Y) is taken off",
    "symbol": "the current symbol of one gene",
    "alias": "another symbol of one gene: in a second table, or in a column of synonyms",
    "other case": "a symbol or alias in other capitals",
    "entrez id": "an Entrez number, in a file that names most genes so",
    "second name": "found by the file's second name",
    "suffixed": "a repeated symbol that was made unique (MATR3-1), taken for the symbol",
    "retired id": "a gene id that no table has; it stands",
    "other species": "an id, or a name with a genome before it, of another species; it stands",
    "own name": "without gene tables, the file's name",
    "ambiguous": "a symbol of several genes; the file's name stands",
    "unknown": "no gene of the tables; the file's name stands",
    "unnamed": "neither name nor second name; all such columns are one feature",
}
"""How a column was resolved -> what that means. In the order of a summary."""
UNRESOLVED = ("retired id", "other species", "ambiguous", "unknown", "unnamed")
"""Kinds that found no gene."""


@dataclass(frozen=True)
class Table:
    """What is known of the genes of one species. Where a name fits several genes, its id is ""."""

    symbols: Mapping[str, str] = field(default_factory=dict)
    """Id -> symbol to show, "" where there is none. Holds every gene."""
    exact: Mapping[str, str] = field(default_factory=dict)
    """Current symbol -> id."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Former and other symbol -> id."""
    folded: Mapping[str, str] = field(default_factory=dict)
    """Symbol or alias without capitals -> id."""
    entrez: Mapping[str, str] = field(default_factory=dict)
    """Entrez number -> id."""
    mitochondrial: Mapping[str, bool] = field(default_factory=dict)
    """Id -> whether the gene is on the mitochondrial chromosome, where a chromosome is known."""

    def symbol(self, name: str) -> tuple[str, str] | None:
        """Id and kind of a gene by symbol or alias; the id is "" where several fit, none if no gene fits."""
        if (found := self.exact.get(name)) is not None:
            return (found, "symbol") if found else ("", "ambiguous")
        if (found := self.aliases.get(name)) is not None:
            return (found, "alias") if found else ("", "ambiguous")
        if (found := self.folded.get(name.casefold())) is not None:
            return (found, "other case") if found else ("", "ambiguous")
        return None

    def knows(self, name: str) -> bool:
        return name in self.exact or name in self.aliases


@dataclass(frozen=True)
class Detected:
    """What species the names of a file speak for."""

    species: str
    """The species, "" unless `verdict` is sure."""
    verdict: str
    """`sure`, `mixed` (several in bulk), `ambiguous` (cannot be told apart) or `unknown` (too few known)."""
    shares: Mapping[str, float]
    """Species -> share of the names known in it, largest first."""
    reason: str
    """A sentence for a report or an error."""


@dataclass(frozen=True)
class Resolved:
    """What each column of a file counts. Columns with the same id are to be summed."""

    ids: np.ndarray
    """Id in the vocabulary, str [columns], never ""."""
    symbols: np.ndarray
    """Symbol to show, str [columns], "" where there is none but the id."""
    kinds: np.ndarray
    """How each was found, one of KINDS, str [columns]."""
    names: np.ndarray
    """The file's own names, str [columns]."""
    orthologs: int
    """Columns that took the id of their counterpart in the reference species."""

    @property
    def duplicates(self) -> int:
        """Columns whose id an earlier column has too."""
        return len(self.ids) - len(set(self.ids.tolist()))

    @property
    def share(self) -> float:
        """Share of the columns that are a known gene; own names count where there are no tables."""
        return float(np.isin(self.kinds, UNRESOLVED, invert=True).mean()) if len(self.kinds) else 0.0

    def summary(self) -> dict[str, Any]:
        """Columns by kind, for a report: plain JSON, the same for columns in any order."""
        counted = Counter(self.kinds.tolist())
        return {
            "columns": len(self.ids),
            "resolved": self.share,
            "duplicates": self.duplicates,
            "orthologs": self.orthologs,
            "kinds": {kind: counted[kind] for kind in KINDS if counted[kind]},
            "examples": {
                kind: sorted(set(self.names[self.kinds == kind].tolist()))[:EXAMPLES]
                for kind in UNRESOLVED
                if counted[kind]
            },
        }


@dataclass(frozen=True)
class Genes:
    """Gene tables made ready, see `gene_tables.read_genes`. `Genes()` has none: the files' own ids stand."""

    tables: Mapping[str, Table] = field(default_factory=dict)
    """Species -> its genes."""
    reference: str = ""
    """The species whose ids and symbols stand for those of all."""
    orthologs: Mapping[str, str] = field(default_factory=dict)
    """Id in another species -> id of its one counterpart in the reference."""
    hash: str = ""
    """Of the content of the tables and the rules here, "" without tables."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What was read, for a report: plain JSON."""

    def detect(self, names: Sequence[str] | np.ndarray, symbols: Sequence[str] | np.ndarray = ()) -> Detected:
        """The species by which `names` are known; see `Detected`.

        A gene id or a genome before the name (`mm10___`) speaks for one species, whatever the
        tables hold. Else a column speaks for every species that has its name, or its second name
        in `symbols`, as a symbol in exactly these capitals (human TP53, mouse Trp53).
        """
        own, second = _columns(names, symbols)
        votes, folded = self._votes(own, second)
        shares = {species: float(known.mean()) for species, known in votes.items() if known.any()}
        shares = dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))
        told = ", ".join(f"{species} {share:.1%}" for species, share in shares.items()) or "none"
        told = f"of {len(own):,} names are known: {told}"
        together = sum(known.astype(np.int64) for known in votes.values())
        parts = [s for s in shares if (votes[s] & (together == 1)).mean() >= MIXED]
        if len(parts) > 1:
            return Detected("", "mixed", shares, f"the genes are of {' and '.join(parts)} together ({told})")
        if not shares or max(shares.values()) < KNOWN:
            few = "too few names are genes of a known species" if self.tables else "no gene tables were given"
            return Detected("", "unknown", shares, f"{few} ({told})")
        best = next(iter(shares))
        rivals = [s for s in shares if s != best and shares[s] >= RIVAL * shares[best]]
        capitals = [s for s in folded if folded[s] > folded[best]]
        if rivals or capitals:
            without = "" if rivals else " without regard to capitals"
            which = " as well as ".join([best, *(rivals or capitals)])
            return Detected("", "ambiguous", shares, f"the genes could be of {which}{without} ({told})")
        return Detected(best, "sure", shares, told)

    def _votes(self, own: list[str], second: list[str]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """Which columns each species knows, bool [columns], and how many if capitals did not matter."""
        votes = {s: np.zeros(len(own), bool) for s in sorted({*PREFIXES.values(), *self.tables})}
        folded = dict.fromkeys(votes, 0)
        numbers = _mostly_numbers(own)
        for column, (name, other) in enumerate(zip(own, second, strict=True)):
            owner = genome(name)[0] or gene_id(name)[1] or gene_id(other)[1]
            if owner:
                votes[owner][column] = True
                folded[owner] += 1
                continue
            for species, table in self.tables.items():
                known = table.knows(name) or table.knows(other) or (numbers and name in table.entrez)
                votes[species][column] = known
                folded[species] += known or table.symbol(name) is not None or table.symbol(other) is not None
        return votes, folded

    def resolve(
        self, names: Sequence[str] | np.ndarray, symbols: Sequence[str] | np.ndarray, species: str
    ) -> Resolved:
        """The gene of each column of a file of one `species`; `symbols` are second names, or empty.

        Of both names a gene id comes first; then, for the name and after it for the second: symbol,
        alias, other case, Entrez number. `MATR3-1` is taken for MATR3 only if it is no symbol, while
        MATR3 is one and is a name in the file. A symbol of several genes is the one that is in the
        first table, codes for protein, lies on a primary chromosome, has an Entrez number, looked at
        in this order; if several are left, the name stays unresolved. Ids resolve to themselves.
        ValueError if there are tables and `species` is none that has an id prefix or a table.
        """
        own, second = _columns(names, symbols)
        if not self.tables:
            return _as_they_are(own, second)
        known = sorted({*PREFIXES.values(), *self.tables})
        if species not in known:
            raise ValueError(
                f"no genes are known of the species {species!r}; write one of {', '.join(known)}"
            )
        search = _Search(self.tables.get(species, Table()), species, own)
        mark = "" if species == self.reference else f"{species}:"
        ids, shown, kinds, crossed = [], [], [], 0
        for name, other in zip(own, second, strict=True):
            gene, text, kind = search.column(name, other)
            stands = gene or mark + text
            if kind != "other species" and gene in self.orthologs:
                stands = self.orthologs[gene]
                crossed += 1
            symbol = self._symbol(gene and stands)
            given = next((text for text in (other, name) if text and not gene_id(text)[1]), "")
            if not symbol and given and kind != "other species":
                symbol = mark + search.bare(given)
            ids.append(stands)
            shown.append("" if symbol == stands else symbol)
            kinds.append(kind)
        return Resolved(_texts(ids), _texts(shown), _texts(kinds), _texts(own), crossed)

    def _symbol(self, gene: str) -> str:
        """The symbol to show for an id of any species."""
        table = self.tables.get(gene_id(gene)[1])
        return table.symbols.get(gene, "") if table else ""

    def mitochondrial(
        self, ids: Sequence[str] | np.ndarray, symbols: Sequence[str] | np.ndarray = ()
    ) -> np.ndarray:
        """Whether each gene is mitochondrial, bool [genes], before or after `resolve`.

        By its chromosome where a table has it for the id, else by a name or symbol that begins with
        MT- in any capitals. Without either, as of mere ids without tables, no gene is.
        """
        own, second = _columns(ids, symbols)
        found = np.zeros(len(own), bool)
        for place, (name, other) in enumerate(zip(own, second, strict=True)):
            stem, species = gene_id(name)
            table = self.tables.get(species, Table())
            if stem in table.mitochondrial:
                found[place] = table.mitochondrial[stem]
            else:
                texts = (name, other, table.symbols.get(stem, ""))
                found[place] = any(_unmarked(text)[:3].upper() == "MT-" for text in texts)
        return found


class _Search:
    """Finds the genes of the columns of one file."""

    def __init__(self, table: Table, species: str, own: Sequence[str]) -> None:
        self.table = table
        self.species = species
        self._names = {self.bare(name) for name in own}
        self._numbers = _mostly_numbers(own)

    def column(self, name: str, second: str) -> tuple[str, str, str]:
        """Gene id or "", the name that stands if it is "", and how it was found."""
        bare, other = self.bare(name), self.bare(second)
        for own in (bare, other):
            stem, owner = gene_id(own)
            if owner:
                kind = self._of_id(stem, owner)
                if kind == "ensembl id" and own is not bare:
                    kind = "second name"
                elif kind == "ensembl id" and stem != own:
                    kind = "versioned id"
                return stem, "", kind
        text = bare or other or "unnamed"
        if not bare and not other:
            return "", text, "unnamed"
        if genome(text)[0]:  # the file's own genome is taken off, so this is another's
            return "", text, "other species"
        found = self._of_name(bare)
        if found[0]:
            return found[0], "", found[1]
        instead = self._of_name(other)
        if instead[0]:
            return instead[0], "", "second name"
        base = self._names & {_without_suffix(bare)}
        if found[1] == "unknown" and base:
            gene, _ = self._of_name(base.pop())
            if gene:
                return gene, "", "suffixed"
        return "", text, "ambiguous" if "ambiguous" in (found[1], instead[1]) else "unknown"

    def bare(self, name: str) -> str:
        """`name` without the marks that say it is of this species: `mouse:`, `mm10___`."""
        while True:
            owner, rest = genome(name)
            if owner != self.species:
                rest = name.removeprefix(f"{self.species}:")
            if rest == name:
                return name
            name = rest

    def _of_id(self, stem: str, owner: str) -> str:
        if owner != self.species:
            return "other species"
        return "retired id" if self.table.symbols and stem not in self.table.symbols else "ensembl id"

    def _of_name(self, name: str) -> tuple[str, str]:
        if found := self.table.symbol(name):
            return found
        if self._numbers and (gene := self.table.entrez.get(name)) is not None:
            return (gene, "entrez id") if gene else ("", "ambiguous")
        return "", "unknown"


def gene_id(name: str) -> tuple[str, str]:
    """The gene id in `name` without its version, and its species; both "" if `name` is no gene id."""
    stem, _, version = name.removesuffix("_PAR_Y").partition(".")
    prefix = stem.rstrip("0123456789")
    species = PREFIXES.get(prefix, "")
    if not species or len(stem) - len(prefix) < DIGITS or not (version.isdecimal() or "." not in name):
        return "", ""
    return stem, species


def genome(name: str) -> tuple[str, str]:
    """Species of the genome that stands before `name`, and the name without it; "" and `name` if none."""
    first, mark, rest = name.partition("_")
    species = GENOMES.get(first, "") if mark else ""
    return (species, rest.lstrip("_")) if species else ("", name)


def _columns(names: Sequence[str] | np.ndarray, symbols: Sequence[str] | np.ndarray) -> list[list[str]]:
    """Both names of every column, without spaces around them; second names are "" where none are given."""
    own = [str(name).strip() for name in names]
    second = [str(symbol).strip() for symbol in symbols] if len(symbols) else [""] * len(own)
    assert len(own) == len(second), f"{len(own):,} names, but {len(second):,} second names"
    return [own, second]


def _as_they_are(own: list[str], second: list[str]) -> Resolved:
    ids, kinds = [], []
    for name, other in zip(own, second, strict=True):
        stem, _ = gene_id(name)
        ids.append(stem or name or other or "unnamed")
        if stem:
            kinds.append("ensembl id" if stem == name else "versioned id")
        else:
            kinds.append("own name" if name or other else "unnamed")
    shown = ["" if other == stands else other for other, stands in zip(second, ids, strict=True)]
    return Resolved(_texts(ids), _texts(shown), _texts(kinds), _texts(own), 0)


def _mostly_numbers(own: Sequence[str]) -> bool:
    """Whether names are Entrez numbers: most are numbers, and not simply one after the other."""
    numbers = {int(name) for name in own if len(name) < 12 and name.isdecimal()}
    return 2 * len(numbers) > len(own) and max(numbers) - min(numbers) >= len(numbers)


def _without_suffix(name: str) -> str:
    """`name` without the end that scanpy (-1) or Seurat (.1) gives to repeated names; "" if it has none."""
    stem = name.rstrip("0123456789")
    return stem[:-1] if len(stem) < len(name) and stem[-1:] in ("-", ".") else ""


def _unmarked(name: str) -> str:
    """`name` without the species or genome before it."""
    return genome(name)[1].rpartition(":")[2]


def _texts(values: Sequence[str]) -> np.ndarray:
    return np.array(values, dtype=object)
