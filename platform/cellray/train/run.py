"""A run's folder, its chain of stages, and how its models are made. No Ray.

RUN/recipe.json      the resolved recipe; another recipe is refused
RUN/store/           the token store, unless the recipe names one elsewhere
RUN/store.sha256     which edition of the store
RUN/splits.arrow     cell_id, unit, test: what training never sees
RUN/drivers/         who drives the run
RUN/checkpoints/     in the middle of a stage
RUN/teacher/         the teacher's vectors
RUN/stages/NAME/     finished stages: model.safetensors, stage.json
RUN/students.json    the kinds of student compared, and which was scored
RUN/metrics.jsonl  RUN/tensorboard/     losses and rates while it trained
RUN/bundle/  RUN/report.json  RUN/report.html
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch

from cellray.data import arrow, storage
from cellray.data.cache import Cache
from cellray.data.split import held_out
from cellray.data.store import Store
from cellray.data.tokens import Tokenizer
from cellray.model.attention import Compute
from cellray.model.reference import ReferenceStudent
from cellray.model.student import SmallTransformer, SparseMLP, build
from cellray.model.teacher import Teacher
from cellray.train import checkpoint
from cellray.train.contexts import Contexts, names_of
from cellray.train.methods import OTHERS
from cellray.train.recipe import LAUNCH, Recipe, describe, from_json, to_json
from cellray.train.stages import distil_stage
from cellray.train.targets import read_table

AnyStudent = SparseMLP | SmallTransformer | ReferenceStudent
NOT_TRAINING = (*LAUNCH, "atlas", "dataset", "ingest", "qc", "score")
"""Settings that training does not read; what ingest made of them is in the store's hash."""


