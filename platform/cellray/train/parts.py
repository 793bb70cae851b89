"""The parts of one checkpoint that several workers write, each its rows of what is shared out.

A part is one file, whose name says whose it is and the hash of its content. Files appear whole, so a
name in a listing says that this part is safe, and the first worker needs to hear nothing else to write
the manifest. No message is exchanged: a worker that hangs or dies costs a checkpoint, and no more.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cellray.data import storage

WAIT = 60.0
"""Seconds that the first worker waits for the parts of the others, after its own."""


@dataclass(frozen=True)
class Part:
    """Which part of the checkpoints of a stage a worker writes."""

    attempt: str
    """The same for the workers that train together, and for none before: their parts are never mixed."""
    rank: int
    world: int

    def name(self, sha256: str) -> str:
        """The file of this part, if its content has this hash."""
        return f"part-{self.attempt}-{self.rank:05d}-{sha256}.safetensors"

    def files(self, folder: str) -> dict[str, str]:
        """Name and hash of all workers' parts in `folder`, once they are there; TimeoutError after WAIT."""
        until, pause = time.monotonic() + WAIT, 0.01
        while True:
            found = self._there(folder)
            missing = [rank for rank in range(self.world) if rank not in found]
            if not missing:
                return dict(found[rank] for rank in range(self.world))
            if time.monotonic() > until:
                raise TimeoutError(f"{folder} lacks the parts of the workers {missing} after {WAIT:.0f} s")
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)

    def _there(self, folder: str) -> dict[int, tuple[str, str]]:
        """Worker -> name and hash of its part, of those that are there."""
        form = re.compile(rf"part-{self.attempt}-(\d+)-([0-9a-f]+)\.safetensors")
        parts = (form.fullmatch(name) for name in storage.names(folder))
        return {int(part[1]): (part[0], part[2]) for part in parts if part}


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors from the parts of all workers, in their order. Takes the parts apart.

    What is shared out is in all of them, its rows one after the other; the rest is in the first alone.
    ValueError if the parts are not of that kind.
    """
    first, *others = parts
    if any(part.keys() != others[0].keys() or part.keys() - first.keys() for part in others):
        raise ValueError("has parts that do not belong together")
    found = {}
    for name in list(first):
        rows = [part.pop(name) for part in parts if name in part]
        found[name] = rows[0] if len(rows) == 1 else torch.cat(rows)
    return found
