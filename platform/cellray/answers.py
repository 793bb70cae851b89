"""What a model says of the cells of a file, read by row ranges. Needs no Ray."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from cellray.data.modalities import normalise_names
from cellray.data.reading import Source, open_source
from cellray.data.tokens import Counts
from cellray.embedder import INPUT, Embedder, tokens_from

ROWS = 2048
"""Cells that are read and answered at a time."""
TRIED = 64
"""Cells at the beginning of a file on which `check` tries it."""

Answer = Callable[[Embedder, Counts], dict[str, np.ndarray]]
"""From a model and RNA tokens to columns of [cells] or [cells, numbers]."""


@dataclass(frozen=True)
class Answers:
    """What a model says of some cells of a file."""

    columns: dict[str, np.ndarray]
    """The answer's, then `genes`, the known features counted in each cell, and `kept`, the share of its
    counts on those."""
    about: dict[str, Any]
    """As in `Match.summary`, for all these cells; `counts` is how many they have."""


def embedding(model: Embedder, counts: Counts) -> dict[str, np.ndarray]:
    """Columns `embedding` and `ood`."""
    said = model.embed(counts)
    return {"embedding": said.vectors, "ood": said.ood}


def annotation(model: Embedder, counts: Counts) -> dict[str, np.ndarray]:
    """Columns `label`, `confidence` and `ood`."""
    said = model.annotate(counts)
    return {"label": said.labels, "confidence": said.confidence, "ood": said.ood}


def everything(model: Embedder, counts: Counts) -> dict[str, np.ndarray]:
    """Columns of `embedding`, and those of `annotation` if the model gives labels."""
    where, what = model.embed_and_annotate(counts)
    columns = {"embedding": where.vectors, "ood": where.ood}
    return columns | ({} if what is None else {"label": what.labels, "confidence": what.confidence})


@contextmanager
def open_cells(url: str, *, layer: str = "", names: str = "") -> Iterator[Source]:
    """The RNA of the file at `url`, as `open_source` opens it.

    Of a file of the CELLxGENE schema raw.X is read, where the counts are, unless `layer` is given.
    """
    with open_source(url, modality=INPUT, layer=layer, names=names) as source:
        if not len(source.cell_names):
            raise ValueError(f"{url} has no cells")
        if layer or not (source.cellxgene and source.has_raw):
            yield source
            return
    with open_source(url, modality=INPUT, layer="raw", names=names) as source:
        yield source


def check(model: Embedder, source: Source) -> None:
    """ValueError if the first cells hold no raw counts, or the model knows too few of the genes.

    Cheap: of a file stored by columns, which would be read whole, only the genes are looked at.
    """
    genes = genes_of(source, model)
    rows = sp.csr_matrix((0, len(genes)), dtype=np.int64)
    if not source.by_column:
        rows = source.rows(0, min(TRIED, len(source.cell_names)))
    tokens_from(model.tokenizer, rows, genes, where=source.where)


def answers(
    model: Embedder,
    source: Source,
    answer: Answer,
    start: int,
    stop: int,
    *,
    rows: int = ROWS,
    on_rows: Callable[[int], None] | None = None,
) -> Answers:
    """The answers of cells start … stop - 1, the same bits whatever `rows` are read at a time.

    `on_rows` hears of the cells done. ValueError where they hold no raw counts, UnknownGenes as in
    `tokens_from`.
    """
    genes = genes_of(source, model)
    parts: list[dict[str, np.ndarray]] = []
    depth = kept = 0
    for first in range(start, stop, rows):
        last = min(first + rows, stop)
        counts, match = tokens_from(model.tokenizer, source.rows(first, last), genes, where=source.where)
        parts.append(answer(model, counts) | {"genes": match.genes, "kept": match.kept})
        own = int(counts.total.sum())
        depth, kept = depth + own, kept + round(match.share * own)
        if on_rows:
            on_rows(last - start)
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return Answers(columns, match.summary() | {"counts": depth, "counts_kept": kept / max(depth, 1)})


def genes_of(source: Source, model: Embedder) -> list[str]:
    """The names of the genes by which the model knows most of them: ids, or the file's second names."""
    index = model.tokenizer.vocabularies[INPUT].index
    ids, symbols = source.feature_names.tolist(), source.symbols.tolist()

    def known(names: list[str]) -> int:
        return sum(name in index for name in normalise_names(names, "gene"))

    return max(ids, symbols, key=known)


def arrow(columns: dict[str, Any]) -> pa.Table:
    """The columns as an Arrow table; [cells, numbers] becomes lists of a fixed size."""
    return pa.table({name: _column(np.asarray(values)) for name, values in columns.items()})


def _column(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