@dataclass
class Run:
    """Where a run's things are, and what they were made with."""

    recipe: Recipe

    @property
    def url(self) -> str:
        return storage.absolute(self.recipe.run)

    def path(self, *parts: str) -> str:
        return storage.join(self.url, *parts)

    @property
    def store_url(self) -> str:
        return storage.absolute(self.recipe.store) if self.recipe.store else self.path("store")

    @cached_property
    def store(self) -> Store:
        """The store, in the edition that the run began with: what is added later is for other runs."""
        mark = self.path("store.sha256")
        known = storage.read_bytes(mark).decode() if storage.exists(mark) else None
        r = self.recipe
        cache = Cache(r.cache, r.cache_bytes) if r.cache else None
        return Store(self.store_url, hash=known, cache=cache)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The store's tokenizer, with the recipe's own settings of what does not decide a token.

        Of two runs on one store, each may choose its context and likelihood.
        """
        mine = {m.name: m for m in self.recipe.modalities}
        found = {
            name: replace(v, modality=mine[name]) for name, v in self.store.tokenizer.vocabularies.items()
        }
        tokenizer = Tokenizer(found)
        if tokenizer.hash != self.store.tokenizer.hash:
            raise ValueError(
                f"{self.path('store')} was tokenized with other settings of its modalities: "
                "ingest into another run"
            )
        return tokenizer

    def claim(self) -> None:
        """Write the recipe into the run's folder, or check that it is the one there already."""
        path = self.path("recipe.json")
        mine = json.dumps(to_json(self.recipe), indent=1).encode()
        if storage.write_once(path, mine):
            return
        before = dict(describe(from_json(json.loads(storage.read_bytes(path)))))
        free = (*LAUNCH, "score")
        changed = [
            f"{key}: {before.get(key)!r} there, {value!r} now"
            for key, value in describe(self.recipe)
            if before.get(key) != value and key.split(".")[0] not in free
        ]
        if changed:
            raise ValueError(
                f"{self.url} was begun with other settings ({'; '.join(changed)}). "
                "Give this run a folder of its own with run=…, or delete that one."
            )

    @cached_property
    def split(self) -> tuple[np.ndarray, dict[str, str]]:
        """`test`, and `units`, as the recipe has them. Nothing is written."""
        return held_out(self.store.cells, by=self.recipe.split.by, fraction=self.recipe.split.fraction)

    @cached_property
    def test(self) -> np.ndarray:
        """Held-out cells, bool [cells] in store order. Written to splits.arrow the first time."""
        cells, (test, units) = self.store.cells, self.split
        storage.write_once(self.path("store.sha256"), self.store.hash.encode())
        names = [units[name] for name in cells["dataset"].to_pylist()]
        table = pa.table({"cell_id": cells["cell_id"], "unit": pa.array(names), "test": pa.array(test)})
        if not storage.write_once(self.path("splits.arrow"), arrow.encode(table)):
            before = read_table(self.path("splits.arrow"))
            if not before["test"].equals(table["test"]) or not before["cell_id"].equals(table["cell_id"]):
                raise ValueError(
                    f"{self.path('splits.arrow')} holds out other cells than this recipe and store: "
                    "a model of this run may have seen them. Use another run=…"
                )
        return test

    @cached_property
    def units(self) -> dict[str, str]:
        """Data set -> what was held out whole: donor, batch, cell, or none."""
        table = read_table(self.path("splits.arrow"))
        datasets = self.store.cells["dataset"].to_pylist()
        return dict(zip(datasets, table["unit"].to_pylist(), strict=True))

    def chain(self) -> list[str]:
        """Every stage of the run in order."""
        if other := OTHERS.get(self.recipe.method):
            return [name for name, _, _ in other.shapes(self.recipe)]
        modalities = self.store.tokenizer.vocabularies
        return [*(f"unimodal-{name}" for name in modalities), "joint", *self.students(), "control"]

    def students(self) -> dict[str, str]:
        """Stages that train a student, in order -> its kind. The control, a sparse MLP, is not of them."""
        if self.recipe.method in OTHERS:
            return {"distil": self.recipe.method}
        return {distil_stage(kind): kind for kind in self.recipe.student.kinds}

    def key(self, stage: str, started_from: str) -> str:
        """What decides the outcome of a stage, hashed."""
        facts = {k: v for k, v in to_json(self.recipe).items() if k not in NOT_TRAINING}
        if self.recipe.unimodal.programmes:
            facts["programmes"] = self.programmes_sha256
        text = json.dumps([stage, started_from, self.store.hash, facts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def programmes_sha256(self) -> str:
        """Of the .gmt file of the recipe: another one under the same name makes another model."""
        return storage.sha256(storage.read_bytes(storage.absolute(self.recipe.unimodal.programmes)))

    @cached_property
    def contexts(self) -> Contexts | None:
        """What encoders are told of each cell; None where the recipe tells them nothing."""
        network = self.recipe.network
        if not network.context_of:
            return None
        names = names_of(self.store.cells, network.context_of, ~self.test)
        return Contexts(self.store.cells, names, hide=network.context_hidden)

    @property
    def compute(self) -> Compute:
        """How encoders are computed."""
        r = self.recipe
        return Compute(together=r.together, recompute=r.recompute, compile=r.compile)

    def teacher(self) -> Teacher:
        """The teacher before training: the same numbers for the same recipe and store."""
        if other := OTHERS.get(self.recipe.method):
            return other.teacher(self)
        n = self.recipe.network
        vocabularies = self.tokenizer.vocabularies
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.recipe.seed)
            teacher = Teacher(
                {name: (v.modality, len(v)) for name, v in vocabularies.items()},
                width=n.width,
                layers=n.layers,
                heads=n.heads,
                fusion_layers=n.fusion_layers,
                encoding=n.encoding,
                contexts=self.contexts.names if self.contexts else None,
            )
        teacher.start(vocabularies)
        for name in teacher.names:
            teacher.encoder(name).compute = self.compute
        return teacher

    def student(self, kind: str = "mlp") -> AnyStudent:
        """A student before training: the same numbers for the same recipe and store.

        A method that is not ours has one kind, whatever `kind` says.
        """
        if other := OTHERS.get(self.recipe.method):
            return other.student(self)
        s = self.recipe.student
        vocabularies = self.tokenizer.vocabularies
        sizes = {
            "mlp": {"hidden": s.hidden, "blocks": s.blocks},
            "transformer": {
                "layers": s.layers,
                "heads": s.heads,
                "context": vocabularies["rna"].modality.context,
            },
        }[kind]
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.recipe.seed + 1)
            student = build(
                kind,
                {name: (v.modality, len(v)) for name, v in vocabularies.items()},
                {"width": self.recipe.network.width, **sizes},
            )
        student.start(vocabularies)
        if isinstance(student, SmallTransformer):
            student.encoder.compute = self.compute
        return student

    def teacher_path(self, hash: str = "") -> str:
        """Where the vectors of the teacher of that hash are; by default of the one trained here."""
        if not hash:
            facts = checkpoint.committed(self.path("stages", "joint"))
            if facts is None:
                raise ValueError(f"stage joint has not finished in {self.url}: run pipelines.pretrain first")
            hash = facts["sha256"]
        return self.path("teacher", f"{hash}.arrow")

    def trained_teacher(self) -> Teacher:
        """The teacher after stage 2. ValueError where that has not finished."""
        teacher = self.teacher()
        checkpoint.load(self.path("stages", "joint"), teacher)
        return teacher.eval()

    def trained_student(self, stage: str = "") -> AnyStudent:
        """The student of a stage, or "control", after stage 3; by default the first kind's.

        ValueError where that has not finished.
        """
        students = self.students()
        stage = stage or next(iter(students))
        student = self.student("mlp" if stage == "control" else students[stage])
        checkpoint.load(self.path("stages", stage), student)
        return student.eval()
