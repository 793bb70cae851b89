"""The bound: decode the token columns of Arrow IPC files from first to last, nothing else."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from tests.bench.harness.serve import Delivery, serve


def deliveries(folder: str) -> Iterator[Delivery]:
    for path in sorted(Path(folder).glob("**/*.arrow")):
        with pa.memory_map(str(path)) as source:
            schema = pa.ipc.open_file(source).schema
            wanted = [i for i, field in enumerate(schema) if field.name.endswith(("ids", "counts"))]
            if not wanted:
                continue
            options = pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)
            reader = pa.ipc.open_file(source, options=options)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                lists = [column.flatten().to_numpy() for column in batch.columns]
                # A page that is mapped has not been read yet: touch each.
                assert all(int(values[:: 4096 // values.itemsize].max()) >= 0 for values in lists)
                yield batch.num_rows, len(lists[0]), None


def main() -> None:
    serve(lambda: deliveries(sys.argv[1]), about="token columns alone")


if __name__ == "__main__":
    main()
