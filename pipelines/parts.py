"""The parts that `pipelines.embed` writes, and what makes them. Needs no Ray."""

import hashlib
import io
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellray import bundle
from cellray.answers import answers, arrow, everything, open_cells
from cellray.data import storage
from cellray.data.reading import Source
from cellray.embedder import Embedder

SCHEMA = 1
"""Of the parts and the manifest."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A file that is embedded."""

    given: str
    """The path or URL as it was written."""
    url: str
    dataset: str = ""
    """Where the file comes from an atlas table."""
    layer: str = ""
    names: str = ""
    cells: int
    rows: int
    """Cells of a part; more than were asked for where the file is stored by columns."""
    identity: dict[str, Any]
    """What its content is, as in `cellray.data.lineage`."""

    @property
    def about(self) -> dict[str, Any]:
        """What the manifest says of it, and what the names of its parts depend on."""
        own = {name: getattr(self, name) for name in ("dataset", "layer", "names", "cells")}
        return {"file": self.given, **own, **self.identity}


@dataclass(frozen=True, kw_only=True)
class Part:
    """Cells start … stop - 1 of a file."""

    name: str
    file: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that is to be done."""

    bundle: str
    model: str
    """Hash of the bundle."""
    output: str
    files: list[File]
    parts: list[Part]

    def path(self, *names: str) -> str:
        """A file below OUTPUT."""
        return storage.join(self.output, *names)


def plan(model: str, files: Sequence[File]) -> list[Part]:
    """The parts, in the order of files and cells."""
    parts = []
    for number, file in enumerate(files):
        for start in range(0, file.cells, file.rows):
            stop = min(start + file.rows, file.cells)
            content = json.dumps([SCHEMA, model, file.about, start, stop], sort_keys=True)
            key = hashlib.sha256(content.encode()).hexdigest()[:16]
            name = f"{number:05d}-{start:09d}-{key}.parquet"
            parts.append(Part(name=name, file=number, start=start, stop=stop))
    return parts


class Worker:
    """Makes parts. Loads the model once, and keeps the file that it reads open."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._model: Embedder | None = None
        self._stack, self._opened = ExitStack(), -1

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Facts of the parts numbered `item` as JSON, or errors: as values, which Ray does not wrap."""
        numbers: list[int] = batch["item"].tolist()
        facts, errors = [""] * len(numbers), [""] * len(numbers)
        for i, number in enumerate(numbers):
            try:
                facts[i] = json.dumps(self._made(self.job.parts[number]))
            except (ValueError, OSError) as error:
                errors[i] = str(error)
        return {"item": numbers, "facts": facts, "error": errors}

    def _made(self, part: Part) -> dict[str, Any]:
        """What the part holds, once its file is there; an earlier run may have written it."""
        url = self.job.path("parts", part.name)
        if not storage.exists(url):
            storage.write_bytes(url, self._encoded(part))
        return facts_of(url)

    def _encoded(self, part: Part) -> bytes:
        source, file = self._source(part.file), self.job.files[part.file]
        said = answers(self._loaded(), source, everything, part.start, part.stop)
        cells = source.cell_names[part.start : part.stop].astype(str)
        prefix = f"{file.dataset}:" if file.dataset else ""
        named = {"cell_id": np.char.add(prefix, cells), "file": np.full(len(cells), file.given)}
        about = {"model": self.job.model, "start": part.start, "stop": part.stop, **said.about}
        whole = arrow(named | said.columns).replace_schema_metadata({"cellray": json.dumps(about)})
        sink = io.BytesIO()
        pq.write_table(whole, sink)
        return sink.getvalue()

    def _loaded(self) -> Embedder:
        if self._model is None:
            model = bundle.load(self.job.bundle)
            if model.hash != self.job.model:
                raise ValueError(f"bundle {self.job.bundle} was replaced meanwhile: start again elsewhere")
            self._model = model
        return self._model

    def _source(self, number: int) -> Source:
        if number != self._opened:
            self._stack.close()
            self._opened = -1
            file = self.job.files[number]
            opened = open_cells(file.url, layer=file.layer, names=file.names)
            self._current = self._stack.enter_context(opened)
            self._opened = number
        return self._current


def facts_of(url: str) -> dict[str, Any]:
    """Size, hash and what a part says of itself. ValueError if it is no such part."""
    data = storage.read_bytes(url)
    try:
        own = json.loads(pq.read_schema(io.BytesIO(data)).metadata[b"cellray"])
    except (pa.ArrowInvalid, KeyError, TypeError):
        raise ValueError(f"{url} is damaged, or no part that this command wrote: remove it") from None
    return {"bytes": len(data), "sha256": storage.sha256(data), **own}
