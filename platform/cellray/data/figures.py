"""Histograms of the ingest page as SVG: cells before quality control as an outline, after it filled."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 320, 138
LEFT, RIGHT, TOP, BASE = 8.0, 312.0, 34.0, 116.0
LEAST = 1.5
"""Height of the lowest bar: one cell among a million is seen, and is what limits are about."""
ZERO = -0.3
"""Where the bin of cells without any begins on a logarithmic axis, in decades; that of one count at 0."""
REACH = 1.0
"""Decades, beside the cells, within which a limit makes the axis longer. Those further off are told only."""


@dataclass(frozen=True)
class Limit:
    """A limit on the cells that stay."""

    place: float
    """On the axis: decades or shares."""
    label: str
    lower: bool
    """Whether cells below it are dropped, not above."""
    fixed: bool
    """Whether it is the recipe's, not that of the group."""


def of_numbers(metric: str, group: Mapping[str, Any], edges: Sequence[float], where: str) -> str:
    """Cells of one group of `qc.judge` by `metric`, counts or features, on a logarithmic axis; "" if none.

    `edges` are the lower edges of the bins, the first that of cells without any. `where` says which
    data set it is, for the text that stands for the picture.
    """
    places = [_decades(edge) for edge in edges]
    places.append(places[-1] + 0.1)
    limits = []
    if own := group["limits"][metric]:
        low, high = own
        if low > 0:
            limits.append(Limit(_decades(low), f"{low:,}", lower=True, fixed=False))
        # The highest that stays is inside, so the line is drawn where the next begins.
        limits.append(Limit(_decades(high + 1), f"{high:,}", lower=False, fixed=False))
    if (least := group["limits"][f"min_{metric}"]) > 1:
        limits.append(Limit(_decades(least), f"min {least:,}", lower=True, fixed=True))
    before, after = group["before"][metric], group["after"][metric]
    span = _span(before, places, limits, least=0.5, reach=REACH)
    if span is None:
        return ""
    few = span[1] - span[0] < 2.2
    marks = [(_decades(base * 10**power), f"{_short(base * 10**power)}") for power in range(9)
             for base in ((1, 2, 5) if few else (1,))]  # fmt: skip
    marks.append((ZERO / 2, "0"))
    what = f"{metric} per cell, {where}"
    told = _told(what, group, metric, [*edges, math.inf], limits, lambda value: f"{value:,.0f}")
    return _svg(before, after, places, span, limits, marks, told)


def of_shares(group: Mapping[str, Any], edges: Sequence[float], where: str) -> str:
    """Cells of one group by their mitochondrial share; "" if all have less than a bin, and none a limit."""
    metric, places = "mito", [*edges, 1.0]
    limits = []
    if (own := group["limits"][metric]) is not None:
        limits.append(Limit(own, f"{100 * own:.3g} %", lower=False, fixed=False))
    if (most := group["limits"]["max_mito"]) < 1:
        limits.append(Limit(most, f"max {100 * most:.3g} %", lower=False, fixed=True))
    before, after = group["before"][metric], group["after"][metric]
    span = _span(before, places, limits, least=0.05, reach=1.0)
    if span is None or not (any(before[1:]) or limits):
        return ""
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if span[1] - span[0] <= 6 * step or step == 0.2)
    marks = [(number * step, f"{100 * number * step:.0f} %") for number in range(round(1 / step) + 1)]
    what = f"mitochondrial share, {where}"
    told = _told(what, group, metric, places, limits, lambda value: f"{100 * value:.0f} %")
    return _svg(before, after, places, span, limits, marks, told)


def _decades(value: float) -> float:
    return math.log10(value) if value >= 1 else ZERO


