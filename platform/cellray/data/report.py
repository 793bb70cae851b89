"""The ingest report: cells, features and counts, in, kept and dropped with the reason. They add up."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cellray.data.features import Tally, targets, vocabulary
from cellray.data.group import Group, Part
from cellray.data.plan import Plan
from cellray.data.qc import EMPTY, KEPT, REASONS, Metrics
from cellray.data.tokens import Tokenizer, Vocabulary
from cellray.data.verdicts import Verdicts


@dataclass
class Counted:
    """What the first pass found in the data sets that can be read."""

    groups: list[Group]
    parts: list[Part]
    """Those of the groups, in order; the lists below go with them."""
    numbers: list[list[int]]
    """The units that read each part."""
    metrics: list[Metrics]
    """What was measured of each cell."""
    facts: list[dict[str, int]]
    """What was in each part, as `units.read` has it."""
    failed: list[dict[str, str]]
    """Data sets that cannot be read: `dataset` and `reason`."""
    verdicts: Verdicts | None = None
    tallies: list[Tally] = field(default_factory=list)
    """Statistics of the cells that stay."""

    def owned(self) -> Iterator[tuple[Group, Part]]:
        """Every part with its data set."""
        owners = [group for group in self.groups for _ in group.parts]
        return zip(owners, self.parts, strict=True)

    def of(self, modality: str) -> list[int]:
        """Which parts are of `modality`."""
        return [i for i, part in enumerate(self.parts) if part.file.modality == modality]

    def widths(self) -> dict[str, str]:
        """Modality -> the narrowest type that holds its counts."""
        found: dict[str, int] = {}
        for part, facts in zip(self.parts, self.facts, strict=True):
            size = 1 if facts["most"] < 1 << 8 else 2 if facts["most"] < 1 << 16 else 4
            found[part.file.modality] = max(size, found.get(part.file.modality, 1))
        return {name: f"uint{8 * size}" for name, size in found.items()}

    def tokenizer(self, plan: Plan, min_cells: int) -> Tokenizer:
        """The vocabularies with their statistics, which stay as they are from now on."""
        vocabularies = {}
        for modality in plan.modalities:
            if mine := self.of(modality.name):
                features = [self.parts[i].features.names for i in mine]
                symbols = [self.parts[i].features.symbols for i in mine]
                tallies = [self.tallies[i] for i in mine]
                vocabularies[modality.name] = vocabulary(modality, features, symbols, tallies, min_cells)
        return Tokenizer(vocabularies)


def make(
    counted: Counted,
    tokenizer: Tokenizer,
    shards: Sequence[dict[str, Any]],
    held: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report, plain JSON values, behind that of the edition before, if there is one.

    ValueError unless all adds up: what is in the shards, plus what was dropped with a reason, is
    what the files held, cells and counts alike.
    """
    stored: dict[str, Any] = {}
    for shard in shards:
        stored = added(stored, shard["groups"])
    lost = "not_in_vocabulary" if held else "in_too_few_cells"
    datasets = list(held["datasets"]) if held else []
    datasets += [_dataset(group, counted, tokenizer, stored, lost) for group in counted.groups]
    dropped: Counter[str] = Counter()
    for entry in datasets:
        dropped.update(entry["dropped"])
    assert counted.verdicts is not None
    return {
        "cells_in": sum(entry["cells_in"] for entry in datasets),
        "cells_kept": sum(entry["cells_kept"] for entry in datasets),
        "dropped": dict(dropped),
        "features": {name: len(v) for name, v in tokenizer.vocabularies.items()},
        "datasets": datasets,
        "quality": [*(held["quality"] if held else []), *counted.verdicts.judged],
        "failed": counted.failed,
    }


def _dataset(
    group: Group, counted: Counted, tokenizer: Tokenizer, stored: dict[str, Any], lost: str
) -> dict[str, Any]:
    held = stored.get(group.name, {})
    assert counted.verdicts is not None
    reasons = np.bincount(counted.verdicts.cells[group.name], minlength=len(REASONS))
    cells, kept = len(group.cells), held.get("cells", 0)
    dropped = {REASONS[i]: int(n) for i, n in enumerate(reasons) if n and i not in (KEPT, EMPTY)}
    nothing = cells - kept - sum(dropped.values())
    assert nothing >= 0, group.name
    own = {id(part) for part in group.parts}
    modalities = {}
    for name, words in tokenizer.vocabularies.items():
        if mine := [i for i in counted.of(name) if id(counted.parts[i]) in own]:
            there = held.get("modalities", {}).get(name, {})
            modalities[name] = _modality(mine, counted, words, there, lost)
    return {
        "name": group.name,
        "cells_in": cells,
        "cells_kept": kept,
        "dropped": {"label": 0} | dropped | {"nothing_left": nothing},
        "species": [group.species] if group.species else [],
        "species_from": group.species_from,
        "labels": held.get("labels", {}),
        "label_from": group.label_from,
        "donors": held.get("donors", {}),
        "batches": held.get("batches", {}),
        "assays": held.get("assays", {}),
        "present": held.get("present", {}),
        "modalities": modalities,
    }


