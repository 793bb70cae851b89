"""Other methods, trained, resumed and scored in the same runs as ours: each is a module of this shape."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from torch import nn

from cellray.model.reference import ReferenceStudent
from cellray.model.teacher import Teacher
from cellray.train import reference
from cellray.train.recipe import Recipe
from cellray.train.stages import Stage
from cellray.train.targets import TeacherVectors

if TYPE_CHECKING:
    from cellray.train.run import Run

Trained = Callable[[Stage, nn.Module, str], str]
"""(stage, what holds its modules, hash of what it starts from) -> hash of what it came to."""
Vectors = Callable[[Teacher, str], TeacherVectors]
"""(teacher, its hash) -> its vectors of all cells, computed once and kept."""


class Method(Protocol):
    """Networks, and the stages that train them. Stage "joint" ends with the teacher, "distil" with the
    student, "control" with its twin that never met another modality than RNA."""

    def teacher(self, run: "Run") -> Teacher:
        """The teacher before training: the same numbers for the same recipe and store."""
        ...

    def student(self, run: "Run") -> ReferenceStudent:
        """The student before training, likewise."""
        ...

    def shapes(self, recipe: Recipe) -> list[tuple[str, tuple[str, ...], float]]:
        """Every stage in order: its name, what it needs and reads, its epochs."""
        ...

    def check(self, run: "Run") -> None:
        """ValueError where the cells of the store are none that it can be trained on."""
        ...

    def chain(self, run: "Run", device: str, trained: Trained, vectors: Vectors) -> None:
        """Every stage the recipe asks for, in order, each by `trained`."""
        ...


OTHERS: Mapping[str, Method] = {"reference": reference}
"""Name in a recipe -> method. Ours, "cellray", is what `Run` and `chain` do without one."""