def _short(value: float) -> str:
    """A number on an axis."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def _span(
    cells: Sequence[int], places: Sequence[float], limits: Sequence[Limit], *, least: float, reach: float
) -> tuple[float, float] | None:
    """Both ends of the axis: all cells, limits not far off, `least` long at the least; None if no cells."""
    some = [number for number, count in enumerate(cells) if count]
    if not some:
        return None
    low, high = places[some[0]], places[some[-1] + 1]
    near = [limit.place for limit in limits if low - reach <= limit.place <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    return low, min(max(high, low + least), max(places[-1], high))


def _svg(
    before: Sequence[int],
    after: Sequence[int],
    places: Sequence[float],
    span: tuple[float, float],
    limits: Sequence[Limit],
    marks: Sequence[tuple[float, str]],
    told: str,
) -> str:
    def at(place: float) -> float:
        return LEFT + (RIGHT - LEFT) * (place - span[0]) / (span[1] - span[0])

    borders = [at(place) for place in places]
    most = max(before)
    parts = [f'<line class="axis" x1="{LEFT:g}" x2="{RIGHT:g}" y1="{BASE:g}" y2="{BASE:g}"/>']
    parts.append(f'<path class="after" d="{_steps(after, borders, most)}"/>')
    parts.append(f'<path class="before" d="{_steps(before, borders, most)}"/>')
    for place, label in marks:
        if span[0] <= place <= span[1] and (label != "0" or before[0]):
            x = at(place)
            anchor = "start" if x < LEFT + 4 else "end" if x > RIGHT - 8 else "middle"
            parts.append(f'<text x="{_px(x)}" y="{BASE + 15:g}" text-anchor="{anchor}">{label}</text>')
    parts += [_line(limit, at(limit.place)) for limit in limits if span[0] <= limit.place <= span[1]]
    text = escape(told)
    return (
        f'<svg class="hist" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text}">'
        f"<title>{text}</title>{''.join(parts)}</svg>"
    )


def _steps(cells: Sequence[int], borders: Sequence[float], most: int) -> str:
    """The path round the bars, from the first with cells to the last; "" if there is none."""
    some = [number for number, count in enumerate(cells) if count]
    if not some:
        return ""
    path = [f"M{_px(borders[some[0]])} {BASE:g}"]
    for number in range(some[0], some[-1] + 1):
        height = max((BASE - TOP) * cells[number] / most, LEAST) if cells[number] else 0.0
        path.append(f"V{_px(BASE - height)}H{_px(borders[number + 1])}")
    return "".join([*path, f"V{BASE:g}Z"])


def _line(limit: Limit, x: float) -> str:
    """A dashed line with its number, on that side of it where cells are dropped if there is room."""
    left = limit.lower if 64 < x < WIDTH - 64 else x > WIDTH / 2
    top = 11 if limit.fixed else 24
    anchor, shift = ("end", -4) if left else ("start", 4)
    kind = "limit fixed" if limit.fixed else "limit"
    return (
        f'<line class="{kind}" x1="{_px(x)}" x2="{_px(x)}" y1="{top - 8}" y2="{BASE:g}"/>'
        f'<text class="told" x="{_px(x + shift)}" y="{top}" text-anchor="{anchor}">{limit.label}</text>'
    )


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _told(
    what: str,
    group: Mapping[str, Any],
    metric: str,
    edges: Sequence[float],
    limits: Sequence[Limit],
    say: Callable[[float], str],
) -> str:
    """The picture in words."""
    before, after = group["before"][metric], group["after"][metric]
    found = f"{what}: {sum(before):,} cells before, {sum(after):,} after quality control"
    middle = _middle(before)
    found += f"; the middle cell before is between {say(edges[middle])} and {say(edges[middle + 1])}"
    if limits:
        words = [f"{'lowest' if limit.lower else 'highest'} {limit.label}" for limit in limits]
        return f"{found}; limits: {', '.join(words)}"
    return f"{found}; no limits"


def _middle(cells: Sequence[int]) -> int:
    """The bin of the cell in the middle."""
    half, seen = sum(cells) / 2, 0
    for number, count in enumerate(cells):
        seen += count
        if seen >= half and count:
            return number
    return len(cells) - 1
