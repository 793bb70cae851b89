"""`report.json`: what a run did and how good it is, never without the baselines; and the score table."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellray.data import storage
from cellray.tasks import annotation, fidelity, missing, translation
from cellray.tasks.rows import Row

SCHEMA = "cellray.report/1"
NEEDED: dict[str, tuple[str, ...]] = {
    "run": ("recipe", "store", "code"),
    "ingest": ("cells_in", "cells_kept", "dropped"),
    "student": ("parameters", "teacher_parameters", "recovery", "fidelity", "cells_per_cpu_second"),
    "endpoint": ("requests", "failed", "p50_ms", "max_abs_difference_to_offline"),
}
"""Part of the report -> the keys it cannot do without."""
STAGE = ("name", "steps", "seconds", "cells_per_second", "data_wait_share", "loss_first", "loss_last")
ROW = ("task", "dataset", "metric", "model", "value", "low", "high", "seeds", "split", "verdict")
VERDICTS = ("beats", "ties", "loses", "baseline", "")


def assemble(
    *,
    run: Mapping[str, Any],
    ingest: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    student: Mapping[str, Any],
    scores: Sequence[Row],
    endpoint: Mapping[str, Any],
) -> dict[str, Any]:
    """The report as JSON values, checked: see `check`.

    `run` holds the fingerprints `recipe`, `store` and `code`; `student` lacks only what the scores
    say, which is added here; an `endpoint` that was not asked has a `reason` and None elsewhere.
    """
    report = {
        "schema": SCHEMA,
        "run": dict(run),
        "ingest": dict(ingest),
        "stages": [dict(stage) for stage in stages],
        "student": {**student, **student_facts(scores)},
        "scores": [dict(row) for row in scores],
        "endpoint": dict(endpoint),
    }
    check(report)
    return report


def check(report: Mapping[str, Any]) -> None:
    """ValueError, naming the place, for a report that lacks a key, a baseline, or says NaN."""
    if report.get("schema") != SCHEMA:
        raise ValueError(f"report has the schema {report.get('schema')!r}; this cellray knows {SCHEMA!r}")
    for part, keys in NEEDED.items():
        held = report.get(part)
        if not isinstance(held, Mapping):
            raise ValueError(f"report has no {part!r}")
        if lacking := [key for key in keys if key not in held]:
            raise ValueError(f"report: {part} lacks {', '.join(lacking)}")
    for part in ("stages", "scores"):
        if not report.get(part):
            raise ValueError(f"report: there are no {part}")
    for stage in report["stages"]:
        if lacking := [key for key in STAGE if key not in stage]:
            raise ValueError(f"report: stage {stage.get('name')!r} lacks {', '.join(lacking)}")
    endpoint = report["endpoint"]
    if any(endpoint[key] is None for key in NEEDED["endpoint"]) and not endpoint.get("reason"):
        raise ValueError("report: endpoint has no figures and no reason why")
    for row in report["scores"]:
        _check_row(row)
    _check_baselines(report["scores"])
    try:
        json.dumps(report, allow_nan=False)
    except ValueError as error:
        raise ValueError("report holds NaN or infinity; write None and a reason") from error


def _check_row(row: Row) -> None:
    where = f"report: score of {row.get('model')!r} on {row.get('task')!r}, {row.get('metric')!r}"
    if lacking := [key for key in ROW if key not in row]:
        raise ValueError(f"{where} lacks {', '.join(lacking)}")
    if row["verdict"] not in VERDICTS:
        raise ValueError(f"{where} has the verdict {row['verdict']!r}, none of {VERDICTS}")
    if row["value"] is None and not row.get("reason"):
        raise ValueError(f"{where} has no value and no reason why")


def baselines(task: str, metric: str) -> tuple[str, ...]:
    """The models without which a score of `task` is not shown. ValueError for an unknown task."""
    if metric.startswith("recovery of "):
        return ()
    if task == annotation.TASK:
        return annotation.BASELINES
    if task == missing.TASK:
        return missing.BASELINES
    if task == fidelity.TASK:
        return fidelity.BASELINES
    if task.startswith("RNA to "):
        alone = ("RNA depth alone",) if metric in translation.DETECTION else ()
        return ("mean of training cells", *alone, *translation.FITTED, "random weights")
    raise ValueError(f"report: nobody said which baselines the task {task!r} needs")


def _check_baselines(scores: Sequence[Row]) -> None:
    shown: dict[tuple[str, str, str], set[str]] = {}
    for row in scores:
        shown.setdefault((row["task"], row["dataset"], row["metric"]), set()).add(row["model"])
    for (task, dataset, metric), models in shown.items():
        if lacking := [name for name in baselines(task, metric) if name not in models]:
            raise ValueError(
                f"report: {task} of {dataset}, {metric}, stands without its baselines "
                f"{', '.join(lacking)}. A baseline that was not run needs a row with the reason."
            )


def student_facts(scores: Sequence[Row]) -> dict[str, Any]:
    """`fidelity` and `recovery` of the student: medians over the data sets, None where never defined.

    Recovery is of a numeric target within labels where there is one, else of a whole target, else
    of the label; `recovery_of` says which. Data sets on which the teacher gains nothing count
    only where there is no other, and `recovery_note` says so then.
    """
    own = [row for row in scores if row["model"] == "student" and row["value"] is not None]
    held = {
        name.replace(" ", "_"): _median([r for r in own if (r["task"], r["metric"]) == (fidelity.TASK, name)])
        for name in ("cosine", "knn overlap")
    }
    every = [r for r in own if r["metric"].startswith("recovery of ")]
    recovered = [r for r in every if not r["reason"].startswith(missing.NO_GAIN)] or every
    kinds = sorted({r["metric"] for r in recovered}, key=_preference)
    kind = kinds[0] if kinds else ""
    return {
        "recovery": _median([r for r in recovered if r["metric"] == kind]),
        "recovery_of": kind.removeprefix("recovery of "),
        "recovery_note": next((r["reason"] for r in recovered if r["metric"] == kind), ""),
        "fidelity": held,
    }


def _preference(metric: str) -> tuple[int, str]:
    """Sorts the metrics of recovery, the most telling first."""
    if metric.endswith(" within label"):
        return 0, metric
    return (2 if metric.endswith(" of label") else 1), metric


def _median(rows: Sequence[Row]) -> float | None:
    return float(np.median([row["value"] for row in rows])) if rows else None


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The student on one task and data set against the best baseline, on the task's first metric."""

    task: str
    dataset: str
    metric: str
    value: float | None
    verdict: str
    text: str
    """One sentence."""


