"""Gene tables out of a folder, made ready for looking up: ids, symbols, chromosomes, orthologs.

A table is known by its columns, whatever its file is called (.csv, .tsv or .txt, plain or .gz):

* genes: `ensembl_id` (or `ensgene`) and `symbol`; of use beside them are `biotype`, `chr`, `entrez`
  and columns of synonyms (`aliases`, `previous_symbols` …, several in a cell parted by `|`);
* orthologs: `symbol_<species>` twice, the reference species first, and perhaps `one_to_one`.

Of several tables of one species the first is the one whose symbols are current: those without a
chromosome come first, then by file name. What the others call a gene is an alias.
"""

import gzip
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cellray.data import storage
from cellray.data.faults import retried
from cellray.data.genes import PREFIXES, Genes, Table, gene_id
from cellray.data.storage import join, locate, read_bytes, sha256

RULES = 1
"""Goes up with every change of what tables or names mean here or in `genes`; part of the hash."""
IDS = ("ensembl_id", "ensgene")
"""Columns of gene ids."""
SYNONYMS = (
    *("alias", "aliases", "alias_symbol", "synonym", "synonyms"),
    *("prev_symbol", "previous_symbol", "previous_symbols"),
)
"""Columns of other names of a gene."""
SUFFIXES = tuple(kind + packed for kind in (".csv", ".tsv", ".txt") for packed in ("", ".gz"))
"""Files of a folder that are read."""
PRIMARY = re.compile(r"(?:chr)?(?:\d{1,2}[A-Za-z]?|[XYZW]|MT?)")
"""Chromosomes that are no patch, alternative or unplaced piece."""
MITOCHONDRIAL = ("MT", "M", "chrM", "chrMT")
ORTHOLOG = "symbol_"
"""What columns of orthologs begin with; the species follows."""


class File(NamedTuple):
    """A table as it was read."""

    name: str
    hash: str
    rows: pd.DataFrame
    """Text, "" for missing values."""

    @property
    def orthologs(self) -> bool:
        return not set(IDS) & set(self.rows.columns)


def read_genes(url: str) -> Genes:
    """The gene tables in the folder at `url`; see the module for what they look like.

    ValueError, naming the file and what was found in it: no folder or no tables, a table that
    cannot be read or whose columns are none of those, ids of no known species, orthologs of a
    species that has no table of genes.
    """
    read = [_read(join(url, name), name) for name in _names(url)]
    files = sorted(read, key=lambda file: (file.orthologs, "chr" in file.rows, file.name))
    parts: dict[str, list[pd.DataFrame]] = {}
    told = []
    for file in files:
        if not file.orthologs:
            by_species = _by_species(url, file)
            told.append({"file": file.name, "genes": {s: len(rows) for s, rows in by_species.items()}})
            for species, rows in by_species.items():
                parts.setdefault(species, []).append(rows)
    tables = {species: _table(rows) for species, rows in sorted(parts.items())}
    reference, orthologs = _orthologs(url, [file for file in files if file.orthologs], tables, told)
    reference = reference or ("human" if "human" in tables else next(iter(tables), ""))
    if not tables:
        raise ValueError(f"{url} has no table of genes, with columns {' or '.join(IDS)} and symbol")
    return Genes(
        tables=_apart(tables, reference),
        reference=reference,
        orthologs=orthologs,
        hash=sha256("\n".join([str(RULES), *(file.hash for file in files)]).encode()),
        about={"tables": told, "reference": reference, "species": sorted(tables)},
    )


