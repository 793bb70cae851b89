"""What the columns of a file are in the vocabulary: genes, peaks and proteins of all files under one name."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cellray.data.gene_tables import read_genes
from cellray.data.genes import UNRESOLVED, Genes
from cellray.data.modalities import Modality, normalise_names
from cellray.data.peaks import PeakMap, peak_map
from cellray.data.reading import Source


@dataclass(frozen=True, kw_only=True)
class Features:
    """What one file counts in one modality."""

    names: np.ndarray
    """Names in the vocabulary's spelling, sorted, each once, str [features]."""
    symbols: np.ndarray
    """Second names, "" where there is none, str [features]."""
    columns: np.ndarray
    """Which feature each column of the file is, -1 for none, int32 [columns]."""
    mito: np.ndarray
    """Features of the mitochondrial genome, bool [features]."""
    about: Mapping[str, Any]
    """How they were found, for the report: plain JSON."""

    @property
    def unknown(self) -> int:
        """Columns that are no gene of the tables, or no element of the genomic vocabulary."""
        kinds = self.about.get("kinds", {})
        return sum(kinds.get(kind, 0) for kind in UNRESOLVED) + sum(self.about.get("unmapped", {}).values())


@dataclass(frozen=True, kw_only=True)
class Harmony:
    """How features find their names: gene tables, and a genomic vocabulary for peaks, if there are any."""

    genes: Genes
    peaks: PeakMap | None

    @property
    def facts(self) -> dict[str, str]:
        """Hashes of what decides a name."""
        return {"genes": self.genes.hash, "peaks": self.peaks.hash if self.peaks else ""}

    def features(self, source: Source, modality: Modality, species: str) -> Features:
        """The features of `source`. ValueError if `species` is "" where a name depends on it."""
        kind = modality.features
        placed = self.peaks if kind == "peak" else self.genes.tables if kind == "gene" else None
        if placed and not species:
            setting = "ingest.peaks" if kind == "peak" else "ingest.genes"
            why = self.genes.detect(source.feature_names, source.symbols).reason if kind == "gene" else ""
            raise ValueError(
                f"{source.url}: its species has to be known where {setting} is set, and cannot be told from "
                f"the file{why and ': '}{why}. Write species in the atlas, e.g. =human"
            )
        if kind == "peak" and self.peaks:
            mapped = self.peaks.assign(source.feature_names, species)
            found, places = np.unique(mapped.features.astype(str), return_inverse=True)
            columns = np.where(mapped.columns >= 0, places[mapped.columns], -1)
            symbols = np.full(len(found), "", object)
            return _features(found, symbols, columns, mapped.summary(source.feature_names))
        if kind == "gene":
            genes = self.genes.resolve(source.feature_names, source.symbols, species)
            ids, symbols, about = genes.ids, genes.symbols, genes.summary()
        else:
            ids = np.array(normalise_names(source.feature_names.tolist(), kind), dtype=object)
            symbols = np.where(source.symbols == ids, "", source.symbols)
            about = {}
        found, first, columns = np.unique(ids.astype(str), return_index=True, return_inverse=True)
        mito = self.genes.mitochondrial(found, symbols[first]) if kind == "gene" else None
        return _features(found, symbols[first], columns, about, mito)


def _features(
    names: np.ndarray,
    symbols: np.ndarray,
    columns: np.ndarray,
    about: Mapping[str, Any],
    mito: np.ndarray | None = None,
) -> Features:
    return Features(
        names=names,
        symbols=symbols.astype(object),
        columns=columns.astype(np.int32),
        mito=np.zeros(len(names), bool) if mito is None else mito,
        about=about,
    )


@lru_cache(maxsize=4)
def harmony(genes: str, peaks: str) -> Harmony:
    """What the settings `ingest.genes` and `ingest.peaks` say. ValueError where they cannot be read."""
    return Harmony(genes=read_genes(genes) if genes else Genes(), peaks=peak_map(peaks))
