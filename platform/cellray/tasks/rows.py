"""Score rows: values with intervals, and verdicts against the best baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Row = dict[str, Any]
"""task, dataset, metric, model, value, low, high, seeds, split, verdict, reason. JSON values."""

Kind = Literal["ours", "reference", "baseline"]
"""The student, which gets a verdict; the teacher and other company; what the student has to beat."""
BASELINE = "baseline"
LOWER = ("calibration error", "foscttm")
"""Metrics that are better when lower."""
PLAIN = ("spread", "calibration error")
"""Facts without a verdict: it is easy to be calibrated and know nothing, as the majority is."""


@dataclass(frozen=True)
class Result:
    """What one model scored on one task: metric -> values [1 + resamples], the first the score itself.

    `seeds` is how many fits the values are the mean of; a model without chance has 1.
    """

    model: str
    kind: Kind
    values: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    seeds: int = 1
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Metric, or "" for all of them -> why it was not run."""


def averaged(model: str, kind: Kind, fits: Sequence[Mapping[str, np.ndarray]]) -> Result:
    """One result from the metrics of several fits, averaged."""
    values = {metric: np.mean([fit[metric] for fit in fits], axis=0) for metric in fits[0]}
    return Result(model, kind, values, len(fits))


def rows(task: str, dataset: str, split: str, metrics: Sequence[str], results: Sequence[Result]) -> list[Row]:
    """A row for every metric and model, our own models first, in the order given."""
    found: list[Row] = []
    for metric in metrics:
        best = _best(metric, results)
        for result in results:
            row: Row = {"task": task, "dataset": dataset, "metric": metric, "model": result.model}
            row |= {"value": None, "low": None, "high": None, "seeds": result.seeds, "split": split}
            row |= {"verdict": BASELINE if result.kind == "baseline" else "", "reason": ""}
            values = result.values.get(metric)
            if values is None or not np.isfinite(values[0]):
                reason = result.reasons.get(metric, result.reasons.get("", "not defined on these cells"))
                row |= {"reason": reason, "seeds": 0}
            else:
                row["value"] = float(values[0])
                if len(values) > 1:
                    row["low"], row["high"] = interval(values)
                if result.kind == "ours" and best is not None and not metric.startswith(PLAIN):
                    row["verdict"] = verdict(metric, values, best.values[metric])
            found.append(row)
    return found


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the resamples, widened to hold the score itself."""
    resamples = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(resamples, [0.025, 0.975])
    return min(float(low), float(values[0])), max(float(high), float(values[0]))


def verdict(metric: str, ours: np.ndarray, other: np.ndarray) -> str:
    """ "beats", "ties" or "loses": whether the interval of the paired difference leaves out zero."""
    sign = -1 if metric.startswith(LOWER) else 1
    low, high = interval(sign * (ours - other))
    return "beats" if low > 0 else "loses" if high < 0 else "ties"


def refused(model: str, kind: Kind, reason: str) -> Result:
    """A model that was not run, on any metric, and why."""
    return Result(model, kind, reasons={"": reason})


def _best(metric: str, results: Sequence[Result]) -> Result | None:
    sign = -1 if metric.startswith(LOWER) else 1
    able = [
        r for r in results if r.kind == "baseline" and metric in r.values and np.isfinite(r.values[metric][0])
    ]
    return max(able, key=lambda r: sign * r.values[metric][0], default=None)
