"""A simulated multi-omic atlas on disk: several files in mixed formats, their table, and the truth.

The cells come from `cellray.data.truth`; the files are as different as those of different labs,
so that reading them meets every form: CSR, CSC and dense; counts in X, a layer and raw.X;
separate files that share cell names and one file for all; ids with versions, symbols as names.
"""

import json
import os
import shutil
import uuid
from dataclasses import asdict
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from cellray.data.truth import (
    BLOCK,
    DATASETS,
    MODALITIES,
    Simulated,
    Simulation,
    cells_of,
    gene_ids,
    peak_ids,
    protein_ids,
)

VERSION = 1
"""Of the files' layout, kept with the settings."""


def simulate(folder: str, simulation: Simulation) -> Path:
    """Write the atlas and return the path of its table.

    FOLDER/atlas.csv        one row a file, as `pipelines.ingest` reads it
    FOLDER/truth.csv        cell_id, cell_type, state, present of every cell
    FOLDER/simulation.json  the settings
    FOLDER/*                the files: .h5ad, .h5mu, .zarr

    The folder appears whole or not at all. One that already holds this very simulation is left
    as it is; ValueError for a folder that holds anything else. Memory is that of one group.
    """
    target = Path(folder).expanduser().absolute()
    settings = json.dumps({"version": VERSION, **asdict(simulation)}, indent=2) + "\n"
    if target.exists():
        if not target.is_dir():
            raise ValueError(f"{target} is a file; name a folder")
        known = target / "simulation.json"
        if known.exists() and known.read_text() == settings:
            return target / "atlas.csv"
        if any(target.iterdir()):
            raise ValueError(
                f"{target} is not empty and does not hold this simulation: remove it or name another folder"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    part.mkdir()
    try:
        _write(part, simulation)
        (part / "simulation.json").write_text(settings)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target / "atlas.csv"


def _write(folder: Path, simulation: Simulation) -> None:
    atlas: list[dict[str, str]] = []
    truth: list[pd.DataFrame] = []
    step = simulation.group * BLOCK
    for first in range(0, simulation.cells, step):
        cells = cells_of(simulation, first, min(first + step, simulation.cells))
        for name, write in zip(DATASETS, _WRITERS, strict=True):
            own = cells.take(np.flatnonzero(np.char.partition(cells.dataset, "-")[:, 0] == name))
            if len(own):
                files = write(folder, str(own.dataset[0]), own, simulation)
                atlas += [_ROW | {"dataset": str(own.dataset[0])} | file for file in files]
        truth.append(_truth(cells))
    pd.DataFrame(atlas).to_csv(folder / "atlas.csv", index=False)
    pd.concat(truth).to_csv(folder / "truth.csv", index=False, float_format="%.6f")


_ROW = {
    **dict.fromkeys(("dataset", "modality", "url"), ""),
    **{"label": "cell_type", "batch": "batch", "donor": "donor", "assay": "assay"},
    **{"species": "species", "tissue": "=blood", "layer": "", "names": ""},
}
"""A row of the table: obs columns, or =VALUE; which counts; which var column names the features."""


def _truth(cells: Simulated) -> pd.DataFrame:
    spelled = {bits: "+".join(m for at, m in enumerate(MODALITIES) if bits >> at & 1) for bits in range(1, 8)}
    return pd.DataFrame(
        {
            "cell_id": [f"{d}:{n}" for d, n in zip(cells.dataset, cells.names, strict=True)],
            "cell_type": cells.cell_type,
            "state": cells.state,
            "present": [spelled[int(bits)] for bits in cells.present],
        }
    )


def _measured(cells: Simulated, modality: str, simulation: Simulation) -> ad.AnnData:
    """The cells that have `modality`, raw counts in X as CSR, its usual feature ids as var_names."""
    own = cells.take(np.flatnonzero(cells.present >> MODALITIES.index(modality) & 1))
    if modality == "rna":
        symbols = [f"GENE{i + 1}" for i in range(simulation.genes)]
        var = pd.DataFrame({"symbol": symbols}, index=pd.Index(gene_ids(simulation)))
    else:
        ids = peak_ids(simulation) if modality == "atac" else protein_ids(simulation)
        var = pd.DataFrame(index=pd.Index(ids))
    return ad.AnnData(own.counts[modality], own.obs(), var)


def _log_normalised(counts: sp.csr_matrix) -> sp.csr_matrix:
    total = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
    return sp.csr_matrix(sp.diags(1e4 / total) @ counts).log1p().astype(np.float32)


def _write_multiome(
    folder: Path, name: str, cells: Simulated, simulation: Simulation
) -> list[dict[str, str]]:
    """Two .h5ad that share most cells: RNA with counts in raw.X and every second gene in X, ATAC as CSC."""
    whole = _measured(cells, "rna", simulation)
    rna = whole[:, ::2].copy()
    rna.X = _log_normalised(whole.X)[:, ::2]
    rna.raw = whole
    rna.write_h5ad(folder / f"{name}_rna.h5ad")
    atac = _measured(cells, "atac", simulation)
    atac.X = atac.X.tocsc()
    atac.write_h5ad(folder / f"{name}_atac.h5ad")
    return [
        {"modality": "rna", "url": f"{name}_rna.h5ad", "layer": "raw"},
        {"modality": "atac", "url": f"{name}_atac.h5ad"},
    ]


def _write_cite(folder: Path, name: str, cells: Simulated, simulation: Simulation) -> list[dict[str, str]]:
    """Two .h5ad: RNA with counts in a layer, X log-normalised and versions on the ids; protein dense."""
    rna = _measured(cells, "rna", simulation)
    rna.var_names = [f"{gene}.{i % 9 + 1}" for i, gene in enumerate(rna.var_names)]
    rna.layers["counts"] = rna.X
    rna.X = _log_normalised(rna.X)
    rna.write_h5ad(folder / f"{name}_rna.h5ad")
    protein = _measured(cells, "protein", simulation)
    protein.X = protein.X.toarray()
    protein.var_names = [f"{protein_id}_TotalSeqB" for protein_id in protein.var_names]
    protein.write_h5ad(folder / f"{name}_protein.h5ad")
    return [
        {"modality": "rna", "url": f"{name}_rna.h5ad", "layer": "counts"},
        {"modality": "protein", "url": f"{name}_protein.h5ad"},
    ]


def _write_tea(folder: Path, name: str, cells: Simulated, simulation: Simulation) -> list[dict[str, str]]:
    """One .h5mu with all three modalities, each with its own subset of the cells."""
    parts = {modality: _measured(cells, modality, simulation) for modality in MODALITIES}
    for part in parts.values():
        part.obs = part.obs[[]]
    with md.set_options(pull_on_update=False):
        whole = md.MuData(parts)
        whole.obs = cells.obs().loc[whole.obs_names]
        whole.write_h5mu(folder / f"{name}.h5mu")
    return [{"url": f"{name}.h5mu"}]


def _write_rna(folder: Path, name: str, cells: Simulated, simulation: Simulation) -> list[dict[str, str]]:
    """One AnnData .zarr (v2) with symbols as names and ids in a var column."""
    rna = _measured(cells, "rna", simulation)
    rna.var = pd.DataFrame({"gene_ids": rna.var_names}, index=pd.Index(rna.var["symbol"].to_list()))
    ad.io.write_elem(zarr.open_group(folder / f"{name}.zarr", mode="w", zarr_format=2), "/", rna)
    return [{"modality": "rna", "url": f"{name}.zarr", "names": "gene_ids", "species": "=human"}]


def _write_atac(folder: Path, name: str, cells: Simulated, simulation: Simulation) -> list[dict[str, str]]:
    """One .h5ad with ATAC alone, and no label in the table."""
    _measured(cells, "atac", simulation).write_h5ad(folder / f"{name}.h5ad")
    return [{"modality": "atac", "url": f"{name}.h5ad", "label": ""}]


_WRITERS = (_write_multiome, _write_cite, _write_tea, _write_rna, _write_atac)
