"""Batches that are skipped: what is not a number, and gradients that are far too large. No Ray.

The rule sees the loss and the gradient's norm over all workers, so all of them decide alike; what it
remembers is in every checkpoint, so a resumed stage decides as one that was never stopped.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WINDOW = 200
"""Steps over which the usual norm of the gradient is taken."""
FEWEST = 50
"""Steps that must have been taken before a norm is called unusual."""


class Diverged(ValueError):
    """So many batches in a row were skipped that going on makes no sense; starting again does not either."""


@dataclass
class Skips:
    """Which steps of a stage are not taken, and when that is too many."""

    most: int
    """Steps in a row that may be skipped; one more ends the stage."""
    spike: float
    """A norm this many times the median of the last WINDOW taken is a spike; 0 for never."""
    skipped: int = 0
    """Steps skipped so far."""
    row: int = 0
    """Of these, the last ones in a row."""
    norms: list[float] = field(default_factory=list)
    """Norms of the last WINDOW steps that were taken."""

    why: str = ""
    """Why the last step was skipped, "" if it was taken."""

    @property
    def state(self) -> dict[str, Any]:
        """What is to be kept, for `restore`."""
        return {"skipped": self.skipped, "row": self.row, "norms": list(self.norms)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.row, self.norms = state["skipped"], state["row"], list(state["norms"])

    def allows(self, loss: float, norm: float | None = None) -> bool:
        """Whether to go on with a step of this loss and, once it is known, of this norm of the gradient.

        Call it without the norm, then with it: then the step counts as taken, or else as skipped.
        """
        self.why = self._reason(loss, norm)
        if self.why:
            self.skipped += 1
            self.row += 1
        elif norm is not None:
            self.row = 0
            self.norms = [*self.norms, norm][-WINDOW:]
        return not self.why

    def _reason(self, loss: float, norm: float | None) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if norm is None:
            return ""
        if not math.isfinite(norm):
            return f"the norm of the gradient is {norm}"
        if self.spike and len(self.norms) >= FEWEST:
            usual = statistics.median(self.norms)
            if norm > self.spike * usual:
                return f"the norm of the gradient is {norm:.4g}, more than {self.spike:g} times {usual:.4g}"
        return ""

    def check(self, where: str) -> None:
        """Diverged if too many steps in a row were skipped."""
        if self.row > self.most:
            raise Diverged(
                f"{where}: {self.row} batches in a row were skipped, the last one as {self.why}. "
                "Lower optim.lr, or look at the counts of the cells that the warnings name, and train into "
                "another run=…; optim.spike=0 takes steps however large their gradients are."
            )
