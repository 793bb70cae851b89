"""What goes over the wire: bodies to counts, answers to bodies, and errors as problem+json.

Two bodies, told apart by Content-Type; genes are Ensembl ids or symbols, counts are raw.

application/json
    {"genes": [name, …], "cells": [{"i": [index of a gene, …], "x": [count, …]}, …]}
    {"cells": [{name: count, …}, …]}
    The first takes "total" in every cell, its depth over all genes where some were left out.

application/vnd.apache.arrow.stream
    A row a cell: genes list<string> or list<dictionary<string>>, counts list<integer or float>;
    total integer if wanted. Buffers are not compressed.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from cellray.data.counts import check_counts

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
PROBLEM = "application/problem+json"
KINDS = {
    "invalid": (400, "The request is malformed"),
    "not_found": (404, "There is nothing here"),
    "method_not_allowed": (405, "This address takes another method"),
    "too_large": (413, "The request is too large"),
    "unsupported": (415, "Bodies of this type are not read"),
    "empty": (422, "There are no cells or no genes"),
    "unknown_genes": (422, "Too few of the genes are known"),
    "wrong_scale": (422, "These are not raw counts"),
    "internal": (500, "The endpoint failed"),
}
"""Every kind of error, its HTTP status and title."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may hold."""

    bytes: int = 32 << 20
    """Of its body."""
    cells: int = 4096
    """In its body."""
    values: int = 1 << 24
    """Numbers in the answer to a translation."""


