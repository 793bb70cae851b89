"""The data sets of real pairs: their files, how they are read, and what is to be reached on them."""

import csv
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COLUMNS = ("dataset", "modality", "url", "label", "batch", "species", "label_from")
"""Of the atlas table."""
FEW = 900
"""About so many cells of a file are read by --quick."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is to be reached, and by what."""

    task: str
    metric: str
    value: float
    model: str


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """A data set of real pairs."""

    name: str
    folder: str
    """Below the folder of the data."""
    files: tuple[Mapping[str, str], ...]
    """Rows of the atlas table; `url` is below `folder`."""
    settings: Mapping[str, str]
    """Of the recipe, beside those of all data sets."""
    goals: tuple[Goal, ...]

    def missing(self, data: Path) -> list[Path]:
        """Files that are not there."""
        return [path for path in self.paths(data) if not path.is_file()]

    def paths(self, data: Path) -> list[Path]:
        return [data / self.folder / file["url"] for file in self.files]

    def content(self, data: Path) -> list[str]:
        """What the files hold, hashed."""
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.paths(data)]

    def table(self, data: Path, target: Path) -> None:
        """Write the atlas table."""
        with target.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            for row, path in zip(self.files, self.paths(data), strict=True):
                writer.writerow({**row, "url": str(path)})


LINEAR = "student, linear probe"
SNARESEQ = Pairs(
    name="snareseq",
    folder="mop_snareseq",
    files=(
        {
            "dataset": "cortex",
            "modality": "rna",
            "url": "rna.h5ad",
            "label": "cell_type",
            "batch": "batch",
            "species": "=mouse",
        },
        {
            "dataset": "cortex",
            "modality": "atac",
            "url": "atac.h5ad",
            "batch": "batch",
            "species": "=mouse",
        },
    ),
    settings={"ingest.drop_labels": "Mis"},
    goals=(
        Goal(task="annotation", metric="accuracy", value=0.915, model=LINEAR),
        Goal(task="annotation", metric="macro F1", value=0.79, model=LINEAR),
        Goal(task="RNA to ATAC", metric="AUROC", value=0.655, model="student"),
        Goal(task="RNA to ATAC", metric="AUROC, depth-adjusted", value=0.60, model="student"),
        Goal(task="RNA to ATAC", metric="AUROC at one depth", value=0.60, model="student"),
    ),
)
PBMC = Pairs(
    name="pbmc",
    folder="pbmc_cite_10x",
    files=(
        {
            "dataset": "pbmc10k",
            "modality": "rna",
            "url": "rna.h5ad",
            "label": "gated_type",
            "batch": "batch",
            "species": "=human",
            "label_from": "protein",
        },
        {
            "dataset": "pbmc10k",
            "modality": "protein",
            "url": "protein.h5ad",
            "batch": "batch",
            "species": "=human",
        },
        {
            "dataset": "pbmc5k",
            "modality": "rna",
            "url": "rna_only_pbmc5k.h5ad",
            "batch": "batch",
            "species": "=human",
        },
    ),
    settings={"ingest.drop_labels": "unassigned"},
    goals=(Goal(task="RNA to protein", metric="Pearson", value=0.855, model="student"),),
)
ALL: Mapping[str, Pairs] = {one.name: one for one in (SNARESEQ, PBMC)}


def subset(pairs: Pairs, data: Path, folder: Path, cells: int = FEW) -> None:
    """Write files of fewer cells, about `cells` where there are pairs, below `folder`.

    Which cells follows from their names and the size of the first file: pairs stay pairs.
    """
    import anndata

    every = 0
    for source, target in zip(pairs.paths(data), pairs.paths(folder), strict=True):
        whole = anndata.read_h5ad(source)
        every = every or max(1, whole.n_obs // cells)
        target.parent.mkdir(parents=True, exist_ok=True)
        whole[_chosen(whole.obs_names, every)].copy().write_h5ad(target, compression="gzip")


def _chosen(names: Sequence[str], every: int) -> list[bool]:
    return [zlib.crc32(name.encode()) % every == 0 for name in names]
