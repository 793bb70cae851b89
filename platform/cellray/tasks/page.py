"""`report.html`: one self-contained page, readable by those who were not there. All data is escaped."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cellray.tasks import plane
from cellray.tasks.figures import Panel, curves, dot
from cellray.tasks.report import VERDICTS, blocks, check, headlines, number
from cellray.tasks.rows import LOWER, PLAIN, Row

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(
    report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], panels: Sequence[Panel], *, title: str
) -> str:
    """The page of a checked report, without any outside resource.

    `metrics` are rows of the loss curves: `stage`, `step`, `loss`. `panels` come from
    `figures.panels`, or are empty.
    """
    check(report)
    style = (Path(__file__).parent / "page.css").read_text()
    parts = [
        _header(report, title),
        _summary(report),
        plane.section(report["student"]),
        _scores(report["scores"]),
        _embeddings(panels),
        _training(report["stages"], metrics),
        _ingest(report["ingest"]),
        _endpoint(report["endpoint"]),
        _reading(),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)} · cellray report</title><style>{style}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _header(report: Mapping[str, Any], title: str) -> str:
    facts = [(str(key), _short(key, value)) for key, value in report["run"].items() if _plain(value)]
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts)
    head = f'<p class="kicker">cellray report</p><h1>{escape(title)}</h1>'
    return f'<header>{head}<dl class="facts">{items}</dl></header>'


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool)) and value != ""


def _short(key: str, value: Any) -> str:
    """Fingerprints by their first twelve characters, numbers with separators."""
    if isinstance(value, str):
        digits = len(value) >= 32 and all(c in "0123456789abcdef" for c in value)
        return value[:12] if digits else value
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _summary(report: Mapping[str, Any]) -> str:
    lines = []
    found = headlines(report["scores"])
    for line in found:
        badge = _badge(line.verdict) if line.verdict else '<span class="badge none">no verdict</span>'
        lines.append(
            f"<tr><td>{badge}</td><th>{escape(line.task)}</th><td>{escape(line.dataset)}</td>"
            f"<td>{escape(line.metric)}</td><td>{escape(line.text)}</td></tr>"
        )
    counts = {word: sum(line.verdict == word for line in found) for word in VERDICTS[:3]}
    said = (
        f"On held-out cells the student beats the best simple baseline on {counts['beats']} of "
        f"{len(found)} comparisons, ties on {counts['ties']} and loses on {counts['loses']}."
    )
    return (
        f'<section><h2>In short</h2><p class="lead">{said}</p>{_tiles(report["student"])}'
        '<div class="scroll"><table class="summary"><thead><tr><th>verdict</th><th>task</th><th>data set</th>'
        f"<th>metric</th><th>student against the best baseline</th></tr></thead><tbody>{''.join(lines)}"
        "</tbody></table></div></section>"
    )


def _tiles(student: Mapping[str, Any]) -> str:
    share = student["teacher_parameters"] / max(student["parameters"], 1)
    held = student["fidelity"]
    of = f"of {student['recovery_of']}" if student.get("recovery_of") else "is not defined"
    if student.get("recovery_note"):
        of += f"; {student['recovery_note']}"
    rate = student["cells_per_cpu_second"]
    tiles = [
        (_count(student["parameters"]), f"parameters; the teacher has {share:.1f} times as many"),
        ("-" if rate is None else f"{rate:,.0f}", "cells embedded per CPU-second"),
        (number(student["recovery"], 2), f"recovery {of}"),
        (number(held["cosine"]), f"cosine to the teacher; {number(held['knn_overlap'])} of its neighbours"),
    ]
    items = "".join(
        f"<div><strong>{escape(big)}</strong><span>{escape(small)}</span></div>" for big, small in tiles
    )
    return f'<div class="tiles">{items}</div>'


def _count(value: int) -> str:
    return f"{value / 1e6:.1f}M" if value >= 1e6 else f"{value / 1e3:.0f}k" if value >= 1e3 else str(value)


def _badge(verdict: str) -> str:
    return f'<span class="badge {verdict}">{verdict}</span>' if verdict in VERDICTS[:3] else ""


def _scores(scores: Sequence[Row]) -> str:
    tables = [_table(*block) for block in blocks(scores)]
    return f"<section><h2>Scores beside baselines</h2>{''.join(tables)}</section>"


def _table(
    task: str,
    dataset: str,
    metrics: Sequence[str],
    models: Sequence[str],
    rows: Mapping[tuple[str, str], Row],
) -> str:
    """Models down, metrics across; the first metric is drawn with its interval."""
    recovered = [m for m in metrics if m.startswith("recovery of ")]
    shown = [m for m in metrics if m not in recovered]
    span = _span([rows[key] for key in rows if key[1] == shown[0]])
    best = {name: _best(name, rows) for name in shown}
    head = "".join(
        f'<th class="n">{escape(name)}{" ↓" if name.startswith(LOWER) else ""}</th>' for name in shown
    )
    body = "".join(_line(model, shown, rows, span, best) for model in models)
    split = next((r["split"] for r in rows.values() if r["split"]), "not run")
    notes = "".join(_recovery(next(r for (_, m), r in rows.items() if m == name)) for name in recovered)
    return (
        f'<article><h3>{escape(task)} <span class="set">{escape(dataset)}</span></h3>'
        f'<p class="split">{escape(split)}</p><div class="scroll"><table class="scores"><thead><tr>'
        f'<th>model</th><th class="plot">{escape(shown[0])}, 95 % interval</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{f'<ul class=recovery>{notes}</ul>' if notes else ''}</article>"
    )


def _line(
    model: str,
    metrics: Sequence[str],
    rows: Mapping[tuple[str, str], Row],
    span: tuple[float, float],
    best: Mapping[str, str],
) -> str:
    own = [rows[(model, name)] for name in metrics if (model, name) in rows]
    kind = (
        "ours"
        if model.startswith("student")
        else "baseline"
        if own[0]["verdict"] == "baseline"
        else "company"
    )
    if all(row["value"] is None for row in own):
        reason = escape(own[0]["reason"])
        return (
            f'<tr class="{kind} skipped"><th>{escape(model)}</th>'
            f'<td colspan="{len(metrics) + 1}">not run: {reason}</td></tr>'
        )
    cells = "".join(_cell(rows.get((model, name)), best[name] == model) for name in metrics)
    plot = f'<td class="plot">{_dot(own[0], span, kind)}</td>'
    return f'<tr class="{kind}"><th>{escape(model)}</th>{plot}{cells}</tr>'


def _dot(row: Row, span: tuple[float, float], kind: str) -> str:
    if row["value"] is None:
        return ""
    low, high = (row[key] if row[key] is not None else row["value"] for key in ("low", "high"))
    return dot(row["value"], low, high, span, kind, f"{number(low)} to {number(high)}")


def _cell(row: Row | None, best: bool) -> str:
    if row is None:
        return '<td class="n"></td>'
    if row["value"] is None:
        return f'<td class="n skipped" title="{escape(row["reason"])}">not run</td>'
    spread = "" if row["low"] is None else f"<small>{number(row['low'])} to {number(row['high'])}</small>"
    value = f"<b>{number(row['value'])}</b>" if best else number(row["value"])
    seeds = f"{row['seeds']} seed" + ("s" if row["seeds"] != 1 else "")
    return f'<td class="n" title="{seeds}">{_badge(row["verdict"])}{value}{spread}</td>'


def _recovery(row: Row) -> str:
    name = escape(row["metric"])
    if row["value"] is None:
        return f"<li>{name}: {escape(row['reason'])}</li>"
    if row["low"] is None:
        return f"<li>{name}: <b>{number(row['value'], 2)}</b> ({escape(row['reason'])})</li>"
    spread = f"{number(row['low'], 2)} to {number(row['high'], 2)}"
    return f"<li>{name}: <b>{number(row['value'], 2)}</b> ({spread})</li>"


def _span(rows: Iterable[Row]) -> tuple[float, float]:
    """The scale of the drawn metric: from the student and the better half of the others upwards.

    What is further off, as a rule the majority and the collapsed embedding, is drawn at the edge.
    """
    able = sorted((row for row in rows if row["value"] is not None), key=lambda row: -row["value"])
    if not able:
        return 0.0, 1.0
    near = able[: (len(able) + 1) // 2] + [row for row in able if row["model"].startswith("student")]
    ends = [row[key] for row in near for key in ("value", "low", "high") if row[key] is not None]
    return min(ends), max(ends)


def _best(metric: str, rows: Mapping[tuple[str, str], Row]) -> str:
    """The baseline that the student is judged against."""
    if metric.startswith(PLAIN):
        return ""
    sign = -1 if metric.startswith(LOWER) else 1
    able = {
        model: sign * row["value"]
        for (model, name), row in rows.items()
        if name == metric and row["verdict"] == "baseline" and row["value"] is not None
    }
    return max(able, key=lambda model: able[model]) if able else ""


def _embeddings(panels: Sequence[Panel]) -> str:
    if not panels:
        return ""
    found = []
    for colour in dict.fromkeys(panel.colour for panel in panels):
        own = [panel for panel in panels if panel.colour == colour]
        figures = "".join(
            f'<figure><img alt="UMAP of {escape(p.embedding)} coloured by {escape(colour)}" '
            f'src="data:image/png;base64,{base64.b64encode(p.png).decode()}">'
            f"<figcaption>{escape(p.embedding)}</figcaption></figure>"
            for p in own
        )
        keys = "".join(
            f'<li><i style="background:{shade}"></i>{escape(name)} <small>{count:,}</small></li>'
            for name, shade, count in own[0].legend
        )
        found.append(
            f'<h3>by {escape(colour)}</h3><div class="panels">{figures}</div><ul class="legend">{keys}</ul>'
        )
    return (
        "<section><h2>Embeddings</h2><p>UMAP of the same cells, training and held-out. The joint embedding "
        "reads every modality of a cell, the student and PCA only its RNA. UMAP distances between groups "
        f"mean little; the scores above do not use it.</p>{''.join(found)}</section>"
    )


def _training(stages: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> str:
    drawn = "".join(
        f"<figure>{svg}<figcaption>{escape(stage)}</figcaption></figure>"
        for stage, svg in curves(metrics).items()
    )
    heads = ("stage", "steps", "seconds", "cells/s", "waiting for data", "first loss", "last loss")
    rows = [
        (
            escape(str(s["name"])),
            f"{s['steps']:,}",
            f"{s['seconds']:,.1f}",
            f"{s['cells_per_second']:,.0f}",
            f"{100 * s['data_wait_share']:.1f} %",
            f"{s['loss_first']:.4g}",
            f"{s['loss_last']:.4g}",
        )
        for s in stages
    ]
    return f'<section><h2>Training</h2><div class="curves">{drawn}</div>{_plain_table(heads, rows)}</section>'


def _ingest(ingest: Mapping[str, Any]) -> str:
    dropped = sum(ingest["dropped"].values())
    said = f"{ingest['cells_in']:,} cells read, {ingest['cells_kept']:,} kept, {dropped:,} dropped"
    reasons = ", ".join(f"{_words(k)} {v:,}" for k, v in ingest["dropped"].items() if v)
    rows = []
    for entry in ingest.get("datasets", ()):
        for modality, held in entry.get("modalities", {}).items():
            rows.append(
                (
                    escape(str(entry["name"])),
                    escape(str(modality)),
                    f"{held['cells_in']:,}",
                    f"{held['cells_kept']:,}",
                    escape(_reasons(held["cells_dropped"])),
                    f"{held['features_in']:,}",
                    f"{held['features_kept']:,}",
                    escape(_reasons(held["features_dropped"])),
                )
            )
    heads = ("data set", "modality", "cells in", "kept", "dropped", "features in", "kept", "dropped")
    failed = ingest.get("failed") or []
    lost = "".join(f"<li>{escape(str(entry))}</li>" for entry in failed)
    return (
        f"<section><h2>Ingest</h2><p>{escape(said + (f': {reasons}' if reasons else ''))}.</p>"
        f"{_plain_table(heads, rows, words=(0, 1, 4, 7)) if rows else ''}"
        f"{f'<p>Files that could not be read:</p><ul>{lost}</ul>' if lost else ''}</section>"
    )


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{_words(reason)} {number_:,}" for reason, number_ in dropped.items() if number_)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _endpoint(endpoint: Mapping[str, Any]) -> str:
    if endpoint.get("reason"):
        return f"<section><h2>Endpoint</h2><p>Not asked: {escape(str(endpoint['reason']))}</p></section>"
    rows = [
        (escape(_words(str(key))), escape(_short(key, value)))
        for key, value in endpoint.items()
        if _plain(value)
    ]
    return f"<section><h2>Endpoint</h2>{_plain_table(('what', 'value'), rows)}</section>"


def _plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """A table of escaped cells; columns not among `words` are numbers."""
    kind = ["" if i in words else ' class="n"' for i in range(len(heads))]
    head = "".join(f"<th{kind[i]}>{escape(name)}</th>" for i, name in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{kind[i]}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _reading() -> str:
    return """<section class="reading"><h2>How to read this</h2>
<p>Every model is fitted on training cells and scored on held-out cells that neither it nor the
pretraining met: of other donors or batches where the data set has enough of them, as the line under each
heading says. Intervals are 95 % bootstrap intervals: donors or batches are drawn anew, then cells within
them; with a single held-out unit, or none, cells alone. A verdict compares the student with the best
baseline, in bold, on the same resamples: it <b>beats</b> or <b>loses</b> where the interval of the
difference leaves out zero, else it <b>ties</b>. Values are means over seeds, each with its own draw of nine
tenths of the training cells; ↓ marks metrics that are better when lower. What is compared without
refitting, as the student's own decoder, is one pretraining run and has one seed.</p>
<p>Recovery = (student − RNA-only model) / (teacher − RNA-only model), of the same width: the share of what
the other modalities add that the student keeps without them, whatever its sign.</p></section>"""
