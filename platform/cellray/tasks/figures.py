"""Pictures of the report: UMAP panels as PNG; loss curves and intervals as SVG in the page's colours."""

import importlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from types import ModuleType
from typing import Any

import numpy as np

from cellray.tasks.inputs import COMPONENTS, Scored, log_profiles, variable_genes

PANEL_CELLS = 2000
"""Most cells in a UMAP."""
COLOURS = (
    "#3b6fb6", "#e07b39", "#3f9b6c", "#c94f5d", "#8a6bbf", "#a9744f", "#d883b7", "#6f7d8c", "#b5a72c",
    "#35a5b8", "#1f3f77", "#f0b37e", "#8fcfae", "#f2a0a8", "#c3b1e1", "#5f8f1f", "#7c2f5a", "#9fc4ec",
    "#4b5b52",
)  # fmt: skip
OTHER = "#b9c0c8"
"""Colour of unknown, and of all groups after the largest."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Cells of one embedding in two dimensions, coloured by what is known of them."""

    embedding: str
    colour: str
    """What the colours mean."""
    png: bytes
    legend: tuple[tuple[str, str, int], ...]
    """Name, colour and number of cells of each group, largest first."""


def panels(scored: Scored, progress: Callable[[str], None], cells: int = PANEL_CELLS) -> list[Panel]:
    """UMAPs of the teacher's, the student's and the PCA embedding, of at most `cells` cells with RNA.

    Coloured by label, by donor (by batch where there are none), and by data set where there are
    several. The same cells and groups have the same colours in all. ValueError without the extra.
    """
    pyplot = _imported("matplotlib.pyplot")
    rows = np.flatnonzero(scored.present["rna"])
    if len(rows) > cells:
        rows = np.sort(np.random.default_rng(0).choice(rows, cells, replace=False))
    groups = _groups(scored, rows)
    order = np.random.default_rng(0).permutation(len(rows))
    found = []
    embeddings = {"Joint (teacher)": scored.embeddings["teacher"][rows]}
    embeddings |= {"Student, RNA alone": scored.embeddings["student"][rows]}
    embeddings |= {"PCA of RNA": principal(scored, rows)}
    for name, vectors in embeddings.items():
        progress(f"UMAP of {len(rows):,} cells: {name}")
        flat = umap(vectors)
        for colour, values in groups.items():
            legend = _legend(values)
            shade = {group: c for group, c, _ in legend}
            colours = np.array([shade.get(v, OTHER) for v in values])
            png = _scatter(pyplot, flat[order], colours[order])
            found.append(Panel(embedding=name, colour=colour, png=png, legend=legend))
    return sorted(found, key=lambda panel: list(groups).index(panel.colour))


def umap(vectors: np.ndarray) -> np.ndarray:
    """UMAP of `vectors` [cells, width] in two dimensions, the same every time."""
    with warnings.catch_warnings():
        # It warns on import that TensorFlow is not there; only its parametric form needs that.
        warnings.simplefilter("ignore", ImportWarning)
        module = _imported("umap")
    near = min(15, len(vectors) - 1)
    model = module.UMAP(n_neighbors=near, init="pca", n_epochs=200, random_state=0, n_jobs=1)
    return np.asarray(model.fit_transform(np.asarray(vectors, np.float32)))


def principal(scored: Scored, rows: np.ndarray) -> np.ndarray:
    """Principal components of log1p(CP10k) of the most variable genes, float32 [rows, components]."""
    from sklearn.decomposition import PCA

    log = log_profiles(scored.counts["rna"].tocsr()[rows], scored.totals["rna"][rows])
    dense = log[:, variable_genes(log)].toarray()
    width = min(COMPONENTS, min(dense.shape) - 1)
    return np.asarray(PCA(width, svd_solver="randomized", random_state=0).fit_transform(dense), np.float32)


def _groups(scored: Scored, rows: np.ndarray) -> dict[str, np.ndarray]:
    """What the panels are coloured by -> the group of each cell, "" where unknown."""
    cells = scored.cells.iloc[rows]
    found = {"label": cells["label"].to_numpy(str)}
    unit = "donor" if (cells["donor"] != "").any() else "batch"
    found[unit] = cells[unit].to_numpy(str)
    found["data set"] = cells["dataset"].to_numpy(str)
    return {name: values for name, values in found.items() if len(np.unique(values)) > 1}


