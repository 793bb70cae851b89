import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data import figures
from cellray.data.qc import COUNT_EDGES, QC, SHARE_BINS, Metrics, judge

EDGES = [0, *COUNT_EDGES.tolist()]
SHARES = [number / SHARE_BINS for number in range(SHARE_BINS)]


def bars(svg, kind):
    """Left, right and height of each bar, from the path round them."""
    (path,) = re.findall(rf'<path class="{kind}" d="([^"]*)"', svg)
    steps = re.findall(r"([MVHZ])(-?[\d.]*)(?: (-?[\d.]+))?", path)
    x, base, found, y = float(steps[0][1]), float(steps[0][2]), [], 0.0
    for letter, value, _ in steps[1:-2]:
        if letter == "V":
            y = float(value)
        else:
            found.append((x, float(value), base - y))
            x = float(value)
    assert steps[-2][:2] == ("V", f"{base:g}")
    return found


def lines(svg):
    """Place and label of each limit that is drawn."""
    drawn = re.findall(
        r'<line class="limit[^"]*" x1="([\d.]+)" x2="\1"[^>]*/><text class="told"[^>]*>([^<]*)<', svg
    )
    return {label: float(x) for x, label in drawn}


def group(cells, kept=None, **limits):
    """A group as `judge` has it, with histograms as given: bin -> cells."""
    histograms = {}
    for end, held in (("before", cells), ("after", kept or cells)):
        numbers = [held.get(number, 0) for number in range(len(EDGES))]
        shares = [held.get(number, 0) for number in range(SHARE_BINS)]
        histograms[end] = {"counts": numbers, "features": numbers, "mito": shares}
    fixed = {"min_features": 1, "min_counts": 1, "max_mito": 1.0, "judged_on": sum(cells.values())}
    none = {"counts": None, "features": None, "mito": None}
    return {"group": "g", "cells": sum(cells.values()), "limits": fixed | none | limits} | histograms


def test_the_text_names_the_bin_of_the_middle_cell():
    svg = figures.of_numbers("counts", group({10: 3, 30: 4, 31: 2}), EDGES, "x")
    assert f"between {EDGES[30]:,} and {EDGES[31]:,}" in svg


cells = st.dictionaries(st.integers(0, len(EDGES) - 1), st.integers(1, 10**6), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cells, st.integers(1, 100))
def test_bars_are_as_high_as_their_numbers_and_stand_at_their_edges(before, part):
    after = {number: count // part for number, count in before.items()}
    own = group(before, after)
    svg = figures.of_numbers("counts", own, EDGES, "x")
    tallest = max(before.values())
    for kind, held in (("before", before), ("after", after)):
        some = [number for number, count in held.items() if count]
        drawn = bars(svg, kind) if some else []
        assert len(drawn) == (max(some) - min(some) + 1 if some else 0)
        for number, (left, right, height) in enumerate(drawn, min(some, default=0)):
            whole = (figures.BASE - figures.TOP) * held.get(number, 0) / tallest
            wanted = max(whole, figures.LEAST) if held.get(number) else 0
            assert height == pytest.approx(wanted, abs=0.051)
            assert figures.LEFT - 0.06 <= left < right <= figures.RIGHT + 0.06


def place(value, marks):
    """Where `value` is on a logarithmic axis, from two of its numbers and their places."""
    (one, at_one), (two, at_two) = marks
    share = (math.log10(value) - math.log10(one)) / (math.log10(two) - math.log10(one))
    return at_one + share * (at_two - at_one)


def test_limits_of_counts_stand_where_the_axis_says():
    svg = figures.of_numbers("counts", group({20: 5, 40: 9}, counts=[150, 4321], min_counts=500), EDGES, "x")
    first = bars(svg, "before")
    marks = [(EDGES[20], first[0][0]), (EDGES[41], first[-1][1])]
    found = lines(svg)
    assert set(found) == {"150", "4,321", "min 500"}
    assert found["150"] == pytest.approx(place(150, marks), abs=0.2)
    assert found["4,321"] == pytest.approx(place(4322, marks), abs=0.2)
    assert found["min 500"] == pytest.approx(place(500, marks), abs=0.2)


def test_cells_within_the_limits_are_drawn_between_their_lines():
    counts = np.random.default_rng(0).lognormal(7, 0.5, 3000).astype(np.int64)
    counts[:2] = 900_000, 3
    none = np.zeros(3000, np.int64)
    metrics = Metrics(counts=counts, features=counts, mito=none, digest=none.astype(np.uint64))
    found = judge(metrics, none, ["one"], none > 0, QC())
    own = found.groups[0]
    svg = figures.of_numbers("counts", own, found.edges["counts"], "x")
    low, high = (lines(svg)[f"{limit:,}"] for limit in own["limits"]["counts"])
    width = max(right - left for left, right, _ in bars(svg, "after"))
    kept = bars(svg, "after")
    assert low - width < kept[0][0]
    assert kept[-1][1] < high + width
    assert len(bars(svg, "before")) > len(kept)


def test_limits_of_the_mitochondrial_share_stand_where_the_axis_says():
    svg = figures.of_shares(group({2: 5, 39: 9}, mito=0.317, max_mito=0.2), SHARES, "x")
    drawn = bars(svg, "before")
    marks = [(0.02, drawn[0][0]), (0.4, drawn[-1][1])]
    scale = (marks[1][1] - marks[0][1]) / 0.38
    found = lines(svg)
    assert set(found) == {"31.7 %", "max 20 %"}
    for label, share in (("31.7 %", 0.317), ("max 20 %", 0.2)):
        assert found[label] == pytest.approx(marks[0][1] + (share - 0.02) * scale, abs=0.2)


def test_a_limit_far_from_all_cells_is_told_but_does_not_squeeze_them():
    svg = figures.of_numbers("features", group({30: 5, 31: 9}, features=[0, 10**18]), EDGES, "x")
    assert lines(svg) == {}
    assert f"highest {10**18:,}" in svg
    assert "lowest" not in svg


def test_nothing_is_drawn_of_no_cells_and_of_shares_that_are_all_none():
    assert figures.of_numbers("counts", group({}), EDGES, "x") == ""
    assert figures.of_shares(group({}), SHARES, "x") == ""
    assert figures.of_shares(group({0: 9}), SHARES, "x") == ""
    assert lines(figures.of_shares(group({0: 9}, max_mito=0.04), SHARES, "x")).keys() == {"max 4 %"}
