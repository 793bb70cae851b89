"""All scores of a run: every task on every data set that can be scored on it, beside its baselines."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cellray.data.modalities import Modality
from cellray.tasks import annotation, fidelity, missing, translation
from cellray.tasks.inputs import Cohort, Scored, cohort
from cellray.tasks.rows import Row
from cellray.train.recipe import Score


@dataclass(frozen=True)
class Unit:
    """A task on one data set, which can be scored apart from the others."""

    task: str
    dataset: str
    modality: str = ""

    def __str__(self) -> str:
        return f"{self.task} of {self.dataset}"


def units(scored: Scored) -> list[Unit]:
    """Every task that can be scored, data set by data set. ValueError where there is none."""
    if not scored.datasets:
        raise ValueError(
            "no cell is held out: there is nothing to score on. Set split.fraction, or name "
            "a label or a second modality in the atlas."
        )
    found = []
    for dataset in scored.datasets:
        if scored.labelled(dataset).any():
            found.append(Unit("annotation", dataset))
        measured = scored.measured(dataset)
        found += [Unit(f"RNA to {name}", dataset, name) for name in measured]
        if measured:
            found.append(Unit(missing.TASK, dataset))
    if not found:
        raise ValueError("no held-out cell was measured in RNA: the student cannot be scored")
    return found


def score(scored: Scored, settings: Score, progress: Callable[[str], None]) -> list[Row]:
    """Score rows of `report.json`, as `rows.Row` has them.

    Every task is fitted on training cells and scored on held-out cells of one data set at a time;
    the larger of them are subsampled, which `split` says. A value that could not be had is None
    and its reason says why. About two minutes of one CPU for 10,000 cells with 5,000 peaks.
    """
    return [row for unit in units(scored) for row in score_unit(scored, unit, settings, progress)]


def score_unit(scored: Scored, unit: Unit, settings: Score, progress: Callable[[str], None]) -> list[Row]:
    """The rows of one unit of `score`."""
    if unit.task == "annotation":
        return _annotation(scored, unit.dataset, settings, progress)
    if unit.task == missing.TASK:
        return _missing(scored, unit.dataset, settings, progress)
    modality = next(m for m in scored.modalities if m.name == unit.modality)
    return _translation(scored, unit.dataset, modality, settings, progress)


def _annotation(scored: Scored, dataset: str, settings: Score, progress: Callable[[str], None]) -> list[Row]:
    cells = _cohort(scored, dataset, scored.labelled(dataset), settings)
    if isinstance(cells, str):
        return annotation.not_run(dataset, cells)
    return annotation.annotation(cells, progress)


def _translation(
    scored: Scored, dataset: str, modality: Modality, settings: Score, progress: Callable[[str], None]
) -> list[Row]:
    cells = _cohort(scored, dataset, scored.paired(dataset, modality.name), settings)
    if isinstance(cells, str):
        return translation.not_run(dataset, modality, cells)
    return translation.translation(cells, modality, settings.features, progress)


def _missing(scored: Scored, dataset: str, settings: Score, progress: Callable[[str], None]) -> list[Row]:
    """Recovery of labels and targets, and fidelity, on cells with all modalities of the data set."""
    whole = scored.paired(dataset, *scored.measured(dataset))
    cells = _cohort(scored, dataset, whole, settings)
    if isinstance(cells, str):
        return missing.not_run(dataset, missing.LABEL, cells) + fidelity.not_run(dataset, cells)
    found: list[Row] = []
    labelled = whole & scored.labelled(dataset)
    if labelled.any():
        progress(f"{missing.TASK} of {dataset}: labels")
        own = _cohort(scored, dataset, labelled, settings)
        found += (
            missing.not_run(dataset, missing.LABEL, own)
            if isinstance(own, str)
            else missing.label_recovery(own)
        )
    for name, values in numeric_targets(scored):
        progress(f"{missing.TASK} of {dataset}: {name}")
        own = _cohort(scored, dataset, whole & np.isfinite(values), settings)
        if isinstance(own, str):
            found += missing.not_run(dataset, missing.target_metrics(name), own)
        else:
            found += missing.target_recovery(own, name, values)
    return found + fidelity.fidelity(cells, progress)


def _cohort(scored: Scored, dataset: str, wanted: np.ndarray, settings: Score) -> Cohort | str:
    return cohort(scored, dataset, wanted, seeds=settings.seeds, bootstrap=settings.bootstrap)


def numeric_targets(scored: Scored) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values [cells] of every numeric target, NaN where a cell has none."""
    if scored.targets is None:
        return
    aligned = scored.targets.set_index("cell_id").reindex(scored.cells["cell_id"])
    for name in aligned:
        if pd.api.types.is_numeric_dtype(aligned[name]):
            yield str(name), aligned[name].to_numpy(float)
