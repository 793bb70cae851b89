"""python -m pipelines.curves RUN: the losses, rates and throughput of every stage, from RUN/metrics.jsonl.

The picture goes to RUN/curves.png. It can be drawn while the run goes on.
"""

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.command import exit_code

SHARES = {"mfu": "MFU", "packing": "packing", "data_wait_share": "data wait"}
WHOLE, GRID = "#20262d", "#e3e6ea"
"""Colours of what is most looked at, and of what is least."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code; the picture's place on the output."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.curves", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder or URL of a run")
    url = parser.parse_args(argv).run
    return exit_code(lambda: print(write(url)))


def write(url: str) -> str:
    """Draw RUN/curves.png; its path. ValueError where a run has no rows, or matplotlib is missing."""
    from cellray.data import storage
    from cellray.train.trackers import FILE, rows

    source = storage.join(storage.absolute(url), FILE)
    if not storage.exists(source):
        raise ValueError(f"there is no {source}: train first, with jsonl in track=…")
    found = rows(storage.read_bytes(source))
    if not found:
        raise ValueError(f"{source} has no rows yet")
    path = storage.join(storage.absolute(url), "curves.png")
    storage.write_bytes(path, drawn(found))
    return path


def drawn(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG: a column a stage, in the order they began; losses, rates and shares below each other."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ValueError(f"curves need {error.name}: pip install cellray[report]") from None
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)
    with pyplot.rc_context({"font.size": 8, "axes.edgecolor": "#9aa3ad", "axes.linewidth": 0.6}):
        figure, grid = pyplot.subplots(
            5,
            len(stages),
            figsize=(1.2 + 3.2 * len(stages), 11),
            dpi=110,
            squeeze=False,
            sharex="col",
            height_ratios=(2.2, 1, 1, 1, 1),
            layout="constrained",
        )
        try:
            for column, (name, own) in enumerate(stages.items()):
                _column(grid[:, column], name, sorted(own, key=lambda row: row["step"]))
            labels = ("loss", "learning rate", "gradient norm", "cells/s", "share")
            for axes, label in zip(grid[:, 0], labels, strict=True):
                axes.set_ylabel(label)
            figure.align_ylabels(grid[:, 0])
            sink = io.BytesIO()
            figure.savefig(sink, format="png", metadata={"Software": None})
            return sink.getvalue()
        finally:
            pyplot.close(figure)


def _column(axes: Any, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The panels of one stage."""
    from matplotlib.ticker import (
        EngFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        PercentFormatter,
        StrMethodFormatter,
    )

    from cellray.tasks.figures import COLOURS
    from cellray.train.progress import time_text

    loss, rate, norm, speed, shares = axes
    last = rows[-1]
    state = "" if last["step"] == last["steps"] else f" of {last['steps']:,}"
    loss.set_title(
        f"{name}\n{last['step']:,}{state} steps · {last['cells']:,} cells · {time_text(last['seconds'])}",
        fontsize=9,
        color=WHOLE,
    )
    parts = [key for key in last if key.startswith("loss/")]
    if len(parts) > 1:
        for key, colour in zip(parts, COLOURS, strict=False):
            _line(loss, rows, key, colour, key.removeprefix("loss/"))
    _line(loss, rows, "loss", WHOLE, "whole" if len(parts) > 1 else "loss", width=2.0)
    loss.legend(
        frameon=False, fontsize=7, labelspacing=0.25, handlelength=1.2, ncols=2 if len(parts) > 4 else 1
    )
    _line(rate, rows, "learning_rate", COLOURS[0])
    _line(norm, rows, "gradient_norm", COLOURS[3])
    norm.set_yscale("log")
    norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    norm.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    norm.yaxis.set_minor_formatter(NullFormatter())
    _line(speed, rows, "cells_per_second", COLOURS[2])
    rate.yaxis.set_major_formatter(StrMethodFormatter("{x:.1e}"))
    rate.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    speed.set_ylim(bottom=0)
    for (key, label), colour in zip(SHARES.items(), (COLOURS[4], COLOURS[8], COLOURS[1]), strict=True):
        _line(shares, rows, key, colour, f"{label} {_middle(rows, key):.0%}")
    shares.set_ylim(-0.03, 1.05)
    shares.yaxis.set_major_formatter(PercentFormatter(1))
    shares.legend(frameon=False, fontsize=7, labelspacing=0.2, handlelength=1.2, loc="center right")
    shares.set_xlabel("step")
    shares.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axis in axes:
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)


def _line(
    axes: Any, rows: Sequence[Mapping[str, Any]], key: str, colour: str, label: str = "", width: float = 1.2
) -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    marker = "o" if len(points) < 20 else ""
    axes.plot(steps, values, color=colour, label=label, linewidth=width, marker=marker, markersize=2.5)


def _middle(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """The median of what is known; 0 where nothing is."""
    from statistics import median

    return median([row[key] for row in rows if row.get(key) is not None] or [0.0])


if __name__ == "__main__":
    sys.exit(main())
