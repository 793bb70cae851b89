"""The chain of stages that every worker runs, each from what the one before it came to. No Ray."""

import contextlib
import threading
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from torch import nn

from cellray.data import arrow, storage
from cellray.data.store import Store
from cellray.model.teacher import Teacher
from cellray.train import checkpoint, watchdog, workers
from cellray.train.ending import Stopped
from cellray.train.fit import Emit, plan_of, run_stage
from cellray.train.methods import OTHERS
from cellray.train.recipe import KINDS
from cellray.train.run import Run
from cellray.train.stages import Control, Distil, Joint, Stage, Unimodal, View
from cellray.train.targets import TeacherVectors, read_table, teacher_table

PIECE = 1024
"""Cells whose teacher's vectors are written at a time; a multiple of it where that made over 1,000 pieces."""


def chain(run: Run, emit: Emit, device: str = "cpu", stop: threading.Event | None = None) -> None:
    """Every stage the recipe asks for, in order; finished ones are loaded, not repeated.

    When `stop` is set, in any worker, all end with Stopped after a last checkpoint. ValueError as `check`.
    """
    check(run)
    stop = stop or threading.Event()
    recipe, store, train = run.recipe, run.store, ~run.test
    if other := OTHERS.get(recipe.method):
        other.chain(
            run,
            device,
            lambda stage, root, origin: _stage(stage, root, run, origin, train, emit, stop),
            lambda teacher, origin: _vectors(teacher, run, origin, emit, device, stop),
        )
        return
    teacher = run.teacher().to(device)
    origin = store.hash
    for modality in store.tokenizer.vocabularies:
        unimodal = Unimodal(
            recipe.unimodal,
            teacher,
            run.tokenizer,
            modality,
            seed=recipe.seed,
            device=device,
            contexts=run.contexts,
        )
        origin = _stage(unimodal, teacher, run, origin, train, emit, stop)
    if set(recipe.stages) == {"unimodal"}:
        return
    joint = Joint(
        recipe.joint, teacher, run.tokenizer, seed=recipe.seed, device=device, contexts=run.contexts
    )
    origin = _stage(joint, teacher, run, origin, train, emit, stop)
    if "distil" not in recipe.stages:
        return
    vectors = _vectors(teacher, run, origin, emit, device, stop)
    for kind in run.students().values():
        student = run.student(kind).to(device)
        for name in teacher.names:
            student.decoder(name).inherit(teacher.decoder(name), vectors.mean, vectors.spread)
        view = View(recipe.distil, student, run.tokenizer, seed=recipe.seed, device=device)
        _stage(Distil(view, vectors), student, run, origin, train, emit, stop)
    control = run.student().to(device)
    view = View(recipe.distil, control, run.tokenizer, seed=recipe.seed, device=device)
    _stage(Control(view), control, run, store.hash, train, emit, stop)


def _stage(
    stage: Stage,
    root: nn.Module,
    run: Run,
    origin: str,
    eligible: np.ndarray,
    emit: Emit,
    stop: threading.Event,
) -> str:
    """Run a stage, or load it if it has finished; returns the hash of its model."""
    folder = run.path("stages", stage.name)
    facts = checkpoint.committed(folder)
    if facts is not None:
        if facts["key"] != run.key(stage.name, origin):
            raise ValueError(
                f"{folder} was trained with other settings or on another store: use another run=…"
            )
        checkpoint.load(folder, root)
        emit({"stage": stage.name, "finished": facts})
        return str(facts["sha256"])
    if workers.agreed(stop.is_set()):
        raise Stopped
    facts = run_stage(stage, root, run, started_from=origin, eligible=eligible, emit=emit, stop=stop)
    emit({"stage": stage.name, "finished": facts})
    return str(facts["sha256"])