def _names(url: str) -> list[str]:
    """Names of the tables in the folder."""
    fs, path = locate(url)
    if not retried(url, lambda: fs.isdir(path)):
        raise ValueError(f"there is no folder of gene tables at {url}")
    found = storage.names(url)
    names = [name for name in found if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    if not names:
        raise ValueError(
            f"{url} has no gene tables, which end in {', '.join(SUFFIXES)}; it has "
            f"{', '.join(found[:8]) or 'nothing'}"
        )
    return names


def _read(url: str, name: str) -> File:
    data = read_bytes(url)
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        head = data.split(b"\n", 1)[0].decode("utf-8-sig")
        rows = pd.read_csv(
            io.BytesIO(data),
            sep="\t" if "\t" in head else ",",
            dtype=str,
            keep_default_na=False,
            usecols=_wanted,
            encoding="utf-8-sig",
        )
    except (OSError, EOFError, zlib.error, ValueError) as error:  # of pandas and of text are ValueErrors
        raise ValueError(f"{url} cannot be read as a table: {error}") from error
    for column in rows.columns:
        spaced = {text: text.strip() for text in rows[column].unique() if text != text.strip()}
        if spaced:
            rows[column] = rows[column].replace(spaced)
    file = File(name, sha256(data), rows)
    sides = [column for column in rows.columns if column.startswith(ORTHOLOG)]
    if not ("symbol" in rows if not file.orthologs else len(sides) == 2):
        raise ValueError(
            f"{url} is no gene table: it has the columns {head.strip()[:200]}. A table of genes has "
            f"{' or '.join(IDS)}, and symbol; one of orthologs has two columns {ORTHOLOG}<species>."
        )
    if not len(rows):
        raise ValueError(f"{url} has no rows")
    return file


def _wanted(column: str) -> bool:
    known = (*IDS, "symbol", "biotype", "chr", "entrez", "one_to_one", *SYNONYMS)
    return column in known or column.startswith(ORTHOLOG)


def _by_species(url: str, file: File) -> dict[str, pd.DataFrame]:
    """Rows of a table of genes by species, with the id as `id`; those of no known species are left out."""
    column = next(column for column in IDS if column in file.rows)
    stems = [gene_id(name) for name in file.rows[column]]
    rows = file.rows.assign(id=[stem for stem, _ in stems])
    species = np.array([species for _, species in stems], dtype=object)
    found = {str(s): rows[species == s] for s in sorted(set(species.tolist()) - {""})}
    if not found:
        raise ValueError(
            f"{join(url, file.name)}: column {column} has no gene ids of a known species but "
            f"{', '.join(file.rows[column][:3])}; ids begin with one of {', '.join(PREFIXES)}"
        )
    return found


def _table(parts: Sequence[pd.DataFrame]) -> Table:
    """The genes of one species out of its tables, the one with the current symbols first."""
    rows = pd.concat([part.assign(level=level) for level, part in enumerate(parts)], ignore_index=True)
    rows = rows.fillna("")
    genes, ids = pd.factorize(rows["id"])
    chromosomes, numbers = _text(rows, "chr"), _text(rows, "entrez").str.removesuffix(".0")
    preferred = np.zeros(len(ids), np.int64)
    for worth, test in (
        (8, rows["level"] == 0),
        (4, _text(rows, "biotype") == "protein_coding"),
        (2, chromosomes.isin([name for name in chromosomes.unique() if PRIMARY.fullmatch(name)])),
        (1, numbers != ""),
    ):
        preferred[np.unique(genes[test.to_numpy(bool)])] += worth
    named = ((rows["symbol"] != "") & (rows["symbol"] != rows["id"])).to_numpy()
    entries = pd.DataFrame({"name": rows["symbol"], "gene": genes, "level": rows["level"]})[named]
    others = [_synonyms(rows[column], genes, len(parts)) for column in SYNONYMS if column in rows]
    entries = pd.concat([entries, *others], ignore_index=True)
    entrez = pd.DataFrame({"name": numbers, "gene": genes, "level": 0})[numbers != ""]
    shown = pd.Series("", index=ids, dtype=object)
    first = entries[entries["level"] < len(parts)].drop_duplicates("gene")
    shown[ids[first["gene"].to_numpy()]] = first["name"].to_numpy()
    placed = rows["id"][chromosomes != ""]
    current = entries["level"] == 0
    return Table(
        symbols=dict(zip(ids.tolist(), shown.tolist(), strict=True)),
        exact=_lookup(entries[current], preferred, ids),
        aliases=_lookup(entries[~current], preferred, ids),
        folded=_lookup(entries.assign(name=[n.casefold() for n in entries["name"]]), preferred, ids),
        entrez=_lookup(entrez, preferred, ids),
        mitochondrial={
            **dict.fromkeys(placed, False),
            **dict.fromkeys(rows["id"][chromosomes.isin(MITOCHONDRIAL)], True),
        },
    )


def _text(rows: pd.DataFrame, column: str) -> pd.Series:
    return rows[column] if column in rows else pd.Series("", index=rows.index, dtype=object)


def _synonyms(cells: pd.Series, genes: np.ndarray, level: int) -> pd.DataFrame:
    """An entry for each of the names in cells such as `A1B|ABG`."""
    entries = pd.DataFrame({"name": cells.str.split(r"[|;,]", regex=True), "gene": genes, "level": level})
    entries = entries.explode("name", ignore_index=True)
    entries["name"] = entries["name"].str.strip()
    return entries[~entries["name"].isin(["", "-"])]


def _lookup(entries: pd.DataFrame, preferred: np.ndarray, ids: pd.Index) -> dict[str, str]:
    """Name -> id of its gene, "" where several are as good: of the lowest level, then the most preferred."""
    codes, names = pd.factorize(entries["name"])
    genes, levels = entries["gene"].to_numpy(), entries["level"].to_numpy()
    table = pd.DataFrame({"name": codes, "level": levels, "worth": -preferred[genes], "gene": genes})
    table = table.drop_duplicates().sort_values(["name", "level", "worth"], ignore_index=True)
    alone = ~table.duplicated(["name", "level", "worth"], keep=False)
    best = ~table.duplicated("name")
    found = np.where(alone[best], ids.to_numpy()[table["gene"][best]], "")
    return dict(zip(names[table["name"][best]].tolist(), found.tolist(), strict=True))


def _orthologs(
    url: str, files: Sequence[File], tables: Mapping[str, Table], told: list[dict[str, Any]]
) -> tuple[str, dict[str, str]]:
    """The reference species, and id in another -> id in it, of pairs where each has one counterpart."""
    reference = ""
    pairs: dict[str, str] = {}
    for file in files:
        (here, there) = (c.removeprefix(ORTHOLOG) for c in file.rows.columns if c.startswith(ORTHOLOG))
        where = join(url, file.name)
        for species in (here, there):
            if species not in tables:
                raise ValueError(
                    f"{where} has orthologs of {species}, but there is no table of its genes beside it; "
                    f"there are those of {', '.join(tables) or 'none'}"
                )
        if reference not in ("", here):
            raise ValueError(f"{where} begins with {here}, other orthologs with {reference}: choose one")
        reference = here
        found, counted = _pairs(file.rows, here, there, tables)
        told.append({"file": file.name, "orthologs": counted})
        if both := pairs.keys() & found.keys():
            twice = ", ".join(sorted(both)[:3])
            raise ValueError(f"{where} has orthologs of {there} that another table has too: {twice}")
        pairs |= found
    return reference, pairs


def _pairs(
    rows: pd.DataFrame, here: str, there: str, tables: Mapping[str, Table]
) -> tuple[dict[str, str], dict[str, int]]:
    """Id in `there` -> id in `here`, and what became of the pairs of one table.

    One to one is counted over all rows, whatever the table says of them, first by symbol and then
    by the genes found; a pair that the table itself denies is left out too.
    """
    sides = [ORTHOLOG + here, ORTHOLOG + there]
    rows = rows[(rows[sides[0]] != "") & (rows[sides[1]] != "")]
    denied = _text(rows, "one_to_one").str.lower().isin(["false", "f", "0", "no"])
    flat = rows[sides].assign(denied=denied).groupby(sides, as_index=False)[["denied"]].any()
    several = flat[sides[0]].duplicated(keep=False) | flat[sides[1]].duplicated(keep=False)
    single = flat[~(several | flat["denied"])]
    genes = [
        [(table.exact.get(name) or table.aliases.get(name) or "") for name in single[side]]
        for table, side in ((tables[here], sides[0]), (tables[there], sides[1]))
    ]
    found = pd.DataFrame({"here": genes[0], "there": genes[1]})
    known = found[(found["here"] != "") & (found["there"] != "")]
    again = known["here"].duplicated(keep=False) | known["there"].duplicated(keep=False)
    alone = known[~again]
    counted = {
        "pairs": len(flat),
        "not one to one": len(flat) - len(single) + len(known) - len(alone),
        "unknown symbols": len(found) - len(known),
        "used": len(alone),
    }
    return dict(zip(alone["there"], alone["here"], strict=True)), counted


def _apart(tables: Mapping[str, Table], reference: str) -> dict[str, Table]:
    """`tables`, where a symbol to show that an earlier species has too gets its own species before it.

    The reference is the first, so its symbols stay as they are.
    """
    taken: set[str] = set()
    apart = {}
    for species in sorted(tables, key=lambda name: (name != reference, name)):
        own = tables[species].symbols
        shown = {gene: f"{species}:{name}" if name in taken else name for gene, name in own.items()}
        apart[species] = replace(tables[species], symbols=shown)
        taken |= set(own.values()) - {""}
    return apart
