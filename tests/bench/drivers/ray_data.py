"""Ray Data: Parquet list columns through `iter_batches` with a local shuffle buffer."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cellray import cluster
from tests.bench.harness.serve import Delivery, serve

CELLS = 1_024
BUFFER = 8_192
AHEAD = 16
"""A pass of so many batches may be read before its first is delivered: rounds are whole passes then."""


def deliveries(folder: str) -> Iterator[Delivery]:
    import ray

    dataset = ray.data.read_parquet(folder, shuffle="files")
    for table in dataset.iter_batches(
        batch_size=CELLS, batch_format="pyarrow", local_shuffle_buffer_size=BUFFER, prefetch_batches=2
    ):
        columns: Any = table
        ids, counts = (columns[name].combine_chunks() for name in ("ids", "counts"))
        counts.flatten().to_numpy()
        yield len(columns), len(ids.flatten().to_numpy()), columns["row"]


def batches(folder: str) -> int:
    """How many a pass has."""
    rows = sum(pq.ParquetFile(path).metadata.num_rows for path in Path(folder).glob("*.parquet"))
    return -(-rows // CELLS)


def main() -> None:
    cluster.prepare("local")
    with cluster.connect("local", cpus=2, object_store_bytes=1 << 30):
        from ray.data import DataContext

        context = DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        number = batches(sys.argv[1])
        window = number if number <= AHEAD else 1
        serve(
            lambda: deliveries(sys.argv[1]),
            origins=lambda column: column.to_pylist(),
            whole=True,
            window=window,
            first=window,
            about=f"local shuffle buffer of {BUFFER:,}, all processes of Ray",
        )


if __name__ == "__main__":
    main()