def _modality(
    mine: Sequence[int], counted: Counted, words: Vocabulary, held: dict[str, int], lost: str
) -> dict[str, Any]:
    """One modality of one data set, over its files `mine`."""
    assert counted.verdicts is not None
    cells = np.zeros(len(REASONS), np.int64)
    counts = np.zeros(len(REASONS), np.int64)
    unknown = 0
    for i in mine:
        reason, metrics = counted.verdicts.rows[i], counted.metrics[i]
        cells += np.bincount(reason, minlength=len(REASONS))
        for number in np.unique(reason):
            counts[number] += metrics.counts[reason == number].sum(dtype=np.int64)
        away = targets(counted.parts[i].features.names, words) < 0
        unknown += sum(int(sums[away].sum()) for sums in counted.tallies[i].sums.values())
    every = sum(len(counted.parts[i].cells) for i in mine)
    counts_in = sum(counted.facts[i]["counts_in"] for i in mine)
    no_feature = sum(counted.facts[i]["unmapped"] for i in mine)
    kept, kept_counts = held.get("cells", 0), held.get("counts", 0)
    nothing = int(cells[KEPT]) - kept
    cells_dropped = {REASONS[n]: int(cells[n]) for n in range(1, len(REASONS)) if cells[n]}
    counts_dropped = {REASONS[n]: int(counts[n]) for n in range(1, len(REASONS)) if counts[n]}
    counts_dropped |= {f"feature_{lost}": unknown} | ({"no_feature": no_feature} if no_feature else {})
    if nothing < 0 or counts_in != kept_counts + sum(counts_dropped.values()):
        where = ", ".join(counted.parts[i].file.url for i in mine)
        raise ValueError(
            f"{where}: {counts_in:,} counts were found first, but {kept_counts:,} are kept and "
            f"{counts_dropped} dropped. Did a file change meanwhile? Nothing was committed; ingest again."
        )
    features = np.unique(np.concatenate([counted.parts[i].features.names for i in mine]))
    known = int((targets(features, words) >= 0).sum())
    return {
        "cells_in": every,
        "cells_kept": kept,
        "cells_dropped": {"label": 0} | cells_dropped | {"nothing_left": nothing},
        "features_in": len(features),
        "features_kept": known,
        "features_dropped": {lost: len(features) - known},
        "counts_in": counts_in,
        "counts_kept": kept_counts,
        "counts_dropped": {"label": 0} | counts_dropped,
        "tokens": held.get("tokens", 0),
        "names": [
            {"file": counted.parts[i].file.given} | dict(counted.parts[i].features.about)
            for i in mine
            if counted.parts[i].features.about
        ],
    }


def added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two nested dicts of numbers, added."""
    found = dict(one)
    for key, value in other.items():
        if isinstance(value, dict):
            found[key] = added(one.get(key, {}), value)
        else:
            found[key] = one.get(key, 0) + value
    return found


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """In what the inputs of two stores differ, in words; the first few of it."""
    found = []
    for key in ("version", "modalities"):
        if old.get(key) != new.get(key):
            found.append(f"{key} was {old.get(key)!r} and is {new.get(key)!r}")
    one, other = _flat(old.get("ingest", {})), _flat(new.get("ingest", {}))
    for key in sorted(one | other):
        if one.get(key) != other.get(key):
            found.append(f"{key} was {one.get(key)!r} and is {other.get(key)!r}")
    before = {(f["dataset"], f["modality"], f["url"]): f for f in old.get("files", [])}
    after = {(f["dataset"], f["modality"], f["url"]): f for f in new["files"]}
    found += [f"{row[2]} of {row[0]} is no longer read" for row in before if row not in after]
    found += [f"{row[2]} of {row[0]} is new" for row in after if row not in before]
    for row in before.keys() & after.keys():
        one, other = before[row], after[row]
        names = sorted(name for name in one | other if one.get(name) != other.get(name))
        if names:
            what = "content" if {"bytes", "sha256", "tag", "missing"} & set(names) else ", ".join(names)
            found.append(f"{row[2]} of {row[0]} has another {what}")
    return "; ".join(sorted(found)[:4]) or "their order"


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`{"qc": {"mads": 5}}` as `{"qc.mads": 5}`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inner = _flat(value) if isinstance(value, Mapping) else {"": value}
        found |= {f"{key}.{name}".rstrip("."): item for name, item in inner.items()}
    return found
