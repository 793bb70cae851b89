"""Which cells are held out: whole donors where there are some, else batches, else cells."""

import hashlib
import math

import numpy as np
import pandas as pd
import pyarrow as pa

ENOUGH = 3
"""Donors (or batches) a data set needs before they can be held out whole."""


def held_out(
    cells: pa.Table, *, by: str = "auto", fraction: float = 0.2
) -> tuple[np.ndarray, dict[str, str]]:
    """Mask of held-out cells, bool [cells], and the unit of each data set ("donor", "batch", "cell", "none").

    Units are taken in the order of the md5 of their name, so adding a data set moves no cell.
    Cells as units: md5(cell name) mod round(1 / fraction) = 0, as the published folds of the
    test data have it. A data set with neither a label nor a second modality has nothing to be
    scored on and is not split.
    """
    frame = cells.select(["cell_id", "dataset", "donor", "batch", "label", "present"]).to_pandas()
    test = np.zeros(len(frame), bool)
    units: dict[str, str] = {}
    for dataset, part in frame.groupby("dataset", sort=True):
        name = str(dataset)
        paired = (np.bitwise_count(part["present"].to_numpy()) > 1).any()
        if not paired and (part["label"] == "").all():
            units[name] = "none"
            continue
        unit = _unit(part) if by == "auto" else by
        units[name] = unit
        if unit == "cell":
            names = part["cell_id"].str.removeprefix(f"{name}:")
            fold = max(2, round(1 / fraction))
            test[part.index] = [_md5(n) % fold == 0 for n in names]
            continue
        found = sorted(set(part[unit]), key=_md5)
        if len(found) < 2:
            raise ValueError(
                f"data set {name!r} has one {unit} ({found[0]!r}): nothing can be held out by {unit}. "
                "Set split.by=cell, or name the column of the donors in the atlas."
            )
        chosen = found[: min(len(found) - 1, math.ceil(fraction * len(found)))]
        test[part.index] = part[unit].isin(chosen)
    return test, units


def _unit(part: pd.DataFrame) -> str:
    for unit in ("donor", "batch"):
        if part[unit].nunique() >= ENOUGH and (part[unit] != "").all():
            return unit
    return "cell"


def _md5(name: str) -> int:
    return int(hashlib.md5(name.encode(), usedforsecurity=False).hexdigest(), 16)
