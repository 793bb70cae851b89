"""python -m pipelines.ask RECIPE [key=value …]: serve RUN/bundle here, ask it about held-out cells, stop it.

What it answers must be what the embedder says offline, bit for bit. Result in RUN/endpoint.json.
"""

import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from cellray import cluster
from cellray.data import storage
from cellray.train.recipe import Recipe
from pipelines.command import Options, main
from pipelines.export import has_rna, some

CELLS = 256
"""Most held-out cells that are asked about."""


def run(recipe: Recipe, options: Options) -> None:
    from cellray.train.run import Run

    where = Run(recipe)
    if options.dry_run:
        print(f"would serve {where.path('bundle')} on this machine and ask about {CELLS} held-out cells")
        return
    with cluster.connect():
        print(json.dumps(ask(where), indent=1))


def ask(run: Any) -> dict[str, Any]:
    """Start the endpoint, send held-out cells one by one as JSON and together as Arrow, compare, stop it.

    Ray must be connected. ValueError if RUN has no bundle, or as `alone`.
    """
    from ray import serve

    from cellray import bundle
    from cellray.embedder import tokens_from
    from serve.app import build

    offline = bundle.load(run.path("bundle"))
    genes = run.store.tokenizer.vocabularies["rna"].ids
    rows = some(np.flatnonzero(run.test & has_rna(run)), CELLS)
    counts = run.store.read(rows).counts["rna"].matrix(len(genes))
    wanted = offline.embed(tokens_from(offline.tokenizer, counts, genes)[0]).vectors
    application = build({"bundle": run.path("bundle")})
    with serving() as url:
        serve.run(application, name="cellray", route_prefix="/", logging_config={"log_level": "ERROR"})
        facts = _asked(url, counts, genes, wanted)
    storage.write_bytes(run.path("endpoint.json"), json.dumps(facts, indent=1).encode())
    return facts


def alone() -> None:
    """ValueError if this Ray serves something already: it would be stopped with the endpoint asked here."""
    from ray import serve

    if serve.status().proxies:
        raise ValueError(
            "Ray Serve runs on this cluster already, and would be stopped with the endpoint that is asked "
            "here: use a Ray without it; without RAY_ADDRESS this machine's own is started"
        )


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Ray Serve on a free port of this machine's loopback: its URL. Stopped at the end, started or not.

    ValueError as `alone`.
    """
    from ray import serve

    alone()
    with held_port() as port:
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A free port of this machine's loopback that nobody else is given until the end.

    Only a socket that asks for it by number and sets SO_REUSEPORT, as Serve's does, can bind it too, and it
    gets every connection, since the one here does not listen.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


def _asked(url: str, counts: Any, genes: tuple[str, ...], wanted: np.ndarray) -> dict[str, Any]:
    """What came back: requests, failures, median time of a one-cell request, difference to offline."""
    import anndata as ad
    import httpx
    import pandas as pd

    from cellray.client import Client

    times, failed, worst = [], 0, 0.0
    with httpx.Client(base_url=url, timeout=30) as http:
        for i in range(len(wanted)):
            row = counts[i]
            cell = {"i": row.indices.tolist(), "x": row.data.astype(int).tolist()}
            began = time.perf_counter()
            answer = http.post("/v1/embed", json={"genes": genes, "cells": [cell]})
            times.append(time.perf_counter() - began)
            if answer.status_code != 200:
                failed += 1
                continue
            said = np.asarray(answer.json()["cells"][0]["embedding"], np.float32)
            worst = max(worst, float(np.abs(said - wanted[i]).max()))
    data = ad.AnnData(counts.copy(), var=pd.DataFrame(index=list(genes)))
    data.obs_names = [str(i) for i in range(len(wanted))]
    with Client(url) as client:
        client.embed(data)
    worst = max(worst, float(np.abs(data.obsm["X_cellray"] - wanted).max()))
    return {
        "requests": len(times) + 1,
        "failed": failed,
        "cells": 2 * len(wanted),
        "p50_ms": round(1e3 * float(np.median(times)), 3),
        "p99_ms": round(1e3 * float(np.quantile(times, 0.99)), 3),
        "max_abs_difference_to_offline": worst,
    }


if __name__ == "__main__":
    sys.exit(main("Serve a run's bundle here, ask it about held-out cells, and stop it.", run))
