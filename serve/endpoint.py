"""The routes, as an ASGI application: bodies in, answers of one model out. Needs no Ray."""

import re
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cellray import __version__
from cellray.data.tokens import Counts
from cellray.embedder import INPUT, Embedder, UnknownGenes, tokens_from
from serve.api import ARROW, PROBLEM, Limits, Problem, read, write

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
STATUS = {404: "not_found", 405: "method_not_allowed"}

Answer = Callable[[Counts], dict[str, np.ndarray]]


def application(embedder: Embedder, limits: Limits | None = None) -> Starlette:
    """Every route of the endpoint for one model. Bodies are never logged."""
    endpoint = Endpoint(embedder, limits or Limits())
    routes = [
        Route("/v1/embed", endpoint.embed, methods=["POST"]),
        Route("/v1/annotate", endpoint.annotate, methods=["POST"]),
        Route("/v1/translate/{modality}", endpoint.translate, methods=["POST"]),
        Route("/v1/models", endpoint.models, methods=["GET"]),
        Route("/v1/models/{model}", endpoint.model, methods=["GET"]),
        Route("/v1/vocabulary", endpoint.vocabulary, methods=["GET"]),
        Route("/healthz", endpoint.health, methods=["GET"]),
        Route("/readyz", endpoint.health, methods=["GET"]),
    ]
    handlers: dict[Any, Any] = {Problem: _problem, HTTPException: _http_error, Exception: _failure}
    return Starlette(routes=routes, exception_handlers=handlers)