def headlines(scores: Sequence[Row]) -> list[Headline]:
    """One for every task and data set, in the order of the scores; of recovery the most telling metric."""
    found = []
    for task, dataset, metrics, _, held in blocks(scores):
        rows = list(held.values())
        judged = {r["metric"] for r in rows if r["verdict"] in VERDICTS[:3]}
        metric = min(judged, key=_preference if task == missing.TASK else metrics.index, default=metrics[0])
        same = [r for r in rows if r["metric"] == metric]
        ours = next(r for r in same if r["model"].startswith("student"))
        rivals = [r for r in same if r["verdict"] == "baseline" and r["value"] is not None]
        if ours["value"] is None or not rivals:
            text = f"not run: {ours.get('reason') or 'no baseline could be run'}"
        else:
            best = max(rivals, key=lambda r: r["value"])
            text = f"{number(ours['value'])} against {number(best['value'])} of {best['model']}"
            recovered = held.get(("student", f"recovery of {metric}"), {}).get("value")
            text += "" if recovered is None else f"; recovery {number(recovered, 2)}"
        found.append(
            Headline(
                task=task,
                dataset=dataset,
                metric=metric,
                value=ours["value"],
                verdict=ours["verdict"],
                text=text,
            )
        )
    return found


def number(value: float | None, digits: int = 3) -> str:
    """A score as it is printed."""
    if value is None or not math.isfinite(value):
        return "-"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def blocks(scores: Sequence[Row]) -> list[tuple[str, str, list[str], list[str], dict[tuple[str, str], Row]]]:
    """Scores by task and data set: task, data set, metrics, models, and the rows by (model, metric).

    Models come best first by the first metric, those that were not run last.
    """
    found = []
    keys = list(dict.fromkeys((r["task"], r["dataset"]) for r in scores))
    for task, dataset in keys:
        rows = {(r["model"], r["metric"]): r for r in scores if (r["task"], r["dataset"]) == (task, dataset)}
        metrics = list(dict.fromkeys(metric for _, metric in rows))
        models = list(dict.fromkeys(model for model, _ in rows))

        def place(model: str, rows: dict[Any, Row] = rows, first: str = metrics[0]) -> float:
            value = rows.get((model, first), {}).get("value")
            return math.inf if value is None else -value

        found.append((task, dataset, metrics, sorted(models, key=place), rows))
    return found


def table(scores: Sequence[Row]) -> str:
    """The scores as plain text for a terminal, two metrics beside each other."""
    lines: list[str] = []
    for task, dataset, metrics, models, rows in blocks(scores):
        recovered = [name for name in metrics if name.startswith("recovery of ")]
        shown = [name for name in metrics if name not in recovered]
        split = next((row["split"] for row in rows.values() if row["split"]), "")
        lines += ["", f"{task} | {dataset}" + (f" | {split}" if split else "")]
        for first in range(0, len(shown), 2):
            pair = shown[first : first + 2]
            lines.append(f"{'':38}" + "".join(f"{name:<31}" for name in pair).rstrip())
            lines += [_line(model, [rows.get((model, name)) for name in pair]) for model in models]
        lines += [f"> {name}: {_cell(rows['student', name])}" for name in recovered]
    return "\n".join(lines[1:])


def _line(model: str, found: Sequence[Row | None]) -> str:
    if all(row is None or row["value"] is None for row in found):
        found = found[:1]
    mark = ">" if model.startswith("student") else " "
    return f"{mark} {model:<36}{''.join(f'{_cell(row):<30} ' for row in found)}".rstrip()


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["value"] is None:
        return str(row["reason"]) if row["seeds"] else f"not run: {row['reason']}"
    spread = f" ({number(row['low'])} to {number(row['high'])})" if row["low"] is not None else ""
    if row["low"] is None and row.get("reason"):
        spread = f" ({row['reason']})"
    word = f" {row['verdict']}" if row["verdict"] in VERDICTS[:3] else ""
    return f"{number(row['value'])}{spread}{word}"


def write(folder: str, report: Mapping[str, Any], html: str) -> tuple[str, str]:
    """Write `report.html`, then `report.json`, each whole, after a check; returns their URLs."""
    check(report)
    page, facts = storage.join(folder, "report.html"), storage.join(folder, "report.json")
    storage.write_bytes(page, html.encode())
    storage.write_bytes(facts, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    return page, facts
