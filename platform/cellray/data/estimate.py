"""What an ingest would take: time, memory and space, measured on a few rows of the files it would read."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cellray.data import compiled
from cellray.data.group import Part
from cellray.data.plan import Plan
from cellray.data.reading import open_source
from cellray.data.shards import FEW, codec
from cellray.data.tokens import narrow

FILES = 8
"""Files of which rows are tried, the largest."""
ROWS = 512
"""Rows tried of each."""
COPIES = 6
"""Copies of its counts, of 8 bytes each, that a task has in memory at the most."""
START = 200 << 20
"""Bytes of memory that a task has before it reads."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What all of it would take, about."""

    cells: int
    tokens: int
    """Numbers that are not 0, over all modalities."""
    cpu_seconds: float
    """Of one core: reading, checking, ranking, packing."""
    store_bytes: int
    scratch_bytes: int
    """Parts that are beside the store until it is committed."""
    task_bytes: int
    """Memory of the largest task."""
    tried: int
    """Rows that were read to tell."""


def estimate(plan: Plan) -> Estimate:
    """The estimate for `plan`, from the first rows of its largest files. Writes nothing."""
    parts = [part for group in plan.groups for part in group.parts]
    largest = sorted(parts, key=lambda part: -part.stored)[:FILES]
    tried = [_try(part) for part in largest]
    seen = max(1, sum(t.stored for t in tried))
    stored = sum(part.stored for part in parts)
    tokens = stored * sum(t.tokens for t in tried) // seen
    packed = stored * sum(t.packed for t in tried) // seen
    rows = [min(part.step, len(part.cells)) for part in parts]
    most = max(n * part.stored // max(1, len(part.cells)) for n, part in zip(rows, parts, strict=True))
    return Estimate(
        cells=sum(len(group.cells) for group in plan.groups),
        tokens=tokens,
        cpu_seconds=stored * sum(t.seconds for t in tried) / seen,
        store_bytes=packed,
        scratch_bytes=2 * packed,
        task_bytes=START + COPIES * 8 * most,
        tried=sum(t.rows for t in tried),
    )


@dataclass(frozen=True)
class _Trial:
    """What some rows took."""

    rows: int
    stored: int
    tokens: int
    packed: int
    seconds: float


def _try(part: Part) -> _Trial:
    """Read, rank and pack the first rows of `part`; the second time counts, as the first one compiles."""
    file = part.file
    with open_source(file.url, modality=file.modality, layer=file.layer, names=file.names) as source:
        stop = min(ROWS, len(part.cells))
        found = _once(part, source.rows(0, stop), 0.0)
        before = time.process_time()
        found = _once(part, source.rows(0, stop), before)
    share = stop / max(1, len(part.cells))
    return _Trial(stop, round(part.stored * share), found.tokens, found.packed, found.seconds)


def _once(part: Part, raw, before: float) -> _Trial:  # type: ignore[no-untyped-def]
    indptr, ids, counts = compiled.projected(
        raw.indptr.astype(np.int64),
        raw.indices.astype(np.int32, copy=False),
        raw.data.astype(np.uint32, copy=False),
        part.features.columns,
    )
    weights = np.ones((1, len(part.features.names)), np.float32)
    _, ids, counts = compiled.ranked(indptr, ids, counts, weights, np.zeros(len(indptr) - 1, np.int64))
    packed = sum(_packed(part, ids, counts))
    return _Trial(len(indptr) - 1, 0, len(ids), packed, time.process_time() - before)


def _packed(part: Part, ids: np.ndarray, counts: np.ndarray) -> Iterator[int]:
    """Bytes that ids and counts take in a shard."""
    high, most = np.count_nonzero(counts > 255), int(counts.max(initial=0))
    width = np.uint8 if high <= FEW * len(counts) else np.uint16 if most < 1 << 16 else np.uint32
    low, packer = np.minimum(counts, np.iinfo(width).max).astype(width), codec()
    for values in (ids.astype(narrow(len(part.features.names))), low):
        if len(values):
            yield len(packer.compress(pa.py_buffer(np.ascontiguousarray(values))))