def _legend(values: np.ndarray) -> tuple[tuple[str, str, int], ...]:
    """Groups with their colours, largest first; those without a colour of their own come together."""
    names, counts = np.unique(values[values != ""], return_counts=True)
    ranked = [(str(names[i]), int(counts[i])) for i in np.argsort(-counts, kind="stable")]
    own, rest = ranked[: len(COLOURS)], ranked[len(COLOURS) :]
    legend = [(name, colour, count) for (name, count), colour in zip(own, COLOURS, strict=False)]
    if rest:
        legend.append((f"{len(rest)} others", OTHER, sum(count for _, count in rest)))
    if unknown := int((values == "").sum()):
        legend.append(("unknown", OTHER, unknown))
    return tuple(legend)


def _scatter(pyplot: Any, flat: np.ndarray, colours: np.ndarray) -> bytes:
    """A square PNG of points without axes, on a transparent ground."""
    figure = pyplot.figure(figsize=(4, 4), dpi=160)
    try:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        size = float(np.clip(9000 / max(len(flat), 1), 2, 24))
        axes.scatter(flat[:, 0], flat[:, 1], c=colours, s=size, linewidths=0, alpha=0.8)
        sink = io.BytesIO()
        figure.savefig(sink, format="png", transparent=True, metadata={"Software": None})
        return sink.getvalue()
    finally:
        pyplot.close(figure)


def _imported(name: str) -> ModuleType:
    """matplotlib or umap, drawing to files alone. ValueError without the extra that brings them."""
    try:
        if name.startswith("matplotlib"):
            importlib.import_module("matplotlib").use("agg")
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != missing:
            raise
        raise ValueError(f"the report needs {missing}: pip install cellray[report]") from None


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Stage -> SVG of its loss over steps. `rows` hold `stage`, `step`, `loss` and the parts of the loss."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        stages.setdefault(str(row["stage"]), []).append(row)
    return {stage: _curve(sorted(own, key=lambda row: row["step"])) for stage, own in stages.items()}


def _curve(rows: Sequence[Mapping[str, Any]]) -> str:
    left, top, width, height = 44, 10, 340, 150
    steps = np.array([row["step"] for row in rows], float)
    losses = np.array([row["loss"] for row in rows], float)
    low, high = float(losses.min()), float(losses.max())
    high = high if high > low else low + 1
    x = left + width * (steps - steps[0]) / max(steps[-1] - steps[0], 1)
    y = top + height * (high - losses) / (high - low)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    marks = []
    for share in (0, 0.5, 1):
        level = top + height * (1 - share)
        marks.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{level}" y2="{level}"/>')
        text = f"{low + share * (high - low):.3g}"
        marks.append(f'<text x="{left - 6}" y="{level + 4}" text-anchor="end">{text}</text>')
    marks.append(f'<text x="{left}" y="{top + height + 16}">{steps[0]:,.0f}</text>')
    end = f'<text x="{left + width}" y="{top + height + 16}" text-anchor="end">{steps[-1]:,.0f} steps</text>'
    return (
        f'<svg class="curve" viewBox="0 0 {left + width + 8} {top + height + 22}" role="img" '
        f'aria-label="loss from {losses[0]:.3g} to {losses[-1]:.3g}">{"".join(marks)}{end}'
        f'<polyline points="{points}"/><circle cx="{x[-1]:.1f}" cy="{y[-1]:.1f}" r="3"/></svg>'
    )


def dot(value: float, low: float, high: float, span: tuple[float, float], kind: str, text: str) -> str:
    """SVG of a value with its interval on the scale `span`; `kind` is its style.

    A value off the scale is an arrow at the left edge.
    """
    width, pad = 180, 6

    def at(number: float) -> float:
        share = (number - span[0]) / max(span[1] - span[0], 1e-12)
        return pad + (width - 2 * pad) * min(max(share, 0), 1)

    begin = (
        f'<svg class="dot {kind}" viewBox="0 0 {width} 18" role="img" aria-label="{escape(text)}">'
        f'<line class="grid" x1="{pad}" x2="{width - pad}" y1="9" y2="9"/>'
    )
    if value < span[0]:
        return f'{begin}<path d="M{pad + 7} 4.5 L{pad - 1} 9 L{pad + 7} 13.5"/></svg>'
    return (
        f'{begin}<line class="range" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="9" y2="9"/>'
        f'<circle cx="{at(value):.1f}" cy="9" r="4"/></svg>'
    )
