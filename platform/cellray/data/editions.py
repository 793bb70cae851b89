"""The newest edition of a store, as an ingest that adds to it sees it."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cellray.data import storage
from cellray.data.store import Store, edition_path, editions
from cellray.data.tokens import Tokenizer


@dataclass(frozen=True)
class Edition:
    """One manifest of a store."""

    url: str
    """Of the store."""
    path: str
    """Of the manifest."""
    sha256: str
    manifest: dict[str, Any]

    @property
    def number(self) -> int:
        return int(self.manifest["edition"])

    @property
    def inputs(self) -> dict[str, Any]:
        """`Plan.inputs` of all its data sets."""
        return dict(self.manifest["inputs"])

    @property
    def report(self) -> dict[str, Any]:
        """The ingest report; nothing failed of what is there."""
        return dict(self.manifest["ingest"]) | {"failed": []}

    @property
    def shards(self) -> list[dict[str, Any]]:
        return list(self.manifest["shards"])

    @cached_property
    def store(self) -> Store:
        return Store(self.url, hash=self.sha256)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.store.tokenizer

    @property
    def counted(self) -> tuple[np.ndarray, np.ndarray]:
        """Digest, uint64, and depth, int64, of each cell in the leading modality."""
        names = [f"{name}.total" for name in self.tokenizer.vocabularies]
        cells = self.store.cells.select(["digest", *names])
        depth = np.zeros(len(cells), np.int64)
        for name in reversed(names):
            total = cells[name].to_numpy()
            depth = np.where(total > 0, total, depth)
        return cells["digest"].to_numpy(), depth


def newest(url: str) -> Edition | None:
    """The newest edition of the store at `url`, None if there is none."""
    found = editions(url)
    if not found:
        return None
    return _edition(url, found[-1])


def before(held: Edition) -> Edition | None:
    """The edition before `held`, None if it is the first."""
    return _edition(held.url, edition_path(held.url, held.number - 1)) if held.number > 1 else None


def _edition(url: str, path: str) -> Edition:
    raw = storage.read_bytes(path)
    return Edition(url, path, storage.sha256(raw), json.loads(raw))
