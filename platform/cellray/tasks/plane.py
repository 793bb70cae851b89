"""The kinds of student in the report: a table, and where there are several, fidelity against cost."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from cellray.tasks.report import number

COSINE = "cosine to the teacher"


def section(student: Mapping[str, Any]) -> str:
    """The section of a page, as HTML; "" for a report that does not compare kinds.

    `student` is that part of the report: `kinds` as `students.compare` gives them, `kind` and `why`.
    """
    kinds = student.get("kinds") or []
    if not kinds:
        return ""
    names = list(dict.fromkeys(name for kind in kinds for name in scores(kind)))
    drawn = "".join(
        f"<figure>{plane(kinds, name)}<figcaption>{escape(name)}</figcaption></figure>"
        for name in names
        if len(_able(kinds, name)) > 1
    )
    heads = "".join(
        f'<th class="n">{escape(name)}</th>' for name in ("cells per CPU-second", "parameters", *names)
    )
    rows = "".join(_row(kind, names, kind["kind"] == student.get("kind")) for kind in kinds)
    said = f"This is the report of the {student.get('kind')}. {student.get('why', '')}"
    return (
        f"<section><h2>Kinds of student</h2><p>{escape(said)}</p>"
        f"{f'<div class=curves>{drawn}</div>' if drawn else ''}"
        f'<div class="scroll"><table><thead><tr><th>kind</th>{heads}</tr></thead><tbody>{rows}</tbody>'
        "</table></div></section>"
    )


def _row(kind: Mapping[str, Any], names: Sequence[str], taken: bool) -> str:
    rate, found = kind["cells_per_cpu_second"], scores(kind)
    cells = [
        "-" if rate is None else f"{rate:,.0f}",
        f"{kind['parameters']:,}",
        *(number(found.get(n)) for n in names),
    ]
    return (
        f"<tr{' class=ours' if taken else ''}><th>{escape(kind['kind'])}</th>"
        + "".join(f'<td class="n">{cell}</td>' for cell in cells)
        + "</tr>"
    )


def scores(kind: Mapping[str, Any]) -> dict[str, float]:
    """All scores of a kind by name, the cosine first."""
    first = {} if kind["cosine"] is None else {COSINE: kind["cosine"]}
    return first | dict(kind["probes"])


def _able(kinds: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """The kinds that have this score and a cost."""
    return [kind for kind in kinds if name in scores(kind) and kind["cells_per_cpu_second"]]


def plane(kinds: Sequence[Mapping[str, Any]], name: str) -> str:
    """SVG of a score over cells per CPU-second, on a logarithmic scale: the better and the cheaper,
    the further up and to the right."""
    left, top, width, height = 44, 14, 340, 150
    able = _able(kinds, name)
    rates = np.log10([k["cells_per_cpu_second"] for k in able])
    values = np.array([scores(k)[name] for k in able])
    first, last = np.floor(rates.min() - 0.1), np.ceil(rates.max() + 0.1)
    spread = max(float(np.ptp(values)), 0.02)
    low, high = float(values.min()) - 0.3 * spread, float(values.max()) + 0.3 * spread
    marks = []
    for share in (0, 0.5, 1):
        level = top + height * (1 - share)
        marks.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{level}" y2="{level}"/>')
        text = number(low + share * (high - low))
        marks.append(f'<text x="{left - 6}" y="{level + 4}" text-anchor="end">{text}</text>')
    for power in range(int(first), int(last) + 1):
        x = left + width * (power - first) / (last - first)
        marks.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + height}"/>')
        marks.append(f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{10**power:,}</text>')
    for kind, rate, value in zip(able, rates, values, strict=True):
        x, y = left + width * (rate - first) / (last - first), top + height * (high - value) / (high - low)
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        end = "end" if x > left + width / 2 else "start"
        beside = x - 8 if end == "end" else x + 8
        marks.append(
            f'<text x="{beside:.1f}" y="{y - 6:.1f}" text-anchor="{end}">{escape(kind["kind"])}</text>'
        )
    caption = (
        f'<text x="{left + width}" y="{top + height + 32}" text-anchor="end">cells per CPU-second</text>'
    )
    return (
        f'<svg class="curve" viewBox="0 0 {left + width + 24} {top + height + 38}" role="img" '
        f'aria-label="{escape(name)} over cells per CPU-second">{"".join(marks)}{caption}</svg>'
    )
