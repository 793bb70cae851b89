"""From the figures of every training seed to the rows of the table, beside what simple models do."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellray.tasks.missing import NO_GAIN, NOTHING
from cellray.tasks.rows import interval, verdict
from tests.bench.harness.jobs import ends
from tests.bench.harness.report import Row
from tests.bench.paired.material import Goal, Pairs

SHOWN: Mapping[str, tuple[str, ...]] = {
    "annotation": ("accuracy", "macro F1"),
    "RNA to ATAC": ("AUROC", "AUROC, depth-adjusted", "AUROC at one depth"),
    "RNA to protein": ("Pearson", "Pearson within label"),
}
"""Metrics in the table; the file has all."""
STUDENT, CONTROL, TEACHER = (f"{name}, linear probe" for name in ("student", "RNA-only model", "teacher"))
Figures = Mapping[str, Any]
"""What `job.trained` or `job.compared` leaves."""


@dataclass(frozen=True)
class Table:
    """The figures of one data set: `seeds` of training, and the baselines, fitted once."""

    pairs: Pairs
    seeds: Sequence[Figures]
    baselines: Figures

    def rows(self) -> Iterator[Row]:
        """Task by task and metric by metric: our models, then the baselines, the best first."""
        for task in self.seeds[0]["tasks"]:
            for metric in SHOWN.get(task, ()):
                yield from self._models(task, metric)
                if task == "annotation":
                    yield from self._gains(metric)
                yield from self._baselines(task, metric)
        yield from self._effort()

    def values(self, task: str, metric: str, model: str) -> np.ndarray | None:
        """Scores [seeds, 1 + resamples] of one of our models; None where it was not scored."""
        found = [seed["tasks"][task]["results"][model]["values"].get(metric) for seed in self.seeds]
        return None if any(values is None for values in found) else np.array(found)

    def simple(self, task: str, metric: str) -> dict[str, np.ndarray]:
        """Baseline -> its score and resamples, the best first."""
        results = self.baselines["tasks"][task]["results"]
        found = {m: np.array(r["values"][metric]) for m, r in results.items() if metric in r["values"]}
        able = {model: values for model, values in found.items() if np.isfinite(values[0])}
        return dict(sorted(able.items(), key=lambda item: -item[1][0]))

    def _models(self, task: str, metric: str) -> Iterator[Row]:
        simple = self.simple(task, metric)
        best = next(iter(simple), None)
        about = "" if best is None else f"{best} {simple[best][0]:.3f}"
        for model, result in self.seeds[0]["tasks"][task]["results"].items():
            goal, values = self._goal(task, metric, model), self.values(task, metric, model)
            what = f"{self.pairs.name}: {task}, {metric}: {model}"
            if values is None:
                reason = result["reason"] or "not defined on these cells"
                yield Row(what=what, value=None, unit=metric, goal=goal, note=f"not run: {reason}")
                continue
            note = said(values)
            if best is not None:
                note += f"; {verdict(metric, values.mean(axis=0), simple[best])}"
            value = float(values[:, 0].mean())
            yield Row(what=what, value=value, unit=metric, goal=goal, baseline=about, note=note)

    def _goal(self, task: str, metric: str, model: str) -> float | None:
        asked = Goal(task=task, metric=metric, value=0.0, model=model)
        found = [g.value for g in self.pairs.goals if (g.task, g.metric, g.model) == _key(asked)]
        return found[0] if found else None

    def _gains(self, metric: str) -> Iterator[Row]:
        """Whether the student is above its control, the teacher above the student; and the recovery."""
        task, name = "annotation", f"{self.pairs.name}: annotation, {metric}"
        student, control, teacher = (self.values(task, metric, m) for m in (STUDENT, CONTROL, TEACHER))
        if student is None or control is None:
            return
        yield difference(f"{name}: student - RNA-only model", metric, student, control)
        if teacher is None:
            reason = f"not run: {self.seeds[0]['tasks'][task]['results'][TEACHER]['reason']}"
            for what in ("teacher - student", "recovery"):
                yield Row(what=f"{name}: {what}", value=None, unit=metric, note=reason)
            return
        yield difference(f"{name}: teacher - student", metric, teacher, student)
        yield recovery(f"{name}: recovery", student, control, teacher)

    def _baselines(self, task: str, metric: str) -> Iterator[Row]:
        for model, values in self.simple(task, metric).items():
            fits = self.baselines["tasks"][task]["results"][model]["seeds"]
            note = f"baseline, {fits} fit{'s' * (fits > 1)}"
            if len(values) > 1:
                low, high = interval(values)
                note += f"; 95 % {low:.3f} to {high:.3f}"
            what = f"{self.pairs.name}: {task}, {metric}: {model}"
            yield Row(what=what, value=float(values[0]), unit=metric, note=note)

    def _effort(self) -> Iterator[Row]:
        name = self.pairs.name
        for stage, first, last in ends(self.seeds):
            note = f"{first:.4g} at first"
            yield Row(what=f"{name}: loss of {stage}", value=last, unit="", note=note)
        for stage in self.seeds[0]["cpu"]:
            spent = [seed["cpu"][stage] for seed in self.seeds]
            yield Row(what=f"{name}: training of {stage}", value=float(np.mean(spent)), unit="CPU-s")
        whole = [sum(seed["cpu"].values()) for seed in self.seeds]
        note = f"{', '.join(f'{v:.0f}' for v in whole)} by seed"
        yield Row(what=f"{name}: training", value=float(np.mean(whole)), unit="CPU-s", note=note)
        measured = sum(seed["measured"] for seed in self.seeds)
        note = f"{measured:.0f} for probes of {len(self.seeds)} runs, the rest for baselines"
        every = measured + self.baselines["measured"]
        yield Row(what=f"{name}: scoring", value=every, unit="CPU-s", note=note)


def _key(goal: Goal) -> tuple[str, str, str]:
    return goal.task, goal.metric, goal.model


def said(values: np.ndarray) -> str:
    """Every seed's score, and the interval of the first, of [seeds, 1 + resamples]."""
    each = ", ".join(f"{value:.3f}" for value in values[:, 0])
    text = f"{each} by seed" if len(values) > 1 else f"{each}, one seed"
    if values.shape[1] > 1:
        low, high = interval(values[0])
        text += f"; 95 % {low:.3f} to {high:.3f}" + (" of the first" if len(values) > 1 else "")
    return text


