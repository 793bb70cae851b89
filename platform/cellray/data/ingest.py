"""From an atlas to a committed token store, with Ray Data: count, tokenize, shuffle, commit.

Everything that takes time is cut into units, each of which leaves one file in STORE/.parts-….
A run that is killed and started again does the units that are missing. The store comes to be
with its manifest, which is written last; then the parts are removed. The bytes of the store
depend on the files and the settings alone: on no order, no number of tasks, and no clock.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from cellray.data import report, storage, units
from cellray.data.atlas import FIELDS
from cellray.data.features import Tally, targets
from cellray.data.plan import Group, Part, Plan, survey
from cellray.data.report import Counted
from cellray.data.store import BATCH
from cellray.data.store import VERSION as STORE_VERSION
from cellray.data.tokens import Tokenizer
from cellray.data.units import UNKNOWN, Origin, Rows
from cellray.train.recipe import Recipe

TOKEN_BYTES = 2.0
"""About what a token takes in a shard, compressed; decides how many shards there are."""

Event = Callable[[str, int, int], None]


def ingest(recipe: Recipe, store_url: str, on_event: Event | None = None) -> dict[str, Any]:
    """The ingest report, once STORE_URL holds the whole token store of the recipe's atlas.

    Needs a Ray that is connected. Takes up where an earlier run stopped; returns at once where
    the store is there. `on_event(step, done, total)` hears of the steps "count", "tokens" (rows of
    files) and "shards". ValueError, naming file and key, for input that cannot be taken, and
    for a store that was made from something else.
    """
    plan = survey(recipe)
    held = committed(plan, recipe, store_url)
    if held is not None:
        return held
    run = _Run(recipe, plan, store_url, on_event or _silent)
    counted, rows = run.count()
    tokenizer = counted.tokenizer(plan, recipe.ingest.min_cells)
    shards = run.write(counted, rows, tokenizer)
    return run.commit(counted, tokenizer, shards)


def committed(plan: Plan, recipe: Recipe, store_url: str) -> dict[str, Any] | None:
    """The report of the store at STORE_URL, None if there is none.

    ValueError if it was made from other files or settings than the plan's, with what differs, or
    lacks data sets that failed when that is not allowed.
    """
    path = storage.join(store_url, "store.json")
    if not storage.exists(path):
        return None
    manifest = json.loads(storage.read_bytes(path))
    if manifest.get("fingerprint") != plan.fingerprint:
        what = report.difference(manifest.get("inputs", {}), plan.inputs)
        raise ValueError(
            f"{path} is of a store made from other files or settings: {what}. "
            "Choose another run=, or remove it."
        )
    found: dict[str, Any] = manifest["ingest"]
    if found["failed"] and not recipe.ingest.allow_failed_files:
        raise ValueError(
            f"{path} is of a store without the data sets that failed: "
            + "; ".join(f"{entry['dataset']}: {entry['reason']}" for entry in found["failed"])
        )
    return found


class _Run:
    """One ingest on its way. A plain holder of what all its steps need."""

    def __init__(self, recipe: Recipe, plan: Plan, store: str, on_event: Event) -> None:
        self.recipe, self.plan, self.on_event = recipe, plan, on_event
        self.store = storage.absolute(store)
        key = f"{plan.fingerprint} {recipe.ingest.unit_cells}"
        self.parts = storage.join(self.store, f".parts-{hashlib.sha256(key.encode()).hexdigest()[:16]}")
        self.minimum = {m.name: m.min_features for m in plan.modalities}
        self.out = plan.dropped

    def count(self) -> tuple[Counted, list[list[Rows]]]:
        """Pass 1: the statistics of every file, what of it is dropped, and the units of each part."""
        parts = [(group, part) for group in self.plan.groups for part in group.parts]
        origins = [self._origin(part, np.empty(0, np.int32)) for _, part in parts]
        rows: list[list[Rows]] = []
        number = 0
        for at, (group, part) in enumerate(parts):
            rows.append([])
            for start, stop in part.units:
                cells = part.cells[start:stop]
                rows[-1].append(
                    Rows(
                        number=number,
                        origin=at,
                        start=start,
                        stop=stop,
                        dropped=self.out[group.name][cells],
                        assays=group.about["assay"][cells],
                        places=np.empty(0, np.int64),
                    )
                )
                number += 1
        errors = self._read("count", units.count, units.count_path, self.parts, rows, origins, ())
        bad = {parts[at][0].name: errors[at] for at in sorted(errors, reverse=True)}
        failed = [*self.plan.failed, *({"dataset": name, "reason": bad[name]} for name in sorted(bad))]
        if len(bad) == len(self.plan.groups):
            raise ValueError("no data set can be read: " + "; ".join(entry["reason"] for entry in failed))
        good = [at for at, (group, _) in enumerate(parts) if group.name not in bad]
        found = [self._sum(rows[at], origins[at]) for at in good]
        counted = Counted(
            groups=[group for group in self.plan.groups if group.name not in bad],
            parts=[parts[at][1] for at in good],
            tallies=[tally for tally, _ in found],
            facts=[facts for _, facts in found],
            failed=failed,
        )
        return counted, [rows[at] for at in good]

    def write(self, counted: Counted, rows: list[list[Rows]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """Pass 2: tokens of every file by shard, then the shards; what each of them holds."""
        tokens = sum(facts["tokens"] for facts in counted.facts)
        shards = max(1, round(tokens * TOKEN_BYTES / self.recipe.ingest.shard_bytes))
        table, places, bounds = order(counted.groups, self.out, shards)
        # What failed in an earlier run may not have failed now: pieces of other ids must not meet.
        key = json.dumps([tokenizer.hash, [group.name for group in counted.groups], bounds.tolist()])
        folder = storage.join(self.parts, storage.sha256(key.encode())[:16])
        units.write_cells(table, bounds, folder)
        origins, pieces = [], []
        owners = [group for group in counted.groups for _ in group.parts]
        for at, (group, part) in enumerate(zip(owners, counted.parts, strict=True)):
            target = targets(part.features, tokenizer.vocabularies[part.file.modality])
            origins.append(self._origin(part, target))
            spots = places[group.name][part.cells]
            pieces.append([_placed(r, at, spots[r.start : r.stop]) for r in rows[at]])
        words = ray.put(tokenizer)
        errors = self._read(
            "tokens", units.tokenize, units.piece_path, folder, pieces, origins, (words, bounds)
        )
        assert not errors
        sources = [
            (r.number, part.file.modality)
            for part, own in zip(counted.parts, pieces, strict=True)
            for r in own
        ]
        missing = _missing(units.shard_path, folder, range(shards))
        more = (bounds, sources, words, self.store, folder)
        tasks = [functools.partial(_call, units.assemble, shard, more) for shard in missing]
        done = shards - len(missing)
        self.on_event("shards", done, shards)
        for _, error in execute(tasks):
            if error:
                raise ValueError(error)
            done += 1
            self.on_event("shards", done, shards)
        return [json.loads(storage.read_bytes(units.shard_path(folder, s))) for s in range(shards)]

    def commit(self, counted: Counted, tokenizer: Tokenizer, shards: list[dict[str, Any]]) -> dict[str, Any]:
        """The report, after vocabulary and manifest are written and the parts are gone."""
        data = encode_vocabulary(tokenizer)
        digest = storage.sha256(data)
        name = f"vocabulary-{digest}.arrow"
        storage.write_bytes(storage.join(self.store, name), data)
        found = report.make(counted, self.out, tokenizer, shards)
        manifest = {
            "version": STORE_VERSION,
            "fingerprint": self.plan.fingerprint,
            "tokenizer": tokenizer.hash,
            "vocabulary": {"name": name, "sha256": digest},
            "modalities": list(tokenizer.vocabularies),
            "batch": BATCH,
            "shards": [{k: s[k] for k in ("name", "sha256", "bytes", "rows")} for s in shards if s["rows"]],
            "inputs": self.plan.inputs,
            "ingest": found,
        }
        path = storage.join(self.store, "store.json")
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        if not storage.write_once(path, text.encode()) and storage.read_bytes(path) != text.encode():
            raise ValueError(f"{path} was written by another ingest while this one ran: choose another run=")
        fs, parts = storage.locate(self.parts)
        fs.rm(parts, recursive=True)
        return dict(json.loads(text)["ingest"])

    def _origin(self, part: Part, target: np.ndarray) -> Origin:
        return Origin(
            file=part.file,
            columns=part.columns,
            features=len(part.features),
            min_features=self.minimum[part.file.modality],
            targets=target,
        )

    def _sum(self, rows: Sequence[Rows], origin: Origin) -> tuple[Tally, dict[str, Any]]:
        """The statistics and facts of a whole part."""
        whole = Tally(origin.features)
        facts: dict[str, Any] = {}
        for own in rows:
            tally, more = units.counted(self.parts, own.number, origin.features)
            for assay in tally.sums:
                whole.add(assay, tally.sums[assay], tally.nonzero[assay], tally.cells[assay])
            facts = report.added(facts, {k: v for k, v in more.items() if k not in ("assays", "cells")})
        return whole, facts

    def _read(
        self,
        step: str,
        work: Callable[..., None],
        path: Callable[[str, int], str],
        folder: str,
        rows: Sequence[Sequence[Rows]],
        origins: Sequence[Origin],
        more: tuple[Any, ...],
    ) -> dict[int, str]:
        """Do the missing units of one step; the reason for each origin that failed, where that is allowed."""
        every = [own for part in rows for own in part]
        size = {own.number: own.stop - own.start for own in every}
        missing = set(_missing(path, folder, [own.number for own in every]))
        total = sum(size.values())
        done = total - sum(size[number] for number in missing)
        self.on_event(step, done, total)
        shared = ray.put(list(origins))
        todo = [own for own in every if own.number in missing]
        tasks = [functools.partial(_call_rows, work, own, shared, (*more, folder)) for own in todo]
        errors: dict[int, tuple[int, str]] = {}
        for index, error in execute(tasks):
            own = todo[index]
            if error and not (step == "count" and self.recipe.ingest.allow_failed_files):
                raise ValueError(error)
            if error:
                errors[own.origin] = min(errors.get(own.origin, (own.number, error)), (own.number, error))
            done += size[own.number]
            self.on_event(step, done, total)
        return {origin: error for origin, (_, error) in errors.items()}


def _missing(path: Callable[[str, int], str], folder: str, numbers: Sequence[int]) -> list[int]:
    """Units whose file is not in `folder` yet."""
    fs, where = storage.locate(folder)
    files = fs.ls(where, detail=False) if fs.exists(where) else []
    there = {name.rpartition("/")[2] for name in files}
    return [number for number in numbers if path("", number).rpartition("/")[2] not in there]


def _placed(rows: Rows, origin: int, places: np.ndarray) -> Rows:
    return Rows(**(vars(rows) | {"origin": origin, "places": places}))


def _silent(step: str, done: int, total: int) -> None:
    """For callers that do not listen."""


def order(
    groups: Sequence[Group], out: dict[str, np.ndarray], shards: int
) -> tuple[pa.Table, dict[str, np.ndarray], np.ndarray]:
    """The cells in the order of the store, each data set's places in it, and the bounds of the shards.

    A cell's shard is hash mod shards, its place in the shard by hash: neither depends on other
    cells. Cells that are `out` have place UNKNOWN. Bounds are int64 [shards + 1].
    """
    ids = [f"{group.name}:{cell}" for group in groups for cell in group.cells]
    keep = np.concatenate([~out[group.name] for group in groups])
    hashes = np.frombuffer(
        b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids), "<u8"
    )
    shard = hashes % np.uint64(shards)
    ranked = np.lexsort((hashes, shard))
    ranked = ranked[keep[ranked]]
    places = np.full(len(ids), UNKNOWN, np.int64)
    places[ranked] = np.arange(len(ranked))
    ends = np.cumsum([len(group.cells) for group in groups])
    columns = {"cell_id": pa.array(ids, pa.string())}
    columns["dataset"] = pa.array([group.name for group in groups for _ in group.cells], pa.string())
    for name in FIELDS:
        columns[name] = pa.array(np.concatenate([group.about[name] for group in groups]), pa.string())
    table = pa.table(columns).take(pa.array(ranked))
    bounds = np.searchsorted(shard[ranked], np.arange(shards + 1, dtype=np.uint64))
    split = np.split(places, ends[:-1])
    return table, {group.name: part for group, part in zip(groups, split, strict=True)}, bounds


def encode_vocabulary(tokenizer: Tokenizer) -> bytes:
    """The tokenizer as the Arrow file that a store reads it from."""
    table = tokenizer.to_arrow().combine_chunks()
    return units.encode(table.to_batches(), table.schema)


class Tasks(Datasource):
    """Calls as a Ray Data source: one read task each, which gives its index and what went wrong, or ""."""

    def __init__(self, calls: Sequence[Callable[[], None]]) -> None:
        super().__init__()
        self.calls = calls

    def estimate_inmemory_data_size(self) -> int:
        return 64 * len(self.calls)

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        about = BlockMetadata(num_rows=1, size_bytes=64, exec_stats=None)
        return [
            ReadTask(functools.partial(_outcome, i, call), about, per_task_row_limit=per_task_row_limit)
            for i, call in enumerate(self.calls)
        ]


def _outcome(index: int, call: Callable[[], None]) -> list[pa.Table]:
    """One row: `index`, and the message of the ValueError that `call` raised.

    As a value, because Ray would wrap an error that is raised in its own words and stop everything.
    """
    error = ""
    try:
        call()
    except ValueError as found:
        error = str(found)
    return [pa.table({"index": [index], "error": [error]})]


def _call(work: Callable[..., None], first: Any, more: tuple[Any, ...]) -> None:
    work(first, *(ray.get(m) if isinstance(m, ray.ObjectRef) else m for m in more))


def _call_rows(work: Callable[..., None], rows: Rows, shared: ray.ObjectRef, more: tuple[Any, ...]) -> None:
    _call(work, rows, (ray.get(shared)[rows.origin], *more))


def execute(calls: Sequence[Callable[[], None]]):  # type: ignore[no-untyped-def]
    """Do `calls` in parallel with Ray Data; (index, error or "") of each, as they get done."""
    if not calls:
        return
    hush()
    dataset = ray.data.read_datasource(Tasks(calls), override_num_blocks=len(calls))
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from zip(table["index"].to_pylist(), table["error"].to_pylist(), strict=True)


def hush() -> None:
    """Keep Ray Data, in this process, from drawing bars of its own and from telling of its plans."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
