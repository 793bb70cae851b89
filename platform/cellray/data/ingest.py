"""From an atlas to a committed token store, with Ray Data: read, judge, count, rank, commit.

Everything that takes time is cut into units, each of which leaves files in STORE/.parts-….
A run that is killed and started again does the units that are missing. The store comes to be
with its manifest, which is written last; then the parts are removed. The bytes of the store
depend on the files and the settings alone: on no order, no number of tasks, and no clock.

An atlas may grow: data sets that a store lacks become its next edition, which shares the shards
there are, and keeps vocabulary and statistics.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray

from cellray.data import report, storage, units
from cellray.data.assembly import Making, assemble
from cellray.data.editions import Edition, before, newest
from cellray.data.features import Tally, targets
from cellray.data.group import Group, Part
from cellray.data.plan import Plan, fingerprint, inputs_of, survey
from cellray.data.qc import KEPT, name_hashes
from cellray.data.report import Counted
from cellray.data.shards import BATCH
from cellray.data.shuffle import Homes, Order, hashed, order
from cellray.data.store import VERSION as STORE_VERSION
from cellray.data.store import edition_path
from cellray.data.tokens import Tokenizer
from cellray.data.units import UNKNOWN, Origin, Rows, Some
from cellray.data.verdicts import decide
from cellray.data.work import Call, bound, execute
from cellray.train.recipe import Recipe

TOKEN_BYTES = 2.0
"""About what a token takes in a shard, compressed; decides how many shards there are."""
PARTS = 2
"""Version of what the units leave: those of another cellray are not taken up."""
NUMBERS = 1 << 20
"""Numbers read at a time, about: what is made of them stays near the processor."""
TOGETHER = 16
"""Units whose features are counted by one task, so that statistics of many features are few files."""

Event = Callable[[str, int, int], None]


def ingest(recipe: Recipe, store_url: str, on_event: Event | None = None) -> dict[str, Any]:
    """The ingest report, once STORE_URL holds all data sets of the recipe's atlas that can be read.

    Needs a Ray that is connected. Takes up where an earlier run stopped; returns at once where
    all of it is there; adds data sets that a store lacks as its next edition. Data sets that cannot
    be read are left out and listed under `failed`, with the reason. `on_event(step, done, total)`
    hears of the steps "read", "count" (rows of files) and "shards". ValueError for
    settings that cannot be meant, for an atlas of which nothing can be read, and for a store that
    was made from something else.
    """
    inputs = inputs_of(recipe)
    held = newest(store_url)
    if held is not None and not lacking(held, inputs, store_url):
        storage.remove_folder(_parts(recipe, store_url, inputs, before(held)))
        return held.report
    plan = survey(recipe, inputs, held.report if held else None)
    if not plan.groups:
        assert held is not None
        return held.report | {"failed": list(plan.failed)}
    run = _Run(recipe, plan, store_url, on_event or _silent, held)
    counted = run.count()
    if not counted.groups:
        reasons = "; ".join(entry["reason"] for entry in counted.failed)
        run.clean()
        if held is None:
            raise ValueError(f"no data set can be read: {reasons}")
        return held.report | {"failed": counted.failed}
    tokenizer = held.tokenizer if held else counted.tokenizer(plan, recipe.ingest.min_cells)
    shards = run.write(counted, tokenizer)
    return run.commit(counted, tokenizer, shards)


def lacking(held: Edition, inputs: dict[str, Any], store_url: str) -> list[str]:
    """Data sets of `inputs` that the store lacks. ValueError if it is no part of them, with what differs."""
    have = {row["dataset"] for row in held.inputs["files"]}
    shared = inputs | {"files": [row for row in inputs["files"] if row["dataset"] in have]}
    if fingerprint(shared) != fingerprint(held.inputs):
        raise ValueError(
            f"{held.path} is of a store made from other files or settings: "
            f"{report.difference(held.inputs, shared)}. Choose another run=, or remove it."
        )
    return sorted({row["dataset"] for row in inputs["files"]} - have)


class _Run:
    """One ingest on its way. A plain holder of what all its steps need."""

    def __init__(self, recipe: Recipe, plan: Plan, store: str, on_event: Event, held: Edition | None) -> None:
        self.recipe, self.plan, self.on_event, self.held = recipe, plan, on_event, held
        self.store = storage.absolute(store)
        self.parts = _parts(recipe, store, plan.inputs, held)
        self.hashes = {group.name: hashed(group) for group in plan.groups}

    def count(self) -> Counted:
        """Pass 1: every file is read, once; cells are judged; features of those that stay are counted."""
        parts = [(group, part) for group in self.plan.groups for part in group.parts]
        origins = [_origin(part) for _, part in parts]
        rows: list[list[Rows]] = []
        number = 0
        for at, (group, part) in enumerate(parts):
            rows.append([])
            for start, stop in part.units:
                own = self._sorted(group, part, start, stop)
                rows[at].append(Rows(number=number, origin=at, start=start, stop=stop, order=own))
                number += 1
        every = [own for part in rows for own in part]
        shared = ray.put(origins)
        errors = self._do(
            "read",
            every,
            units.metrics_path,
            self.parts,
            lambda own: bound(units.read, own, (shared, own.origin), self.parts),
        )
        bad = {parts[at][0].name: _naming(parts[at][1], errors[at]) for at in sorted(errors, reverse=True)}
        failed = [*self.plan.failed, *({"dataset": name, "reason": bad[name]} for name in sorted(bad))]
        good = [at for at, (group, _) in enumerate(parts) if group.name not in bad]
        measured = [units.measured(self.parts, [own.number for own in rows[at]]) for at in good]
        counted = Counted(
            groups=[group for group in self.plan.groups if group.name not in bad],
            parts=[parts[at][1] for at in good],
            numbers=[[own.number for own in rows[at]] for at in good],
            metrics=[metrics for metrics, _ in measured],
            facts=[facts for _, facts in measured],
            failed=failed,
        )
        if not good:
            return counted
        there = self.held.counted if self.held else None
        counted.verdicts = decide(
            [parts[at] for at in good],
            counted.metrics,
            self.plan.dropped,
            self.plan.modalities,
            self.recipe.qc,
            there,
        )
        counted.tallies = self._tallies(counted, [origins[at] for at in good])
        return counted

    def _tallies(self, counted: Counted, origins: Sequence[Origin]) -> list[Tally]:
        """Statistics of the cells of each part that stay."""
        some: list[Some] = []
        assert counted.verdicts is not None
        for at, (group, part) in enumerate(counted.owned()):
            stay = counted.verdicts.rows[at] == KEPT
            assays = group.about["assay"][part.cells]
            codes = np.where(stay, assays.codes, np.int8(-1))
            cuts, numbers = part.units, counted.numbers[at]
            for start, stop in cuts:
                codes[start:stop] = codes[start:stop][self._sorted(group, part, start, stop)]
            for first in range(0, len(cuts), TOGETHER):
                mine = cuts[first : first + TOGETHER]
                some.append(
                    Some(
                        number=numbers[first],
                        origin=at,
                        units=tuple(numbers[first : first + TOGETHER]),
                        assays=assays.values,
                        group=codes[mine[0][0] : mine[-1][1]],
                    )
                )
        folder = self._folder([group.name for group in counted.groups])
        shared = ray.put(list(origins))
        errors = self._do(
            "count",
            some,
            units.tally_path,
            folder,
            lambda own: bound(units.count, own, (shared, own.origin), self.parts, folder),
        )
        _expect_none(errors)
        found = [Tally(len(origin.names)) for origin in origins]
        for own in some:
            found[own.origin].update(units.counted(folder, own.number, found[own.origin].size))
        return found

    def write(self, counted: Counted, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """Pass 2: the shards; what each of them holds."""
        verdicts = counted.verdicts
        assert verdicts is not None
        tokens = sum(
            int(metrics.features[reason == KEPT].sum(dtype=np.int64))
            for metrics, reason in zip(counted.metrics, verdicts.rows, strict=True)
        )
        shards = max(1, round(tokens * TOKEN_BYTES / self.recipe.ingest.shard_bytes))
        found = order(counted.groups, verdicts, shards, self.hashes)
        folder = self._folder([tokenizer.hash, [g.name for g in counted.groups], found.bounds.tolist()])
        homes, room, origins = self._homes(counted, found, list(tokenizer.vocabularies))
        units.write_cells(found.shards(homes), folder)
        making = Making(
            origins=origins,
            onto=[targets(p.features.names, tokenizer.vocabularies[p.file.modality]) for p in counted.parts],
            tokenizer=tokenizer,
            widths=counted.widths(),
            store=self.store,
            read_in=self.parts,
        )
        shared = ray.put(making)
        errors = self._do(
            "shards",
            [_Shard(number) for number in range(shards)],
            units.shard_path,
            folder,
            lambda own: bound(assemble, own.number, _of(room, own.number), shared, folder),
        )
        _expect_none(errors)
        return [json.loads(storage.read_bytes(units.shard_path(folder, s))) for s in range(shards)]

    def _homes(
        self, counted: Counted, found: Order, modalities: Sequence[str]
    ) -> tuple[Homes, dict[str, np.ndarray], np.ndarray]:
        """Where the cells were read to, tokens of each shard at the most, and the part of each unit."""
        verdicts = counted.verdicts
        assert verdicts is not None
        size, shards = int(found.starts[-1]), len(found.bounds) - 1
        homes = {name: (np.full(size, UNKNOWN, np.int32), np.zeros(size, np.int32)) for name in modalities}
        room = {name: np.zeros(shards, np.int64) for name in modalities}
        origins = np.zeros(1 + max(max(numbers) for numbers in counted.numbers), np.int32)
        starts = {group.name: start for group, start in zip(found.groups, found.starts[:-1], strict=True)}
        for at, (group, part) in enumerate(counted.owned()):
            name = part.file.modality
            shard = found.shard_of(self.hashes[group.name][part.cells])
            room[name] += np.bincount(shard, counted.metrics[at].features, shards).astype(np.int64)
            stay = verdicts.rows[at] == KEPT
            for number, (start, stop) in zip(counted.numbers[at], part.units, strict=True):
                own = self._sorted(group, part, start, stop)
                left = np.flatnonzero(stay[start:stop][own])
                cells = starts[group.name] + part.cells[start:stop][own[left]].astype(np.int64)
                homes[name][0][cells], homes[name][1][cells] = number, left
                origins[number] = at
        return homes, room, origins

    def _sorted(self, group: Group, part: Part, start: int, stop: int) -> np.ndarray:
        """Rows start … stop - 1 of `part`, counted from `start`, in the order of the store."""
        cells = part.cells[start:stop]
        return np.lexsort((cells, self.hashes[group.name][cells])).astype(np.int32)

    def commit(self, counted: Counted, tokenizer: Tokenizer, shards: list[dict[str, Any]]) -> dict[str, Any]:
        """The report, after vocabulary and manifest are written and the parts are gone."""
        data = encode_vocabulary(tokenizer)
        digest = storage.sha256(data)
        name = f"vocabulary-{digest}.arrow"
        held = self.held
        if held is None:
            storage.write_bytes(storage.join(self.store, name), data)
        found = report.make(counted, tokenizer, shards, held.report if held else None)
        number = held.number + 1 if held else 1
        inputs = self.plan.without([entry["dataset"] for entry in counted.failed])
        manifest = {
            "version": STORE_VERSION,
            "edition": number,
            "fingerprint": fingerprint(inputs),
            "tokenizer": tokenizer.hash,
            "vocabulary": {"name": name, "sha256": digest},
            "modalities": list(tokenizer.vocabularies),
            "batch": BATCH,
            "shards": [
                *(held.shards if held else []),
                *({k: v for k, v in s.items() if k != "groups"} for s in shards if s["rows"]),
            ],
            "inputs": inputs,
            "ingest": found,
        }
        path = edition_path(self.store, number)
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        if not storage.write_once(path, text.encode()) and storage.read_bytes(path) != text.encode():
            raise ValueError(f"{path} was written by another ingest while this one ran: run this again")
        self.clean()
        return dict(json.loads(text)["ingest"])

    def clean(self) -> None:
        """Remove the parts."""
        storage.remove_folder(self.parts)

    def _folder(self, facts: Any) -> str:
        """Where parts are that depend on `facts`: what failed in an earlier run may not have failed now."""
        return storage.join(self.parts, storage.sha256(json.dumps(facts).encode())[:16])

    def _do(
        self,
        step: str,
        todo: Sequence[Any],
        path: Callable[[str, int], str],
        folder: str,
        call: Callable[[Any], Call],
    ) -> dict[int, str]:
        """Do the units of one step that are missing; the first error of each origin that has one."""
        there = set(storage.names(folder))
        missing = [own for own in todo if path("", own.number).rpartition("/")[2] not in there]
        total = sum(len(own) for own in todo)
        done = total - sum(len(own) for own in missing)
        self.on_event(step, done, total)
        errors: dict[int, tuple[int, str]] = {}
        for index, error in execute([call(own) for own in missing]):
            own = missing[index]
            if error:
                errors[own.origin] = min(errors.get(own.origin, (own.number, error)), (own.number, error))
            done += len(own)
            self.on_event(step, done, total)
        return {origin: error for origin, (_, error) in errors.items()}


class _Shard:
    """A shard as a unit of work."""

    origin = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return 1


def _of(room: dict[str, np.ndarray], shard: int) -> dict[str, int]:
    return {name: int(tokens[shard]) for name, tokens in room.items()}


def _origin(part: Part) -> Origin:
    features = part.features
    return Origin(
        file=part.file,
        columns=features.columns,
        names=name_hashes(features.names),
        mito=features.mito,
        together=max(1, NUMBERS * len(part.cells) // max(1, part.stored)),
    )


def _naming(part: Part, error: str) -> str:
    """`error`, which names the file in any case."""
    return error if part.file.url in error else f"{part.file.url}: {error}"


def _expect_none(errors: dict[int, str]) -> None:
    if errors:
        raise ValueError("; ".join(errors.values()))


def _parts(recipe: Recipe, store: str, inputs: dict[str, Any], held: Edition | None) -> str:
    """Where the parts are of the ingest of `inputs` into a store that has the edition `held`."""
    key = f"{PARTS} {fingerprint(inputs)} {recipe.ingest.unit_cells} {held.sha256 if held else ''}"
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return storage.join(storage.absolute(store), f".parts-{name}")


def _silent(step: str, done: int, total: int) -> None:
    """For callers that do not listen."""


def encode_vocabulary(tokenizer: Tokenizer) -> bytes:
    """The tokenizer as the Arrow file that a store reads it from."""
    table = tokenizer.to_arrow().combine_chunks()
    return units.encode(table.to_batches(), table.schema)
