"""What the student learns from: the teacher's vectors, computed once and joined by cell id."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cellray.data import arrow, storage
from cellray.data.store import Batch, Store
from cellray.data.tokens import Tokenizer
from cellray.model.teacher import Teacher
from cellray.train.batches import plain_tokens, present
from cellray.train.contexts import Contexts

CHUNK = 64
"""Cells that the teacher sees at a time: so few that the time between two is short with any model."""
READ = 1024
"""Cells that are read for it at a time."""


class TeacherVectors:
    """Joint vectors and modality summaries of the cells of a store, centred and scaled.

    Raw vectors share a large common part, which would make any two cells look alike; each kind
    is centred on its mean and divided by one number, its root mean square.
    """

    def __init__(self, table: pa.Table, cell_ids: pa.Array) -> None:
        """`table` as `teacher_table` makes it; `cell_ids` in store order."""
        about = json.loads(table.schema.metadata[b"cellray"])
        places = pa.compute.index_in(cell_ids, value_set=table["cell_id"].combine_chunks())
        if places.null_count:
            missing = cell_ids.filter(pa.compute.is_null(places))
            raise ValueError(
                f"{places.null_count:,} of {len(cell_ids):,} cells have no teacher vector, "
                f"{missing[0].as_py()!r} for one: the vectors belong to another store"
            )
        order = places.to_numpy()
        width, names = about["width"], about["modalities"]
        joint = _matrix(table["joint"], width)[order]
        summaries = _matrix(table["summaries"], width * len(names))[order].reshape(-1, len(names), width)
        has = (table["present"].to_numpy()[order][:, None] >> np.arange(len(names))) & 1 == 1
        self.mean, self.spread = _centre(joint, np.ones(len(joint), bool))
        self.joint = torch.from_numpy((joint - self.mean) / self.spread)
        self.centres: list[tuple[np.ndarray, float]] = []
        """Mean and spread of each modality's summaries."""
        for i in range(len(names)):
            mean, spread = _centre(summaries[:, i], has[:, i])
            self.centres.append((mean, spread))
            summaries[:, i] = (summaries[:, i] - mean) / spread
        self.summaries = torch.from_numpy(summaries)

    def of(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Joint vectors [cells, width] and summaries [cells, modalities, width] of store rows."""
        at = torch.from_numpy(rows)
        return self.joint[at], self.summaries[at]


@torch.inference_mode()
def teacher_table(
    teacher: Teacher,
    store: Store,
    rows: np.ndarray,
    *,
    device: str = "cpu",
    between: Callable[[], None] = lambda: None,
) -> pa.Table:
    """The teacher's view of the cells at `rows`: cell_id, present, joint, summaries (flattened).

    `between` is called after every CHUNK of cells; what it raises ends this.
    """
    teacher.eval()
    joint, summaries = [], []
    contexts = _told(teacher, store)
    for first in range(0, len(rows), READ):
        batch = store.read(rows[first : first + READ])
        for cells in np.split(np.arange(len(batch.rows)), range(CHUNK, len(batch.rows), CHUNK)):
            j, s = _vectors(teacher, store.tokenizer, batch.take(cells), contexts, device=device)
            joint.append(j)
            summaries.append(s)
            between()
    width, names = teacher.width, list(teacher.names)
    about = {"width": width, "modalities": names}
    columns = {
        "cell_id": store.cells["cell_id"].take(pa.array(rows)),
        "present": store.cells["present"].take(pa.array(rows)),
        "joint": _lists(np.concatenate(joint) if joint else np.empty((0, width))),
        "summaries": _lists(np.concatenate(summaries) if summaries else np.empty((0, width * len(names)))),
    }
    return pa.table(columns).replace_schema_metadata({"cellray": json.dumps(about)})


@torch.inference_mode()
def teacher_vectors(
    teacher: Teacher,
    store: Store,
    rows: np.ndarray,
    *,
    shown: tuple[str, ...] | None = None,
    device: str = "cpu",
    contexts: Contexts | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Joint vectors and flattened summaries of some cells, from the modalities `shown` (None: all).

    What the teacher is told of the cells is in `contexts`, by default as the store has it.
    """
    contexts = contexts or _told(teacher, store)
    return _vectors(teacher, store.tokenizer, store.read(rows), contexts, shown=shown, device=device)


def _told(teacher: Teacher, store: Store) -> Contexts | None:
    """What the teacher is told of the cells of a store; None where that is nothing."""
    return Contexts(store.cells, teacher.contexts) if teacher.contexts else None


def _vectors(
    teacher: Teacher,
    tokenizer: Tokenizer,
    batch: Batch,
    contexts: Contexts | None,
    *,
    shown: tuple[str, ...] | None = None,
    device: str,
) -> tuple[np.ndarray, np.ndarray]:
    tokens = {
        name: plain_tokens(
            counts, tokenizer.vocabularies[name].modality, encoding=teacher.encoding, device=device
        )
        for name, counts in batch.counts.items()
    }
    if contexts is not None:
        about = contexts.of(batch.rows, device=device)
        tokens = {name: replace(own, about=about) for name, own in tokens.items()}
    has = present(batch, len(teacher.names))
    if shown is not None:
        has = has & np.isin(teacher.names, shown)
    joint, summaries = teacher(tokens, torch.from_numpy(has).to(device))
    return joint.float().cpu().numpy(), summaries.float().flatten(1).cpu().numpy()


def read_table(url: str) -> pa.Table:
    """The Arrow table in the file at `url`."""
    return arrow.decode(storage.read_bytes(url))


def _centre(vectors: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean [width] and root mean square about it, of the real rows; float32."""
    if not real.any():
        return np.zeros(vectors.shape[1], np.float32), 1.0
    mean = vectors[real].mean(axis=0, dtype=np.float64)
    spread = np.sqrt(np.square(vectors[real] - mean).mean(dtype=np.float64))
    return mean.astype(np.float32), float(max(spread, 1e-6))


def _lists(matrix: np.ndarray) -> pa.Array:
    flat = pa.array(matrix.astype(np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy().reshape(-1, width)