class Endpoint:
    """One model's answers. Each is a function of model and body alone, so asking again is safe."""

    def __init__(self, embedder: Embedder, limits: Limits) -> None:
        self.embedder, self.limits = embedder, limits

    async def embed(self, request: Request) -> Response:
        """Embedding of every cell."""

        def answer(counts: Counts) -> dict[str, np.ndarray]:
            said = self.embedder.embed(counts)
            return {"embedding": said.vectors, "ood": said.ood}

        return await self._answer(request, answer)

    async def annotate(self, request: Request) -> Response:
        """Label of every cell, and how sure the model is of it."""
        if self.embedder.head is None:
            raise Problem("not_found", "this model gives no labels: its training cells had none")

        def answer(counts: Counts) -> dict[str, np.ndarray]:
            said = self.embedder.annotate(counts)
            return {"label": said.labels, "confidence": said.confidence, "ood": said.ood}

        return await self._answer(request, answer)

    async def translate(self, request: Request) -> Response:
        """Every feature of another modality, as the model expects it in each cell."""
        modality = request.path_params["modality"]
        known = self.embedder.tokenizer.vocabularies
        if modality not in known:
            raise Problem("not_found", f"this model knows the modalities {', '.join(known)}")
        most = self.limits.values // len(known[modality])

        def answer(counts: Counts) -> dict[str, np.ndarray]:
            if len(counts) > most:
                raise Problem("too_large", f"at most {most:,} cells at a time are translated to {modality}")
            return {"values": self.embedder.translate(counts, modality)}

        return await self._answer(request, answer)

    async def models(self, request: Request) -> Response:
        """The one model of this endpoint."""
        return JSONResponse({"models": [self._about()]})

    async def model(self, request: Request) -> Response:
        """What is to be known about the model before asking it."""
        about = self._about()
        if request.path_params["model"] not in (about["id"], about["sha256"]):
            raise Problem("not_found", f"the model here is {about['id']}")
        return JSONResponse(about)

    async def vocabulary(self, request: Request) -> Response:
        """Features of every modality, Arrow: modality, id, symbol; in the order of translations."""
        table = self.embedder.tokenizer.to_arrow().select(["modality", "id", "symbol"])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
            writer.write_table(table.replace_schema_metadata(None))
        return Response(sink.getvalue().to_pybytes(), media_type=ARROW)

    async def health(self, request: Request) -> Response:
        """The model is loaded and was tried on its golden cells before this answers."""
        return JSONResponse({"status": "ok", "model": self.embedder.hash[:12]})

    async def _answer(self, request: Request, answer: Answer) -> Response:
        body = await _body(request, self.limits.bytes)
        headers = request.headers
        sent, wanted = headers.get("content-type", ""), headers.get("accept", "")
        data, kind, times = await run_in_threadpool(self._compute, body, sent, wanted, answer)
        timing = ", ".join(f"{name};dur={1e3 * seconds:.2f}" for name, seconds in times.items())
        said = {"server-timing": timing, "x-model-sha256": self.embedder.hash, "x-request-id": _id(request)}
        return Response(data, headers=said, media_type=kind)

    def _compute(
        self, body: bytes, content_type: str, accept: str, answer: Answer
    ) -> tuple[bytes, str, dict[str, float]]:
        """The body of the answer, its type, and the seconds each step took."""
        started = time.perf_counter()
        query = read(body, content_type, self.limits)
        tokenizer = self.embedder.tokenizer
        try:
            counts, match = tokens_from(
                tokenizer, query.counts, query.genes, total=query.total, where="the request"
            )
        except UnknownGenes as error:
            raise Problem("unknown_genes", str(error)) from None
        except ValueError as error:
            raise Problem("invalid", str(error)) from None
        decoded = time.perf_counter()
        columns = answer(counts) | {"genes": match.genes, "kept": match.kept}
        inferred = time.perf_counter()
        about = {"model": self.embedder.hash, "match": match.summary()}
        data, kind = write(columns, about, accept)
        times = {"decode": decoded - started, "infer": inferred - decoded}
        return data, kind, times | {"encode": time.perf_counter() - inferred}

    def _about(self) -> dict[str, Any]:
        model = self.embedder
        datasets = model.about.get("datasets", [])
        return {
            "id": model.hash[:12],
            "name": model.about.get("name", ""),
            "sha256": model.hash,
            "tokenizer": model.tokenizer.hash,
            "cellray": __version__,
            "width": model.width,
            "genes": len(model.tokenizer.vocabularies[INPUT]),
            "modalities": {name: len(v) for name, v in model.tokenizer.vocabularies.items()},
            "classes": list(model.classes),
            "species": sorted({str(d["species"]) for d in datasets if d.get("species")}),
            "limits": {"bytes": self.limits.bytes, "cells": self.limits.cells, "values": self.limits.values},
        }


async def _body(request: Request, limit: int) -> bytes:
    """The body, unless it is, or says it is, larger than `limit` bytes: then no more of it is read."""
    too_large = Problem("too_large", f"the body is larger than {limit:,} bytes; send fewer cells at a time")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Problem("unsupported", "compressed bodies are not read; send it plain")
    declared = request.headers.get("content-length", "0")
    if not (declared.isascii() and declared.isdigit()):
        raise Problem("invalid", "Content-Length is no number")
    if int(declared[:20]) > limit:
        raise too_large
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
    except ClientDisconnect:
        raise Problem("invalid", "the sender left before the end of the body") from None
    return b"".join(parts)


def _id(request: Request) -> str:
    """The sender's request id where it is harmless, else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _respond(request: Request, problem: Problem, headers: dict[str, str] | None = None) -> Response:
    said = {"x-request-id": _id(request), **(headers or {})}
    return Response(problem.body(), problem.status, said, media_type=PROBLEM)


async def _problem(request: Request, error: Problem) -> Response:
    return _respond(request, error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    kind = STATUS.get(error.status_code, "invalid")
    return _respond(request, Problem(kind, error.detail), dict(error.headers or {}))


async def _failure(request: Request, error: Exception) -> Response:
    """What went wrong is in the log, under the request's id; the sender learns only that it did."""
    return _respond(request, Problem("internal", "the endpoint failed; try again, or tell its operator"))
