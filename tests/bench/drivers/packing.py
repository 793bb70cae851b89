"""The bound of an ingest into our format: decode X of .h5ad files as we do, pack as many ranked cells.

python -m tests.bench.drivers.packing STORE H5AD …
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import pyarrow as pa

from cellray.data.chunks import Numbers
from cellray.data.shards import BATCH, pack
from tests.bench.harness.serve import Delivery, serve

CELLS = 4_096
"""Cells decoded at a time, and then packed."""


def held(store: str) -> list[pa.RecordBatch]:
    """Record batches of a shard, of CELLS cells if there are so many, unpacked in memory."""
    path = max(Path(store, "shards").glob("*.arrow"), key=lambda path: path.stat().st_size)
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        return [reader.get_batch(i) for i in range(min(reader.num_record_batches, CELLS // BATCH))]


def portion(batches: list[pa.RecordBatch], cells: int) -> Iterator[pa.RecordBatch]:
    """The first `cells` cells of `batches`, which come again and again where there are fewer."""
    for batch in itertools.cycle(batches):
        yield batch.slice(0, cells)
        cells -= batch.num_rows
        if cells <= 0:
            return


def deliveries(batches: list[pa.RecordBatch], paths: list[str]) -> Iterator[Delivery]:
    for path in paths:
        with h5py.File(path, "r") as file:
            ends = file["X/indptr"][:]
            arrays = [Numbers(file[f"X/{name}"]) for name in ("data", "indices")]
            for first in range(0, len(ends) - 1, CELLS):
                last = min(first + CELLS, len(ends) - 1)
                own = (int(ends[first]), int(ends[last]))
                data, indices = (array.part(*own) for array in arrays)
                assert len(data) == len(indices)
                assert pack(portion(batches, last - first), batches[0].schema)
                yield last - first, len(indices), None


def main() -> None:
    store, *paths = sys.argv[1:]
    batches = held(store)
    serve(lambda: deliveries(batches, paths), about=f"{CELLS:,} cells at a time, one thread")


if __name__ == "__main__":
    main()