def _vectors(
    teacher: Teacher, run: Run, origin: str, emit: Emit, device: str, stop: threading.Event
) -> TeacherVectors:
    """The teacher's vectors of every cell, computed once by all workers and kept with the teacher's hash.

    In pieces, each written when it is done, so that no more than one a worker is lost when the run ends.
    When `stop` is set, in any worker, all end with Stopped.
    """
    path, store = run.teacher_path(origin), run.store
    if not workers.from_first(storage.exists(path)):
        folder = path.removesuffix(".arrow") + ".parts"
        size = PIECE * -(-len(store) // (1000 * PIECE))
        pieces = np.split(np.arange(len(store)), range(size, len(store), size))
        parts = [storage.join(folder, f"{n:04d}-of-{len(pieces):04d}.arrow") for n in range(len(pieces))]
        lead, world, steps = workers.rank() == 0, workers.world(), len(pieces)
        done = workers.from_first([storage.exists(part) for part in parts] if lead else [])
        left = [number for number in range(steps) if not done[number]]
        emit({"stage": "teacher", "step": steps - len(left), "steps": steps})
        for first in range(0, len(left), world):
            turn = left[first : first + world]
            if workers.rank() < len(turn):
                number = turn[workers.rank()]
                _piece(teacher, store, pieces[number], parts[number], device, stop)
            if workers.agreed(stop.is_set()):
                raise Stopped
            emit({"stage": "teacher", "step": steps - len(left) + first + len(turn), "steps": steps})
        if lead:
            whole = pa.concat_tables([read_table(part) for part in parts])
            storage.write_bytes(path, arrow.encode(whole.combine_chunks()))
            storage.remove_folder(folder)
        workers.barrier()
        emit({"stage": "teacher", "step": steps, "steps": steps, "finish": True})
    return TeacherVectors(read_table(path), store.cells["cell_id"].combine_chunks())


def _piece(
    teacher: Teacher, store: Store, rows: np.ndarray, path: str, device: str, stop: threading.Event
) -> None:
    """Write the vectors of the cells at `rows` to `path`, or nothing if `stop` is set meanwhile."""

    def between() -> None:
        watchdog.beat()
        if stop.is_set():
            raise Stopped

    # The others are told of it by the caller.
    with contextlib.suppress(Stopped):
        table = teacher_table(teacher, store, rows, device=device, between=between)
        storage.write_bytes(path, arrow.encode(table))


@dataclass(frozen=True)
class Outlook:
    """What one stage will do."""

    name: str
    steps: int
    cells: int
    tokens: int
    finished: bool


def outlook(run: Run) -> list[Outlook]:
    """Every stage that the recipe asks for in order, with its cost. ValueError as `check`."""
    check(run)
    found = []
    for name, reads, epochs in _shapes(run):
        if _asked(name, run):
            plan = plan_of(run.store, run.recipe, ~run.split[0], reads, reads, epochs)
            rows = np.concatenate([plan.rows(step) for step in range(plan.steps)])
            tokens = int(plan.lengths[rows].sum())
            found.append(Outlook(name, plan.steps, len(rows), tokens, _finished(name, run)))
    return found


def check(run: Run) -> None:
    """ValueError unless every stage that the recipe asks for can begin: those before it have finished, and
    there are cells for it to learn from. Nothing is written."""
    test, present, names = run.split[0], run.store.cells["present"].to_numpy(), run.store.names
    shapes = _shapes(run)
    last = max(i for i, (name, _, _) in enumerate(shapes) if _asked(name, run))
    for name, reads, _ in shapes[: last + 1]:
        if not _asked(name, run):
            if not _finished(name, run):
                raise ValueError(
                    f"stage {name} has not finished in {run.url}, and stages=… does not ask for it"
                )
            continue
        if missing := [modality for modality in reads if modality not in names]:
            without = KINDS[: KINDS.index(_kind(name))]
            instead = f", or train without it: stages={','.join(without)}" if without else ""
            raise ValueError(
                f"stage {name} reads {' and '.join(missing)}, and {run.store_url} holds {', '.join(names)} "
                f"alone. Ingest {' and '.join(missing)} too{instead}"
            )
        bits = sum(1 << names.index(modality) for modality in reads)
        if not (~test & (present & bits > 0)).any():
            raise ValueError(
                f"stage {name} has no cell to learn from: of {len(present):,} cells of {run.store_url} "
                f"{int((present & bits > 0).sum()):,} have {' or '.join(reads)}, and all of these are held "
                "out. split.by and split.fraction say what is"
            )
    if other := OTHERS.get(run.recipe.method):
        other.check(run)


def _shapes(run: Run) -> list[tuple[str, tuple[str, ...], float]]:
    """Every stage in order: its name, what it reads, its epochs. Its cells have one or more of that."""
    if other := OTHERS.get(run.recipe.method):
        return other.shapes(run.recipe)
    recipe, names = run.recipe, tuple(run.store.tokenizer.vocabularies)
    return [
        *((f"unimodal-{name}", (name,), recipe.unimodal.epochs) for name in names),
        ("joint", names, recipe.joint.epochs),
        *((name, ("rna",), recipe.distil.epochs) for name in (*run.students(), "control")),
    ]


def _kind(name: str) -> str:
    """By what word a recipe asks for a stage: the control belongs to "distil"."""
    return "distil" if name == "control" else name.partition("-")[0]


def _asked(name: str, run: Run) -> bool:
    return _kind(name) in run.recipe.stages


def _finished(name: str, run: Run) -> bool:
    return checkpoint.committed(run.path("stages", name)) is not None
