"""Ask a running endpoint about the cells of an AnnData. Needs neither torch nor Ray."""

import json
import random
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import anndata as ad
import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from cellray.data.counts import check_counts

ARROW = "application/vnd.apache.arrow.stream"
RETRIED = (429, 502, 503, 504)
LONGEST_WAIT = 30.0
"""Seconds between two tries, at the most."""
PREFIX = "cellray_"
"""Of the obs columns that are written."""


class Client:
    """A connection to one endpoint.

        with Client("http://localhost:8000") as client:
            client.embed(adata)       # adata.obsm["X_cellray"]
            client.annotate(adata)    # adata.obs["cellray_label"]

    Raw counts are found in X, a layer or raw.X, and sent `chunk` cells at a time, fewer where the
    endpoint's limits ask for it. Answers depend on nothing but model and cell, so requests that
    fail on the way are sent again, up to `tries` times. `progress` is called with the cells done
    and all cells.

    ValueError for what the endpoint refuses, ConnectionError where it does not answer.
    """

    def __init__(
        self,
        url: str,
        *,
        chunk: int = 512,
        timeout: float = 60.0,
        tries: int = 8,
        progress: Callable[[int, int], None] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.url, self.chunk, self.tries, self.progress = url, chunk, tries, progress
        self._http = httpx.Client(base_url=url, timeout=timeout, headers=headers)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def model(self) -> dict[str, Any]:
        """What the endpoint says of its model: hashes, sizes, classes, limits."""
        models: list[dict[str, Any]] = self._send("GET", "/v1/models").json()["models"]
        return models[0]

    def vocabulary(self) -> pd.DataFrame:
        """Features of every modality: modality, id, symbol."""
        return pa.ipc.open_stream(self._send("GET", "/v1/vocabulary").content).read_pandas()

    def embed(
        self,
        adata: ad.AnnData,
        *,
        layer: str | None = None,
        names: str = "",
        key: str = "X_cellray",
    ) -> ad.AnnData:
        """`adata` with embeddings in obsm[key], and how well each cell fits in obs.

        `layer` is where raw counts are: None looks for them, "" is X, "raw" is raw.X, else a layer.
        `names` is the var column of the gene ids, "" for var_names.
        Writes obs cellray_ood, cellray_genes, cellray_kept, and uns["cellray"].
        """
        table, about = self._ask("/v1/embed", adata, layer, names)
        vectors = table["embedding"].combine_chunks()
        adata.obsm[key] = vectors.flatten().to_numpy().reshape(len(vectors), -1)
        _write_columns(adata, table, ("ood", "genes", "kept"), about)
        return adata

    def annotate(
        self,
        adata: ad.AnnData,
        *,
        layer: str | None = None,
        names: str = "",
    ) -> ad.AnnData:
        """`adata` with obs cellray_label and cellray_confidence, and what `embed` writes to obs and uns."""
        table, about = self._ask("/v1/annotate", adata, layer, names)
        _write_columns(adata, table, ("label", "confidence", "ood", "genes", "kept"), about)
        return adata

    def translate(
        self,
        adata: ad.AnnData,
        modality: str,
        *,
        layer: str | None = None,
        names: str = "",
    ) -> ad.AnnData:
        """A new AnnData [cells, features of `modality`]: expected counts, or chances of being counted."""
        table, about = self._ask(f"/v1/translate/{modality}", adata, layer, names)
        values = table["values"].combine_chunks()
        known = self.vocabulary()
        features = known[known["modality"] == modality].set_index("id")[["symbol"]].rename_axis(None)
        matrix = values.flatten().to_numpy().reshape(len(values), -1)
        return ad.AnnData(matrix, obs=adata.obs[[]].copy(), var=features, uns={"cellray": about})

    def _ask(
        self, path: str, adata: ad.AnnData, layer: str | None, names: str
    ) -> tuple[pa.Table, dict[str, Any]]:
        """The answers for all cells, in order, and what is said of them together."""
        matrix, genes, where = find_counts(adata, layer, names)
        limits = self.model()["limits"]
        step = min(self.chunk, limits["cells"])
        answers: list[tuple[pa.Table, float]] = []
        for start in range(0, adata.n_obs, step):
            stop = min(start + step, adata.n_obs)
            counts = sp.csr_matrix(matrix[start:stop])
            check_counts(counts.data, where)
            answers += self._ask_part(path, counts, genes, limits["bytes"])
            if self.progress:
                self.progress(stop, adata.n_obs)
        if not answers:
            raise ValueError(f"{where}: there are no cells to ask about")
        return pa.concat_tables([table for table, _ in answers]), _together(answers)

    def _ask_part(
        self, path: str, counts: sp.csr_matrix, genes: pa.Array, limit: int
    ) -> list[tuple[pa.Table, float]]:
        """Answers for some cells and the sum of their counts, in halves where one body cannot hold them."""
        body = _body(counts, genes)
        cells = counts.shape[0]
        if len(body) > limit and cells > 1:
            first = self._ask_part(path, counts[: cells // 2], genes, limit)
            return first + self._ask_part(path, counts[cells // 2 :], genes, limit)
        said = self._send("POST", path, content=body, headers={"content-type": ARROW, "accept": ARROW})
        return [(pa.ipc.open_stream(said.content).read_all(), float(counts.data.sum(dtype=np.float64)))]

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The answer, asked for again while the endpoint is busy or out of reach."""
        failure = ""
        wait = 0.0
        for attempt in range(self.tries):
            time.sleep(wait)
            wait = min(LONGEST_WAIT, 0.25 * 2**attempt * random.uniform(0.5, 1.5))
            try:
                response = self._http.request(method, path, **request)
            except httpx.TransportError as error:
                failure = str(error) or type(error).__name__
                continue
            if response.status_code not in RETRIED:
                return _accepted(response, self.url + path)
            failure = f"status {response.status_code}"
            asked = response.headers.get("retry-after", "")
            if asked.isdecimal():
                wait = min(LONGEST_WAIT, float(asked))
        raise ConnectionError(f"{self.url}{path} did not answer in {self.tries} tries: {failure}")


def find_counts(adata: ad.AnnData, layer: str | None = None, names: str = "") -> tuple[Any, pa.Array, str]:
    """The matrix of raw counts [cells, genes], the gene ids, and what to call the place in a message.

    ValueError, saying what stands where, if `layer` is None and no place holds raw counts.
    """
    places: dict[str, Any] = {"": adata.X, **dict(adata.layers)}
    if adata.raw is not None:
        places["raw"] = adata.raw.X
    if layer is not None and layer not in places:
        raise ValueError(f"this AnnData has no layer {layer!r}; it has {', '.join(places) or 'none'}")
    refusals = []
    for place, matrix in places.items() if layer is None else [(layer, places[layer])]:
        where = {"": "X", "raw": "raw.X"}.get(place, f"layers[{place!r}]")
        if matrix is None:
            continue
        try:
            check_counts(sp.csr_matrix(matrix[:1000]).data, where)
        except ValueError as error:
            refusals.append(str(error).partition(". ")[0])
            continue
        var = adata.raw.var if place == "raw" else adata.var
        if names and names not in var:
            raise ValueError(f"var has no column {names!r}; it has {', '.join(map(str, var)) or 'none'}")
        return matrix, pa.array((var[names] if names else var.index).astype(str), pa.string()), where
    raise ValueError(f"no raw counts here: {'; '.join(refusals) or 'X is empty'}. cellray needs raw counts.")


def _body(counts: sp.csr_matrix, genes: pa.Array) -> bytes:
    offsets = pa.array(counts.indptr.astype(np.int32))
    ids = pa.DictionaryArray.from_arrays(pa.array(counts.indices.astype(np.int32)), genes)
    data = counts.data.astype(np.uint32)
    narrow = np.uint16 if not data.size or data.max() < 1 << 16 else np.uint32
    batch = pa.record_batch(
        {
            "genes": pa.ListArray.from_arrays(offsets, ids),
            "counts": pa.ListArray.from_arrays(offsets, pa.array(data.astype(narrow))),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def _accepted(response: httpx.Response, url: str) -> httpx.Response:
    """`response` if it is an answer. ValueError with the endpoint's own words if it is a refusal."""
    if response.is_success:
        return response
    kind = response.headers.get("content-type", "")
    said = response.json()["detail"] if "problem+json" in kind else response.text[:200]
    if response.status_code >= 500:
        raise ConnectionError(f"{url} failed with status {response.status_code}: {said}")
    raise ValueError(f"{url} refused ({response.status_code}): {said}")


def _together(answers: list[tuple[pa.Table, float]]) -> dict[str, Any]:
    """What is said of all cells: the model, and how well the genes fit. All answers are of one model."""
    said = [_about(table) for table, _ in answers]
    models = {about["model"] for about in said}
    if len(models) > 1:
        raise ConnectionError("the endpoint changed its model while it was asked; ask again")
    match = dict(said[0]["match"])
    kept = sum(
        about["match"]["counts_kept"] * counts for about, (_, counts) in zip(said, answers, strict=True)
    )
    match["counts_kept"] = kept / max(sum(counts for _, counts in answers), 1.0)
    return {"model": models.pop(), **match}


def _about(table: pa.Table) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(table.schema.metadata[b"cellray"])
    return about


def _write_columns(adata: ad.AnnData, table: pa.Table, columns: Sequence[str], about: dict[str, Any]) -> None:
    for name in columns:
        values = table[name].to_numpy()
        adata.obs[PREFIX + name] = pd.Categorical(values) if name == "label" else values
    adata.uns["cellray"] = about
