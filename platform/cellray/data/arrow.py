"""Arrow tables as bytes and back: the one way in which whole small tables are stored."""

import io

import pyarrow as pa


def encode(table: pa.Table) -> bytes:
    """`table` as an Arrow IPC file. The same rows in the same chunks give the same bytes."""
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def decode(data: bytes) -> pa.Table:
    """The table that `encode` made into `data`."""
    return pa.ipc.open_file(pa.BufferReader(data)).read_all()
