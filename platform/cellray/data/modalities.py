"""What is measured: the modalities, how their feature names read and how their counts are scaled."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

ENSEMBL = re.compile(r"(ENS[A-Z]*[GTP]\d{11})\.\d+")
PEAK = re.compile(r"^(?:chr)?([^\s:_-]+)[:_-](\d+)[_-](\d+)$", re.IGNORECASE)
ANTIBODY = re.compile(r"[_-]TotalSeq-?[A-D]?$|[_-]TotalC$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One kind of measurement."""

    name: str
    """Lower-case name, used in column names, file names and overrides."""
    features: Literal["gene", "peak", "protein"]
    """What a feature is; decides how its name is normalised."""
    scale: Literal["log1p_cp10k", "log1p"]
    """What a model reads: log(1 + counts per 10,000) or log(1 + counts)."""
    likelihood: Literal["negative_binomial", "bernoulli"]
    """How a decoder explains the counts. `bernoulli` explains count > 0."""
    context: int
    """Most tokens of one cell that an encoder attends to, in rank order."""
    min_features: int = 1
    """Cells with fewer counted features have this modality dropped, and reported."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9]*", self.name):
            raise ValueError(f"modality name {self.name!r} must match [a-z][a-z0-9]*")
        if self.context < 1 or self.min_features < 1:
            raise ValueError(f"{self.name}: context and min_features must be at least 1")


RNA = Modality(name="rna", features="gene", scale="log1p_cp10k", likelihood="negative_binomial", context=512)
ATAC = Modality(name="atac", features="peak", scale="log1p", likelihood="bernoulli", context=512)
PROTEIN = Modality(
    name="protein", features="protein", scale="log1p", likelihood="negative_binomial", context=256
)
BUILT_IN = (RNA, ATAC, PROTEIN)


def normalise_names(names: Sequence[str], features: str) -> list[str]:
    """Feature names in the one spelling the vocabulary uses.

    Genes lose an Ensembl version (`ENSG00000000003.15`), peaks become `chr1:100-200`,
    proteins lose a trailing `_TotalSeqB`. A name of no known form stays as it is.
    """
    if features == "gene":
        # Looking for the point first: names are many, and read again with every request.
        return [m[1] if "." in name and (m := ENSEMBL.fullmatch(name)) else name for name in names]
    if features == "peak":
        return [PEAK.sub(lambda m: f"chr{m[1]}:{m[2]}-{m[3]}", name) for name in names]
    return [ANTIBODY.sub("", name) for name in names]


def scaled(counts: np.ndarray, total: np.ndarray, scale: str) -> np.ndarray:
    """Counts as a model reads them, float32 of the shape of `counts`.

    `total` is the depth of the cell of each count, over all features of the modality.
    """
    values = counts.astype(np.float32)
    if scale == "log1p_cp10k":
        values *= 1e4 / np.maximum(total, 1).astype(np.float32)
    return np.log1p(values)
