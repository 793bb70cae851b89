"""The Serve application: `serve run serve.app:build bundle=PATH`."""

import asyncio
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields

import ray
from ray import serve
from ray.serve import Application
from starlette.applications import Starlette

from cellray import bundle, cluster
from cellray.data import storage
from serve.api import Limits
from serve.endpoint import application

EXPOSED = """\
warning: the Ray that starts here listens on every network interface, with a token before it. To keep it on
this machine, run `make serve BUNDLE=PATH`, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_AUTH_MODE=token
before `serve run`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `build` takes."""

    bundle: str
    """Folder or URL of the student bundle, as every replica can read it; else what CELLRAY_BUNDLE says."""
    replicas: int = 1
    """Copies of the model, each on one CPU."""
    max_bytes: int = Limits.bytes
    """Of a request's body."""
    max_cells: int = Limits.cells
    """In a request's body."""


class Model:
    """One replica: loads the bundle and answers over HTTP."""

    def __init__(self, url: str, limits: Limits) -> None:
        self._application = application(bundle.load(url), limits)

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._application

    async def check_health(self) -> None:
        """Serve replaces a replica whose event loop does not come round to this."""
        await asyncio.sleep(0)


def build(args: Mapping[str, str]) -> Application:
    """The application for `bundle=PATH`, which is checked whole before anything is deployed.

    Also `replicas=`, `max_bytes=` and `max_cells=`. ValueError for other settings or a bad bundle.
    """
    settings = parse(args)
    bundle.load(settings.bundle)
    if not ray.is_initialized() and cluster.exposed():  # then `serve run` is about to start one
        print(EXPOSED, file=sys.stderr)
    deployment = serve.deployment(
        name="model",
        num_replicas=settings.replicas,
        max_ongoing_requests=16,
        max_queued_requests=64,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        ray_actor_options={"num_cpus": 1},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=10,
    )(serve.ingress()(Model))
    limits = Limits(bytes=settings.max_bytes, cells=settings.max_cells)
    return deployment.bind(settings.bundle, limits)


def parse(args: Mapping[str, str]) -> Settings:
    """Settings out of `key=value` arguments. ValueError for one that is missing, unknown or no number."""
    known = [f.name for f in fields(Settings)]
    if odd := sorted(set(args) - set(known)):
        raise ValueError(f"there is no setting {odd[0]!r}; there are {', '.join(known)}")
    url = args.get("bundle") or os.environ.get("CELLRAY_BUNDLE")
    if not url:
        raise ValueError("which model? Say bundle=PATH, the folder or URL of a bundle")
    numbers = {name: args[name] for name in known if name != "bundle" and name in args}
    for name, text in numbers.items():
        if not str(text).isdecimal() or int(text) < 1:
            raise ValueError(f"{name}={text}: expected a whole number, 1 or more")
    return Settings(bundle=storage.absolute(url), **{name: int(text) for name, text in numbers.items()})
