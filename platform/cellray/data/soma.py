"""Cells out of TileDB-SOMA experiments: those of CELLxGENE Census, and what `tiledbsoma.io` writes.

An experiment is a folder of TileDB arrays. Cells are the rows of `obs`, in the order of their
soma_joinid; a measurement `ms/NAME` is a modality, whose counts are layers of `ms/NAME/X` and whose
features are the rows of `ms/NAME/var`. Every cell of the experiment is one of each measurement: one that
was not measured there has no counts. `ms/raw` is where `tiledbsoma.io.from_anndata` puts raw.X.

TileDB reads by itself, from local folders, s3:// and gs://, with the credentials the environment has. For S3,
AWS_ENDPOINT_URL and AWS_REGION hold, and `FSSPEC_S3='{"anon": true}'` stands for requests without a
signature, which public buckets such as that of Census (AWS_REGION=us-west-2) take.

Guarded are links in local folders, groups with members outside the experiment, joinids that do not fit,
and sizes: no more is read than rows and columns declare, no column of more than `guard.WHOLE`. Not
guarded is what TileDB makes of the arrays' own files: names of fragments that lead elsewhere, tiles
that declare more than they hold. Its buffers have a budget, and a survey reads in `isolation`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import fsspec
import numpy as np
import scipy.sparse as sp

from cellray.data import storage
from cellray.data.counts import check_counts
from cellray.data.formats import Foreign, naming
from cellray.data.reading import Source, features_of, known, offer, one_of
from cellray.data.soma_arrays import Frame, Matrix, told

MISSING = (
    "is a TileDB-SOMA experiment, which takes an extra to read: pip install 'cellray[soma]'. Or write the "
    "cells that are wanted to an .h5ad (tiledbsoma's query.to_anndata, or cellxgene_census.get_anndata)"
)
CELL_IDS = ("obs_id",)
"""obs columns that hold cell names; joinids stand in where there is none, as in Census."""
FEATURE_IDS = ("var_id",)
"""var columns that stand for var_names; joinids, which are numbers, where there is none."""
RAW = "raw"
"""The measurement, or the layer of X, that holds raw counts."""
CONFIG = {
    "soma.init_buffer_bytes": 32 << 20,
    "sm.mem.total_budget": 1 << 30,
    "sm.compute_concurrency_level": 2,
    "sm.io_concurrency_level": 4,
    "vfs.s3.connect_max_tries": storage.ATTEMPTS,
}
"""What TileDB is told: bytes of a buffer, one a column; bytes of tiles; threads."""

SECRETS = {"key": "aws_access_key_id", "secret": "aws_secret_access_key", "token": "aws_session_token"}
"""Credentials as fsspec's configuration names them, and as TileDB does; else both take the environment's."""


@contextmanager
def opened(url: str, path: str) -> Iterator["Experiment"]:
    """The experiment at `url`, `path` of its file system. ValueError says what is there instead."""
    try:
        import tiledbsoma
    except ModuleNotFoundError as error:
        if error.name != "tiledbsoma":
            raise
        raise ValueError(f"{url} {MISSING}") from None
    context = tiledbsoma.SOMATileDBContext(tiledb_config=CONFIG | access(url))
    with ExitStack() as stack:
        with naming(url), told():
            root = stack.enter_context(tiledbsoma.open(_uri(url, path), context=context))
            found = Experiment(url, root)
        yield found


def _uri(url: str, path: str) -> str:
    """What TileDB calls `url`."""
    scheme = url.partition("://")[0] if "://" in url else "file"
    if scheme == "file":
        return os.path.realpath(path)
    if scheme in ("s3", "s3a", "gs", "gcs") and "::" not in url:
        return f"{'s3' if scheme.startswith('s3') else 'gs'}://{path}"
    raise ValueError(f"{url}: TileDB-SOMA experiments are read from local folders, s3:// and gs:// only")


def access(url: str) -> dict[str, str]:
    """How TileDB finds the S3 that fsspec finds: settings by the names TileDB has for them."""
    if not url.startswith(("s3://", "s3a://")):
        return {}
    conf: dict[str, Any] = fsspec.config.conf.get("s3", {})
    client = conf.get("client_kwargs", {})
    settings = os.environ
    end = conf.get("endpoint_url") or client.get("endpoint_url") or settings.get("AWS_ENDPOINT_URL_S3")
    end = end or settings.get("AWS_ENDPOINT_URL")
    region = client.get("region_name") or settings.get("AWS_REGION") or settings.get("AWS_DEFAULT_REGION")
    found = {"vfs.s3.region": str(region)} if region else {}
    if end:
        scheme, _, host = str(end).rpartition("://")
        found |= {"vfs.s3.endpoint_override": host.rstrip("/"), "vfs.s3.scheme": scheme or "https"}
        found["vfs.s3.use_virtual_addressing"] = "false"
    if conf.get("anon"):
        found["vfs.s3.no_sign_request"] = "true"
    for ours, theirs in SECRETS.items():
        if conf.get(ours):
            found[f"vfs.s3.{theirs}"] = str(conf[ours])
    return found


class Experiment(Foreign):
    """An experiment that is open. ValueError if it is something else, or leads out of its folder."""

    def __init__(self, url: str, root: Any) -> None:
        kind = root.metadata.get("soma_object_type", "")
        if kind != "SOMAExperiment":
            inside = ", ".join(sorted(root.members())[:8]) if kind == "SOMACollection" else ""
            more = f" It holds {inside}: add the name of an experiment in it to the URL." if inside else ""
            raise ValueError(f"{url} is a {kind or 'TileDB group'}, not a SOMAExperiment.{more}")
        self.url, self._root = url, root
        self._top = _plain(root.uri)
        self._parts = self.member(root, "ms")
        measured = sorted(self.members(self._parts))
        self.measurements = [name for name in measured if name != RAW] or measured
        if not self.measurements:
            raise ValueError(f"{url} is an experiment without any measurement")

    @property
    def keys(self) -> list[str]:
        """Measurements, but for raw; none if all there is has no name that says what it is."""
        every = self.measurements
        named = len(every) > 1 or known(every[0]) in ("rna", "atac", "protein")
        return every if named else []

    def source(self, modality: str, layer: str, names: str) -> "Soma":
        name = one_of(self.url, self.keys, modality) if self.keys else self.measurements[0]
        with told():
            return Soma(self, name, layer, names)

    def members(self, group: Any) -> list[str]:
        """Names of what is in a group, all of which lies in the experiment."""
        found: dict[str, tuple[str, str]] = group.members()
        for name, (uri, _) in found.items():
            place = _plain(uri)
            if ".." in place.split("/") or not place.startswith(f"{self._top}/"):
                raise ValueError(f"{name} lies outside the experiment, at {uri}, which is not followed")
        return list(found)

    def member(self, group: Any, *path: str) -> Any:
        """What is at `path` below `group`."""
        for name in path:
            if name not in self.members(group):
                raise ValueError(f"there is no {'/'.join(path)}; the experiment is incomplete")
            group = group[name]
        return group

    def obs(self) -> "Frame":
        return Frame(self.member(self._root, "obs"), "obs", CELL_IDS)

    def var(self, measurement: str) -> "Frame":
        place = f"ms/{measurement}/var"
        return Frame(self.member(self._parts, measurement, "var"), place, FEATURE_IDS)

    def layers(self, measurement: str) -> list[str]:
        """Layers of X of a measurement."""
        measured = self.member(self._parts, measurement)
        return sorted(self.members(measured["X"])) if "X" in self.members(measured) else []

    def counts(self, measurement: str, layer: str) -> Any:
        return self.member(self._parts, measurement, "X", layer)

    def places(self, measurement: str) -> dict[str, tuple[str, str]]:
        """Settings of `layer` -> measurement and layer of X.

        "" is X/data, else X/raw, else the only one; "raw" is X/raw, else that of the measurement raw.
        """
        own = self.layers(measurement)
        found = {name: (measurement, name) for name in own}
        owner = self.measurements == [measurement] or known(measurement) == "rna"
        if RAW not in found and owner and RAW not in self.measurements and RAW in self._parts:
            there = self.layers(RAW)
            if usual := _usual(there):
                found[RAW] = (RAW, usual)
        if usual := _usual(own):
            found = {"": (measurement, usual)} | found
        return found


def _usual(layers: Sequence[str]) -> str:
    """The layer that is meant where none is named, "" if that cannot be told."""
    usual = [name for name in ("data", RAW) if name in layers]
    return usual[0] if usual else layers[0] if len(layers) == 1 else ""


def _plain(uri: str) -> str:
    """A URI such that those of parts start with it; local ones with links resolved."""
    if "://" in uri and not uri.startswith("file://"):
        return uri.rstrip("/")
    return os.path.realpath(uri.removeprefix("file://"))


class Soma(Source):
    """A measurement of an experiment."""

    def __init__(self, experiment: Experiment, measurement: str, layer: str, names: str) -> None:
        self._experiment, self._ids, self.layer = experiment, names, layer
        self._places = experiment.places(measurement)
        url = experiment.url
        if layer not in self._places:
            held = ", ".join(f"layer={name or ' (X/data)'}" for name in self._places) or "no counts at all"
            asked = f"X/{layer}" if layer else "X/data"
            raise ValueError(f"{url}: there are no counts in {asked} of {measurement}. It has {held}.")
        self._cells = experiment.obs()
        self.obs_columns = tuple(self._cells.columns)
        self._var = experiment.var(self._places[layer][0])
        if names and names not in self._var.columns:
            raise ValueError(f"{url}: var has no column {names!r}; {offer(names, self._var.columns)}")
        self.where = f"{url}: {_key(self._places[layer])}"
        super().__init__(url, self._counts(layer))

    @property
    def has_raw(self) -> bool:  # type: ignore[override]
        return RAW in self._places

    @property
    def genomes(self) -> tuple[str, ...]:  # type: ignore[override]
        if "genome" not in self._var.columns:
            return ()
        with naming(self.url), told():
            return tuple(name for name in dict.fromkeys(self._var.column("genome").tolist()) if name)

    def _counts(self, layer: str) -> "Matrix":
        part, name = self._places[layer]
        var = self._var if layer == self.layer else self._experiment.var(part)
        return Matrix(self._experiment.counts(part, name), _key((part, name)), self._cells, var)

    def _cell_names(self) -> np.ndarray:
        with told():
            return self._cells.names

    def _feature_names(self) -> tuple[np.ndarray, np.ndarray]:
        with told():
            var = self._var
            return features_of(self.url, var.names, var.columns, var.column, self._ids)

    def _rows(self, start: int, stop: int) -> sp.csr_matrix:
        with told():
            return super()._rows(start, stop)

    def _column(self, name: str) -> np.ndarray:
        if name not in self._cells.columns:
            return super()._column(name)
        with told():
            return self._cells.column(name)

    def _others(self) -> list[str]:
        mine = self._places[self.layer]
        return [name for name, place in self._places.items() if name and place != mine and self._whole(name)]

    def _whole(self, layer: str) -> bool:
        """Whether the first numbers of another place pass as counts."""
        try:
            check_counts(self._counts(layer).some(), "")
        except ValueError:
            return False
        return True


def _key(place: tuple[str, str]) -> str:
    return f"ms/{place[0]}/X/{place[1]}"
