"""The ingest report: cells, features and counts, in, kept and dropped with the reason. They add up."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellray.data.features import Tally, targets, vocabulary
from cellray.data.plan import Group, Part, Plan
from cellray.data.tokens import Tokenizer, Vocabulary


@dataclass(frozen=True)
class Counted:
    """What the first pass found in the data sets that can be read."""

    groups: list[Group]
    parts: list[Part]
    """Those of the groups, in order; the lists below go with them."""
    tallies: list[Tally]
    """Statistics of the cells that stay."""
    facts: list[dict[str, Any]]
    """What was in each part and what was dropped of it, as `units.count` has it."""
    failed: list[dict[str, str]]
    """Data sets that cannot be read: `dataset` and `reason`."""

    def of(self, modality: str) -> list[int]:
        """Which parts are of `modality`."""
        return [i for i, part in enumerate(self.parts) if part.file.modality == modality]

    def tokenizer(self, plan: Plan, min_cells: int) -> Tokenizer:
        """The vocabularies with their statistics, which stay as they are from now on."""
        vocabularies = {}
        for modality in plan.modalities:
            if mine := self.of(modality.name):
                features = [self.parts[i].features for i in mine]
                symbols = [self.parts[i].symbols for i in mine]
                tallies = [self.tallies[i] for i in mine]
                vocabularies[modality.name] = vocabulary(modality, features, symbols, tallies, min_cells)
        return Tokenizer(vocabularies)


def make(
    counted: Counted, out: dict[str, np.ndarray], tokenizer: Tokenizer, shards: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The report, plain JSON values. `out` are the cells dropped for their label, by data set.

    ValueError unless all adds up: what is in the shards, plus what was dropped with a reason, is
    what the files held, cells and counts alike.
    """
    stored: dict[str, Any] = {}
    for shard in shards:
        stored = added(stored, shard["groups"])
    datasets = [_dataset(group, counted, out[group.name], tokenizer, stored) for group in counted.groups]
    dropped: Counter[str] = Counter()
    for entry in datasets:
        dropped.update(entry["dropped"])
    return {
        "cells_in": sum(entry["cells_in"] for entry in datasets),
        "cells_kept": sum(entry["cells_kept"] for entry in datasets),
        "dropped": dict(dropped),
        "features": {name: len(v) for name, v in tokenizer.vocabularies.items()},
        "datasets": datasets,
        "failed": counted.failed,
    }


def _dataset(
    group: Group, counted: Counted, out: np.ndarray, tokenizer: Tokenizer, stored: dict[str, Any]
) -> dict[str, Any]:
    held = stored.get(group.name, {})
    cells, kept, label = len(group.cells), held.get("cells", 0), int(out.sum())
    assert cells >= label + kept, group.name
    own = {id(part) for part in group.parts}
    modalities = {}
    for name, words in tokenizer.vocabularies.items():
        if mine := [i for i in counted.of(name) if id(counted.parts[i]) in own]:
            modalities[name] = _modality(mine, counted, words, held.get("modalities", {}).get(name, {}))
    return {
        "name": group.name,
        "cells_in": cells,
        "cells_kept": kept,
        "dropped": {"label": label, "nothing_left": cells - label - kept},
        "species": sorted({str(species) for species in group.about["species"] if species}),
        "labels": held.get("labels", {}),
        "label_from": group.label_from,
        "donors": held.get("donors", {}),
        "batches": held.get("batches", {}),
        "assays": held.get("assays", {}),
        "present": held.get("present", {}),
        "modalities": modalities,
    }


def _modality(
    mine: Sequence[int], counted: Counted, words: Vocabulary, held: dict[str, int]
) -> dict[str, Any]:
    """One modality of one data set, over its files `mine`."""
    total: dict[str, Any] = {}
    rare = 0
    for i in mine:
        total = added(total, counted.facts[i])
        lost = targets(counted.parts[i].features, words) < 0
        rare += sum(int(sums[lost].sum()) for sums in counted.tallies[i].sums.values())
    cells, kept = sum(len(counted.parts[i].cells) for i in mine), held.get("cells", 0)
    nothing = cells - kept - sum(total["cells_dropped"].values())
    counts_dropped = total["counts_dropped"] | {"feature_in_too_few_cells": rare}
    counts = held.get("counts", 0)
    where = ", ".join(counted.parts[i].file.url for i in mine)
    if nothing < 0 or total["counts_in"] != counts + sum(counts_dropped.values()):
        raise ValueError(
            f"{where}: {total['counts_in']:,} counts were found first, but {counts:,} are kept and "
            f"{counts_dropped} dropped. Did a file change meanwhile? Nothing was committed; ingest again."
        )
    features = np.unique(np.concatenate([counted.parts[i].features.astype(str) for i in mine]))
    known = int((targets(features, words) >= 0).sum())
    return {
        "cells_in": cells,
        "cells_kept": kept,
        "cells_dropped": total["cells_dropped"] | {"nothing_left": nothing},
        "features_in": len(features),
        "features_kept": known,
        "features_dropped": {"in_too_few_cells": len(features) - known},
        "counts_in": total["counts_in"],
        "counts_kept": counts,
        "counts_dropped": counts_dropped,
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
    for key in ("version", "ingest", "modalities"):
        if old.get(key) != new.get(key):
            found.append(f"{key} was {old.get(key)!r} and is {new.get(key)!r}")
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