def difference(what: str, unit: str, upper: np.ndarray, lower: np.ndarray) -> Row:
    """The mean of upper - lower, which are to be paired by seed and resample; the goal is not to lose."""
    gap = upper - lower
    note = f"{upper[:, 0].mean():.3f} - {lower[:, 0].mean():.3f}; {said(gap)}"
    return Row(what=what, value=float(gap[:, 0].mean()), unit=unit, goal=0.0, note=note)


def recovery(what: str, student: np.ndarray, control: np.ndarray, teacher: np.ndarray) -> Row:
    """(student - control) / (teacher - control), of the means over the seeds, whatever its sign."""
    won, gain = (float((m - control)[:, 0].mean()) for m in (student, teacher))
    note = f"{won:+.3f} of {gain:+.3f}"
    if gain <= NOTHING:
        note += f": {NO_GAIN}, so the ratio means little"
    return Row(what=what, value=won / gain if abs(gain) > 1e-6 else None, unit="share", note=note)


def not_run(pairs: Pairs, reason: str) -> Iterator[Row]:
    """Rows that say why nothing was measured on a data set."""
    for goal in pairs.goals:
        what = f"{pairs.name}: {goal.task}, {goal.metric}: {goal.model}"
        yield Row(what=what, value=None, unit=goal.metric, goal=goal.value, note=f"not run: {reason}")


def brief(figures: Figures) -> dict[str, Any]:
    """The same with the interval, `low` and `high`, in place of the resamples."""

    def short(values: Sequence[float]) -> dict[str, float]:
        found = {"value": values[0]}
        if len(values) > 1 and np.isfinite(values[0]):
            found["low"], found["high"] = interval(np.array(values))
        return found

    tasks = {
        task: about
        | {
            "results": {
                model: result | {"values": {k: short(v) for k, v in result["values"].items()}}
                for model, result in about["results"].items()
            }
        }
        for task, about in figures["tasks"].items()
    }
    return {**figures, "tasks": tasks}
