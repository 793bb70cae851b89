"""Matrices of 10x Genomics: the .h5 files that Cell Ranger writes, features x cells by cells.

Since version 3 there is one group `matrix`, whose features are of several kinds; before, there was a group
for each genome. Stored by columns, where cells are columns: that is by rows here.
Source: the HDF5 feature-barcode matrix format, as 10x Genomics documents it.
"""

from typing import Any

import h5py
import numpy as np
import scipy.sparse as sp

from cellray.data.guard import item, whole
from cellray.data.matrices import Sparse

KINDS = {"Gene Expression": "rna", "Antibody Capture": "protein", "Peaks": "atac"}
"""Modalities by `feature_type`. Others are called by their type in small letters."""
OLD = {"barcodes", "data", "genes", "gene_names", "indices", "indptr", "shape"}
"""What the group of a genome held before version 3."""


def holds(root: Any) -> bool:
    """Whether `root` is a 10x Genomics matrix of any version."""
    if not isinstance(root, h5py.Group) or "obs" in root:
        return False
    return _is_new(root) or bool(_old(root))


def _is_new(root: h5py.Group) -> bool:
    matrix = root.get("matrix")
    return isinstance(matrix, h5py.Group) and "features" in matrix


def _old(root: h5py.Group) -> list[str]:
    """Genomes of a file from before version 3."""
    return [name for name in root if isinstance(root[name], h5py.Group) and set(root[name]) >= OLD]


class Matrix:
    """A 10x Genomics matrix. ValueError if it has several genomes in groups of their own."""

    key: str
    """Where in the file it is."""
    counts: Sparse
    """Counts by cells, of all features."""
    kinds: list[str]
    """Modalities there are, in the order of the file."""

    def __init__(self, root: h5py.Group) -> None:
        if _is_new(root):
            self.key = "matrix"
        else:
            genomes = _old(root)
            if len(genomes) > 1:
                raise ValueError(
                    f"it holds matrices of {len(genomes)} genomes, {', '.join(genomes)}: the same barcodes, "
                    "whose species are not told apart. Make a file of each, or run a recent Cell Ranger."
                )
            (self.key,) = genomes
        self._group = item(root, self.key)
        self._new = self.key == "matrix"
        shape = whole(item(self._group, "shape"))
        self.counts = Sparse(self._group, False, shape[::-1])
        self._features = item(self._group, "features") if self._new else self._group
        self._types = self._kinds()
        self.kinds = list(dict.fromkeys(self._types.tolist()))

    def _kinds(self) -> np.ndarray:
        """The modality of each feature, str [features]."""
        features = self.counts.shape[1]
        if not self._new or "feature_type" not in self._features:
            return np.full(features, "rna", object)
        spelt, codes = np.unique(self._text("feature_type"), return_inverse=True)
        names = [KINDS.get(kind, kind.lower().replace(" ", "_")) for kind in spelt.tolist()]
        return np.array(names, object)[codes]

    def _text(self, name: str) -> np.ndarray:
        """What is said of each feature, str [features]."""
        found = _text(item(self._features, name))
        if len(found) != self.counts.shape[1]:
            said = f"{len(found):,} entries for {self.counts.shape[1]:,} features"
            raise ValueError(f"{self.key}/features/{name} has {said}: the file is damaged")
        return found

    def pick(self, modality: str) -> np.ndarray:
        """Which features are of `modality`, bool [features]; "" if there is only one."""
        if not modality and len(self.kinds) == 1:
            modality = self.kinds[0]
        if modality not in self.kinds:
            asked = f"no modality {modality!r}" if modality else "several modalities, and none was named"
            held = ", ".join(self.kinds)
            raise ValueError(f"it has {asked}: it holds {held}. Name one of them as modality=.")
        picked: np.ndarray = self._types == modality
        return picked

    @property
    def columns(self) -> tuple[str, str]:
        """Where ids and symbols of the features are."""
        return ("id", "name") if self._new else ("genes", "gene_names")

    def barcodes(self) -> np.ndarray:
        """Names of the cells, str [cells]."""
        return _text(item(self._group, "barcodes"))

    def names(self, picked: np.ndarray, ids: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and symbols of the features, str [features picked]. `ids` "name" makes symbols the ids."""
        first, second = self.columns
        found, symbols = self._text(first)[picked], self._text(second)[picked]
        if ids == second:
            found, symbols = symbols, found
        return found, np.where(symbols == found, "", symbols)

    def genomes(self, picked: np.ndarray) -> tuple[str, ...]:
        """Genomes of the features picked, in the order of the file."""
        if not self._new:
            return (self.key,)
        if "genome" not in self._features:
            return ()
        return tuple(name for name in dict.fromkeys(self._text("genome")[picked].tolist()) if name)


def _text(array: Any) -> np.ndarray:
    """A list of names as text."""
    if not isinstance(array, h5py.Dataset) or len(array.shape) != 1 or array.dtype.kind not in "SO":
        raise ValueError(f"{array.name} is no list of names; the file is damaged")
    return np.array([name.decode() for name in whole(array).tolist()], object)


def some_columns(counts: sp.csr_matrix, picked: np.ndarray) -> sp.csr_matrix:
    """The columns of `counts` that are picked, in time that goes with the counts alone."""
    place = np.cumsum(picked, dtype=np.int32) - 1
    keep = picked[counts.indices]
    starts = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])[counts.indptr]
    return sp.csr_matrix(
        (counts.data[keep], place[counts.indices[keep]], starts), shape=(counts.shape[0], int(picked.sum()))
    )
