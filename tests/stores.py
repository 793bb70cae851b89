"""A store of simulated cells, written without Ray, and a small run on it."""

import io
import json

import numpy as np
import pyarrow as pa

from cellray.data import storage
from cellray.data.modalities import BUILT_IN
from cellray.data.store import ABOUT, VERSION, cell_table, edition_path, encode_shard, index_of
from cellray.data.tokens import POOLED, Tokenizer, Vocabulary
from cellray.data.truth import Simulation, cells_of, gene_ids, peak_ids, protein_ids
from cellray.train.recipe import load, override
from cellray.train.run import Run

SIMULATION = Simulation(cells=400, genes=120, peaks=150, proteins=12, types=4, donors=5, seed=3)


def write(folder, simulation=SIMULATION, shard=150, measured=("rna", "atac", "protein"), **more):
    """A store with every simulated cell, in the simulator's order, `shard` cells a shard.

    Cells in which none of the modalities `measured` is are left out. `more` is known of the cells: assay,
    species, …
    """
    cells, known = cells_of(simulation, 0, simulation.cells), [m for m in BUILT_IN if m.name in measured]
    present = np.zeros(len(cells), np.uint32)
    for bit, modality in enumerate(known):
        present |= ((cells.present.astype(np.uint32) >> BUILT_IN.index(modality)) & 1) << bit
    cells, present = cells.take(np.flatnonzero(present)), present[present > 0]
    names = {"rna": gene_ids(simulation), "atac": peak_ids(simulation), "protein": protein_ids(simulation)}
    vocabularies = {}
    for bit, modality in enumerate(known):
        has = (present >> bit) & 1
        matrix = cells.counts[modality.name].tocsc()
        sums = {POOLED: np.asarray(matrix.sum(axis=0)).ravel().astype(np.int64)}
        nonzero = {POOLED: np.diff(matrix.indptr).astype(np.int64)}
        features = tuple(names[modality.name])
        vocabularies[modality.name] = Vocabulary(
            modality, features, ("",) * len(features), sums, nonzero, {POOLED: int(has.sum())}
        )
    tokenizer = Tokenizer(vocabularies)
    counts = {}
    for name in vocabularies:
        matrix = cells.counts[name].tocsr()
        depth = np.asarray(matrix.sum(axis=1)).ravel()
        counts[name] = tokenizer.rank(name, matrix, depth, [""] * len(cells))
    about = {name: [""] * len(cells) for name in ABOUT}
    about |= {"dataset": ["sim"] * len(cells), "donor": cells.donor.astype(str).tolist()}
    about["label"] = cells.cell_type.astype(str).tolist()
    about |= more
    ids = [f"sim:c{i}" for i in range(len(cells))]
    table = cell_table(tokenizer, ids, about, present, counts)
    write_table(folder, table, tokenizer, shard)


def write_table(folder, table, tokenizer, shard, *, edition=1, older=()):
    """A store of the rows of `table`, `shard` a shard, after the shards `older`; returns all its shards."""
    shards = list(older)
    for first in range(0, len(table), shard):
        part = table.slice(first, shard)
        data = encode_shard(part)
        digest = storage.sha256(data)
        name = f"{len(shards):05d}-{digest}.arrow"
        storage.write_bytes(storage.join(folder, "shards", name), data)
        facts = {"name": name, "sha256": digest, "bytes": len(data), "rows": len(part)}
        shards.append(facts | {"index": index_of(data)})
    sink = io.BytesIO()
    words = tokenizer.to_arrow()
    with pa.ipc.new_file(sink, words.schema) as writer:
        writer.write_table(words)
    digest = storage.sha256(sink.getvalue())
    storage.write_bytes(storage.join(folder, f"vocabulary-{digest}.arrow"), sink.getvalue())
    vocabulary = {"name": f"vocabulary-{digest}.arrow", "sha256": digest}
    manifest = {"version": VERSION, "vocabulary": vocabulary, "shards": shards}
    storage.write_bytes(edition_path(folder, edition), json.dumps(manifest).encode())
    return shards


def run(folder, **changes):
    """A run of the tiny recipe on such a store, in `folder`."""
    recipe = override(load("pipelines.recipes.tiny:recipe"), {"run": str(folder), **changes})
    if not storage.exists(storage.join(str(folder), "store", "store.json")):
        write(storage.join(str(folder), "store"))
    return Run(recipe)