class Problem(Exception):
    """A request that gets an error of one of KINDS. `pointers` are JSON pointers into the body."""

    def __init__(self, kind: str, detail: str, *pointers: str) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.pointers = kind, detail, pointers
        self.status, self.title = KINDS[kind]

    def body(self) -> bytes:
        """As RFC 9457 has it."""
        said = {
            "type": f"urn:cellray:problem:{self.kind}",
            "kind": self.kind,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        return json.dumps(said | ({"pointers": list(self.pointers)} if self.pointers else {})).encode()


@dataclass(frozen=True)
class Query:
    """A body, read."""

    genes: list[str]
    """Names as the sender spells them."""
    counts: sp.csr_matrix
    """Raw counts [cells, genes], finite, whole and not negative."""
    total: np.ndarray | None
    """Depth of each cell over all genes, int64 [cells], if it was sent."""


def read(body: bytes, content_type: str, limits: Limits) -> Query:
    """The cells in `body`. Problem for whatever is wrong with it."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == JSON:
        query = _read_json(body, limits)
    elif kind == ARROW:
        query = _read_arrow(body, limits)
    else:
        raise Problem("unsupported", f"Content-Type is {kind or 'missing'}; send {JSON} or {ARROW}")
    if not query.counts.shape[0]:
        raise Problem("empty", "the body holds no cells")
    if not query.genes:
        raise Problem("empty", "the body names no genes")
    try:
        check_counts(query.counts.data, "the request")
    except ValueError as error:
        raise Problem("wrong_scale", str(error), f"/cells/{_first_odd(query.counts)}") from None
    return query


def write(columns: Mapping[str, np.ndarray], about: Mapping[str, Any], accept: str) -> tuple[bytes, str]:
    """An answer and its type: Arrow if `accept` names it, else JSON.

    `columns` hold an item or a vector a cell, `about` is what is said of all cells. Numbers keep
    their exact float32 values in JSON too.
    """
    if ARROW in accept:
        arrays = {name: _arrow_array(values) for name, values in columns.items()}
        table = pa.table(arrays).replace_schema_metadata({"cellray": json.dumps(about)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes(), ARROW
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    cells = [dict(zip(columns, row, strict=True)) for row in rows]
    return json.dumps({**about, "cells": cells}, allow_nan=False).encode(), JSON


def _arrow_array(values: np.ndarray) -> pa.Array:
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.array(values)


def _invalid(detail: str, *pointers: str) -> NoReturn:
    raise Problem("invalid", detail, *pointers)


def _first_odd(counts: sp.csr_matrix) -> int:
    """The first cell with a number that is no count."""
    data = counts.data
    odd = ~np.isfinite(data) | (data < 0) | (data != np.rint(data)) | (data > 2**32 - 1)
    return int(np.searchsorted(counts.indptr, np.argmax(odd), side="right")) - 1


def _read_json(body: bytes, limits: Limits) -> Query:
    try:
        said = json.loads(body.decode(), parse_constant=_refuse_constant, object_pairs_hook=_once)
    except RecursionError:
        _invalid("the JSON is nested too deeply")
    except ValueError as error:
        _invalid(f"the body is no JSON: {error}")
    if not isinstance(said, dict) or not isinstance(said.get("cells"), list):
        _invalid('the body must be an object with a list "cells"', "/cells")
    if odd := sorted(set(said) - {"genes", "cells"}):
        _invalid(f"{odd[0]!r} is not known here; a body has genes and cells", f"/{odd[0]}")
    cells = said["cells"]
    _check_number_of_cells(len(cells), limits)
    for n, cell in enumerate(cells):
        if not isinstance(cell, dict):
            _invalid("a cell must be an object", f"/cells/{n}")
    read_cells = _read_indexed if "genes" in said else _read_named
    genes, indices, values, lengths, total = read_cells(said, cells)
    try:
        data = np.array(values, np.float64)
    except OverflowError:
        raise Problem("wrong_scale", "the request has a number too large for a count") from None
    indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    counts = sp.csr_matrix((data, np.array(indices, np.int64), indptr), shape=(len(cells), len(genes)))
    return Query(genes, counts, total)


Parts = tuple[list[str], list[int], list[float], list[int], np.ndarray | None]
"""Genes, then index and value of every count, the number of counts of every cell, and totals."""


def _read_indexed(said: dict[str, Any], cells: list[dict[str, Any]]) -> Parts:
    genes = said["genes"]
    if not isinstance(genes, list) or not set(map(type, genes)) <= {str}:
        _invalid("genes must be a list of names", "/genes")
    indices: list[int] = []
    values: list[float] = []
    totals: list[int] = []
    for n, cell in enumerate(cells):
        i, x = cell.get("i"), cell.get("x")
        if not isinstance(i, list) or not isinstance(x, list) or len(i) != len(x):
            _invalid('a cell must have lists "i" and "x" of one length', f"/cells/{n}")
        if set(cell) - {"i", "x", "total"}:
            _invalid("a cell has i, x and total, and nothing else", f"/cells/{n}")
        if not set(map(type, i)) <= {int} or (i and not 0 <= min(i) <= max(i) < len(genes)):
            _invalid(f"i must be whole numbers from 0 to {len(genes) - 1}", f"/cells/{n}/i")
        if not set(map(type, x)) <= {int, float}:
            _invalid("x must be numbers", f"/cells/{n}/x")
        if "total" in cell:
            if type(cell["total"]) is not int or not 0 <= cell["total"] < 2**62:
                _invalid("total must be a whole number", f"/cells/{n}/total")
            totals.append(cell["total"])
        indices += i
        values += x
    if totals and len(totals) != len(cells):
        _invalid("total must stand in every cell or in none", "/cells")
    lengths = [len(cell["i"]) for cell in cells]
    return genes, indices, values, lengths, np.array(totals, np.int64) if totals else None


def _read_named(_: dict[str, Any], cells: list[dict[str, Any]]) -> Parts:
    places: dict[str, int] = {}
    indices: list[int] = []
    values: list[float] = []
    for n, cell in enumerate(cells):
        if not set(map(type, cell.values())) <= {int, float}:
            _invalid('a cell must map genes to counts; for "i" and "x" the body needs "genes"', f"/cells/{n}")
        indices += [places.setdefault(gene, len(places)) for gene in cell]
        values += cell.values()
    return list(places), indices, values, [len(cell) for cell in cells], None


def _check_number_of_cells(cells: int, limits: Limits) -> None:
    if cells > limits.cells:
        raise Problem("too_large", f"the body holds more than {limits.cells:,} cells; send fewer at a time")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless a key stands in it twice: its first count would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object names a key twice")
    return found


def _read_arrow(body: bytes, limits: Limits) -> Query:
    try:
        _refuse_compressed(body)
        with pa.ipc.open_stream(body) as stream:
            _check_columns(stream.schema)
            batches = []
            cells = 0
            for batch in stream:
                cells += batch.num_rows
                _check_number_of_cells(cells, limits)
                batch.validate(full=True)
                batches.append(batch)
        return _from_batches(batches)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, struct.error) as error:
        raise Problem("invalid", f"the body is no Arrow stream as documented: {error}") from None


def _from_batches(batches: Sequence[pa.RecordBatch]) -> Query:
    places: dict[str, int] = {}
    indices, values, lengths, totals = [], [], [], []
    for batch in batches:
        genes, counts = batch["genes"], batch["counts"]
        if genes.null_count or counts.null_count:
            raise ValueError("a cell is null")
        sizes = genes.value_lengths().to_numpy()
        if not np.array_equal(sizes, counts.value_lengths().to_numpy()):
            raise ValueError("a cell has not as many genes as counts")
        indices.append(_places(genes.flatten(), places))
        values.append(_plain(counts.flatten()))
        lengths.append(sizes.astype(np.int64))
        if "total" in batch.schema.names:
            totals.append(_plain(batch["total"]).astype(np.int64))
    if not batches:
        raise Problem("empty", "the body holds no cells")
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    counts = sp.csr_matrix(
        (np.concatenate(values), np.concatenate(indices), indptr), shape=(len(indptr) - 1, len(places))
    )
    return Query(list(places), counts, np.concatenate(totals) if totals else None)


def _places(genes: pa.Array, places: dict[str, int]) -> np.ndarray:
    """Index of each gene in `places`, int64, which takes up names not seen before."""
    coded = genes if pa.types.is_dictionary(genes.type) else genes.dictionary_encode()
    names = coded.dictionary.to_pylist()
    if coded.null_count or None in names:
        raise ValueError("a gene is null")
    found = np.fromiter((places.setdefault(name, len(places)) for name in names), np.int64, len(names))
    return found[coded.indices.to_numpy().astype(np.int64)] if len(names) else np.empty(0, np.int64)


def _plain(values: pa.Array) -> np.ndarray:
    """Numbers of an Arrow array, none of them null."""
    if values.null_count:
        raise ValueError("a number is null")
    numbers: np.ndarray = values.to_numpy()
    return numbers.astype(np.float64) if numbers.dtype == np.float16 else numbers


def _check_columns(schema: pa.Schema) -> None:
    """ValueError unless the columns are those documented, each once."""
    names = schema.names
    if len(set(names)) < len(names) or not {"genes", "counts"} <= set(names) <= set(_COLUMNS):
        raise ValueError(f"its columns are {', '.join(names)}; genes and counts are needed, {_ALLOWED}")
    for field in schema:
        if not _COLUMNS[field.name](field.type):
            raise ValueError(f"column {field.name} is of type {field.type}; {_ALLOWED}")


def _is_text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


_ALLOWED = "allowed are genes list<text>, counts list<number>, total integer"
_COLUMNS = {
    "genes": lambda kind: _is_list(kind) and _is_text(kind.value_type),
    "counts": lambda kind: _is_list(kind) and _is_number(kind.value_type),
    "total": pa.types.is_integer,
}


def _refuse_compressed(body: bytes) -> None:
    """ValueError if a batch is compressed: a small body could unpack to any size."""
    messages = pa.ipc.MessageReader.open_stream(body)
    while True:
        try:
            message = messages.read_next_message()
        except StopIteration:
            return
        head = message.metadata.to_pybytes()
        table = _field(head, _follow(head, 0), 2)
        if table and message.type == "dictionary":
            table = _field(head, _follow(head, table), 1)
        if table and message.type != "schema" and _field(head, _follow(head, table), 3):
            raise ValueError("its buffers are compressed; send them plain, compressed bodies are not read")


def _follow(head: bytes, at: int) -> int:
    """Where the flatbuffer offset at `at` leads."""
    return at + int(struct.unpack_from("<I", head, at)[0])


def _field(head: bytes, table: int, number: int) -> int:
    """Where field `number` of the flatbuffer table at `table` is; 0 if it has none."""
    fields = table - int(struct.unpack_from("<i", head, table)[0])
    if 4 + 2 * number >= int(struct.unpack_from("<H", head, fields)[0]):
        return 0
    offset = int(struct.unpack_from("<H", head, fields + 4 + 2 * number)[0])
    return table + offset if offset else 0
