import json
import math

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from cellray.data import compiled
from cellray.data import qc as module
from cellray.data.qc import (
    DUPLICATE,
    EMPTY,
    FEW_COUNTS,
    FEW_FEATURES,
    KEPT,
    LABEL,
    MITOCHONDRIAL,
    OUT_COUNTS,
    OUT_FEATURES,
    OUT_MITOCHONDRIAL,
    QC,
    REASONS,
    Metrics,
    duplicates,
    judge,
    name_hashes,
)

steady = settings(max_examples=100, deadline=None, derandomize=True)
GENES = np.array([f"g{number}" for number in range(300)])
MITO = np.arange(300) < 10
MASK = (1 << 64) - 1


def counts(cells=60, features=300, depth=1.0, seed=0):
    return sp.csr_matrix(np.random.default_rng(seed).poisson(depth, (cells, features)).astype(np.int64))


def population(cells=400, seed=0):
    """Clean metrics: depth within a factor of about two, 3 to 7 % mitochondrial, all digests apart."""
    random = np.random.default_rng(seed)
    depth = np.exp(np.clip(random.normal(0, 0.3, cells), -0.8, 0.8)) * 5000
    return {
        "counts": depth.astype(np.int64),
        "features": (depth**0.8 * random.uniform(0.95, 1.05, cells)).astype(np.int32),
        "mito": (depth * random.uniform(0.03, 0.07, cells)).astype(np.int64),
        "digest": random.permutation(cells).astype(np.uint64) + np.uint64(1),
    }


def measure(counts, hashes, mito):
    """Metrics of the rows of a sparse matrix, as ingest takes them."""
    return compiled.measured(
        counts.indptr.astype(np.int64),
        counts.indices,
        counts.data,
        np.arange(len(hashes), dtype=np.int32),
        hashes,
        mito,
    )[3]


def digests(indptr, indices, data, hashes):
    counts = sp.csr_matrix((data, indices, indptr), (len(indptr) - 1, len(hashes)))
    return measure(counts, hashes, np.zeros(len(hashes), bool)).digest


def verdict(metrics, qc=None, groups=None, out=None, **more):
    size = len(metrics["counts"])
    groups = np.zeros(size, int) if groups is None else groups
    names = [f"group {number}" for number in range(groups.max() + 1)]
    out = np.zeros(size, bool) if out is None else out
    return judge(Metrics(**metrics), groups, names, out, qc or QC(), **more)


def slow_digest(names, values):
    """One row's hash in Python's integers: the published finaliser over hash + count x golden ratio."""
    total = 0
    for feature, value in zip(name_hashes(names).tolist(), values, strict=True):
        state = (feature + value * 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        total = (total + (state ^ (state >> 31))) & MASK
    return total


def slow_nats(values):
    return sum(value - value * math.log(value) + math.lgamma(value + 1) for value in values)


def test_digests_equal_a_loop_over_the_counts():
    whole = sp.vstack(
        [counts(), sp.csr_matrix((2, 300), dtype=np.int64), counts(9, depth=0.1, seed=1)]
    ).tocsr()
    whole.resize(72, 300)  # empty rows at the end too
    found = digests(whole.indptr, whole.indices, whole.data, name_hashes(GENES))
    compared = 0
    for row, digest in enumerate(found.tolist()):
        cell = whole[row]
        if slow_nats(cell.data) < module.TELLING:
            assert digest == 0
        else:
            assert digest == slow_digest(GENES[cell.indices], cell.data.tolist())
            compared += 1
    assert 60 <= compared < 69


def test_a_cell_has_the_same_digest_in_a_file_of_other_column_order():
    whole = counts(depth=0.5)
    order = np.random.default_rng(1).permutation(300)
    moved = whole[:, order]
    first = digests(whole.indptr, whole.indices, whole.data, name_hashes(GENES))
    again = digests(moved.indptr, moved.indices, moved.data, name_hashes(GENES[order]))
    np.testing.assert_array_equal(first, again)
    assert len(set(first.tolist())) == 60


def test_the_digest_is_the_same_for_every_type_of_number():
    whole = counts()
    hashes = name_hashes(GENES)
    expected = digests(whole.indptr, whole.indices, whole.data, hashes)
    for kind in (np.uint8, np.uint32):
        np.testing.assert_array_equal(
            digests(whole.indptr, whole.indices.astype(np.int64), whole.data.astype(kind), hashes), expected
        )
    np.testing.assert_array_equal(name_hashes(GENES), hashes)


@steady
@given(
    row=st.lists(st.integers(1, 5), min_size=45, max_size=60),
    at=st.integers(0, 44),
    other=st.integers(0, 44),
)
def test_one_count_more_or_two_counts_swapped_change_the_digest(row, at, other):
    hashes = name_hashes(GENES)

    def digest(values):
        return int(digests(np.array([0, len(values)]), np.arange(len(values)), np.array(values), hashes)[0])

    more = [*row]
    more[at] += 1
    assert digest(more) != digest(row)
    swapped = [*row]
    swapped[at], swapped[other] = row[other], row[at]
    assert (digest(swapped) == digest(row)) == (swapped == row)


def test_cells_that_say_too_little_are_not_compared():
    hashes = name_hashes(GENES)
    shallow, deep = np.ones(39, np.int64), np.ones(40, np.int64)
    few, panel = np.full(14, 5), np.full(14, 500)
    for values, told in ((shallow, False), (deep, True), (few, False), (panel, True)):
        found = digests(np.array([0, len(values)]), np.arange(len(values)), values, hashes)
        assert bool(found[0]) == told
        assert (slow_nats(values.tolist()) >= module.TELLING - 1e-6) == told


def test_shallow_cells_of_one_composition_are_no_duplicates_by_chance():
    random = np.random.default_rng(0)
    share = random.dirichlet(np.full(20, 0.5))
    cells = sp.csr_matrix(np.concatenate([random.multinomial(depth, share, 4000) for depth in (3, 8, 30)]))
    assert len(np.unique(cells.toarray(), axis=0)) < 10_000
    found = measure(cells, name_hashes(GENES[:20]), np.zeros(20, bool))
    assert not duplicates(found.digest, found.counts, found.features).any()


def test_metrics_equal_those_of_the_dense_matrix_in_pieces_too():
    whole = sp.vstack([counts(), sp.csr_matrix((1, 300), dtype=np.int64)]).tocsr()
    hashes = name_hashes(GENES)
    found = measure(whole, hashes, MITO)
    dense = whole.toarray()
    np.testing.assert_array_equal(found.counts, dense.sum(1))
    np.testing.assert_array_equal(found.features, (dense > 0).sum(1))
    np.testing.assert_array_equal(found.mito, dense[:, MITO].sum(1))
    assert [found.counts.dtype, found.features.dtype, found.mito.dtype, found.digest.dtype] == [
        *(np.int64, np.int32, np.int64, np.uint64)
    ]
    parts = Metrics.joined(measure(whole[at : at + 7], hashes, MITO) for at in range(0, 61, 7))
    assert len(parts) == 61
    for name in ("counts", "features", "mito", "digest"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(found, name))


@steady
@given(
    cells=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 2), st.integers(1, 2)), max_size=30),
    seed=st.none() | st.integers(0, 99),
)
def test_duplicates_are_all_but_the_first_of_those_that_agree_in_everything(cells, seed):
    order = np.arange(len(cells)) if seed is None else np.random.default_rng(seed).permutation(len(cells))
    digest, depth, features = np.array(cells, np.int64).reshape(-1, 3).T
    found = duplicates(digest.astype(np.uint64), depth, features, None if seed is None else order)
    seen, expected = set(), np.zeros(len(cells), bool)
    for at in np.argsort(order):
        expected[at] = cells[at][0] != 0 and cells[at] in seen
        seen.add(cells[at])
    np.testing.assert_array_equal(found, expected)


def slow_reasons(metrics, groups, out, qc, min_features):
    """The rule, cell by cell."""

    def fixed(at):
        depth = metrics["counts"][at]
        if out[at]:
            return LABEL
        if depth == 0:
            return EMPTY
        if metrics["features"][at] < min_features:
            return FEW_FEATURES
        if depth < qc.min_counts:
            return FEW_COUNTS
        return MITOCHONDRIAL if metrics["mito"][at] / depth > qc.max_mito else KEPT

    reasons = [fixed(at) for at in range(len(out))]
    values = {
        OUT_COUNTS: [math.log1p(value) for value in metrics["counts"]],
        OUT_FEATURES: [math.log1p(value) for value in metrics["features"]],
        OUT_MITOCHONDRIAL: [m / max(d, 1) for m, d in zip(metrics["mito"], metrics["counts"], strict=True)],
    }
    passed = list(reasons)
    for at, first in enumerate(passed):
        own = [i for i, reason in enumerate(passed) if reason == KEPT and groups[i] == groups[at]]
        if first != KEPT or len(own) < qc.min_group or not qc.mads:
            continue
        for number, of_all in values.items():
            mine = [of_all[i] for i in own]
            spread = median_abs_deviation(mine)
            away = of_all[at] - np.median(mine)
            beyond = away if number == OUT_MITOCHONDRIAL else abs(away)
            if reasons[at] == KEPT and spread > 0 and beyond > qc.mads * spread:
                reasons[at] = number
    seen = set()
    for at, reason in enumerate(reasons):
        key = (metrics["digest"][at], metrics["counts"][at], metrics["features"][at])
        if reason == KEPT and qc.duplicates == "drop" and key[0]:
            reasons[at] = DUPLICATE if key in seen else KEPT
            seen.add(key)
    return reasons


def messy(seed, cells=240):
    """Metrics with all that can be wrong, in three groups, one of them small."""
    random = np.random.default_rng(seed)
    depth = np.exp(random.normal(6, 0.5, cells)) * random.choice(
        [1, 0, 0.05, 12], cells, p=[0.9, 0.03, 0.03, 0.04]
    )
    depth = depth.astype(np.int64)
    rich = depth**0.8 * random.choice([1, 0.3], cells, p=[0.97, 0.03])
    share = random.choice([1, 12], cells, p=[0.95, 0.05]) * random.uniform(0.02, 0.07, cells)
    metrics = {
        "counts": depth,
        "features": np.minimum(depth, rich).astype(np.int32),
        "mito": (depth * share).astype(np.int64),
        "digest": random.integers(1, 1 << 62, cells).astype(np.uint64),
    }
    copies = random.choice(cells, 20, replace=False)
    for values in metrics.values():
        values[copies[:10]] = values[copies[10:]]
    groups = random.choice(3, cells, p=[0.5, 0.38, 0.12])
    return metrics, groups, random.random(cells) < 0.05


SETTINGS = [
    (QC(), 1),
    (QC(min_counts=80, max_mito=0.3), 30),
    (QC(mads=3.0, min_group=20, duplicates="keep"), 10),
    (QC(mads=0.0, max_mito=0.05), 1),
]


@pytest.mark.parametrize(("qc", "least"), SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_every_cell_has_the_reason_that_the_rule_gives_it(qc, least, seed):
    metrics, groups, out = messy(seed)
    found = verdict(metrics, qc, groups, out, min_features=least)
    assert found.reason.dtype == np.uint8
    assert [REASONS[r] for r in found.reason] == [
        REASONS[r] for r in slow_reasons(metrics, groups, out, qc, least)
    ]


@pytest.mark.parametrize(("qc", "least"), SETTINGS)
def test_cells_in_are_cells_out_plus_the_reported_drops(qc, least):
    metrics, groups, out = messy(7)
    found = verdict(metrics, qc, groups, out, min_features=least)
    for number, about in enumerate(found.groups):
        own = groups == number
        assert sum(about["reasons"].values()) == about["cells"] == own.sum()
        assert about["reasons"].get("kept", 0) == (found.reason[own] == KEPT).sum()
        empty = (metrics["counts"][own & ~out] == 0).sum()
        for when, cells in (("before", (own & ~out).sum()), ("after", about["reasons"]["kept"])):
            assert sum(about[when]["counts"]) == sum(about[when]["features"]) == cells
            assert sum(about[when]["mito"]) == cells - (empty if when == "before" else 0)
    assert json.loads(json.dumps([found.groups, found.edges])) == [found.groups, found.edges]


def test_histograms_have_the_bins_that_are_told():
    metrics, groups, out = messy(2)
    found = verdict(metrics, None, groups, out)
    about = found.groups[0]
    own = (groups == 0) & ~out
    for name in ("counts", "features"):
        expected, _ = np.histogram(metrics[name][own], [*found.edges[name], np.inf])
        assert about["before"][name] == expected.tolist()
    some = own & (metrics["counts"] > 0)
    expected, _ = np.histogram(metrics["mito"][some] / metrics["counts"][some], [*found.edges["mito"], 1.0])
    assert about["before"]["mito"] == expected.tolist()


def test_the_order_of_the_cells_changes_no_reason():
    metrics, groups, out = messy(4)
    straight = verdict(metrics, None, groups, out)
    for seed in range(3):
        at = np.random.default_rng(seed).permutation(len(out))
        mixed = verdict({k: v[at] for k, v in metrics.items()}, None, groups[at], out[at], order=at)
        np.testing.assert_array_equal(mixed.reason, straight.reason[at])
        assert mixed.groups == straight.groups


def test_what_is_planted_is_found_and_nothing_else():
    metrics = population()
    planted = {
        5: (EMPTY, {"counts": 0, "features": 0, "mito": 0, "digest": 0}),
        17: (OUT_COUNTS, {"counts": 200_000}),
        44: (OUT_COUNTS, {"counts": 300, "features": 280, "mito": 12}),
        80: (OUT_FEATURES, {"features": 90}),
        120: (OUT_MITOCHONDRIAL, {"mito": int(metrics["counts"][120] * 0.4)}),
        200: (DUPLICATE, {name: metrics[name][100] for name in metrics}),
        201: (DUPLICATE, {name: metrics[name][100] for name in metrics}),
        300: (FEW_FEATURES, {"features": 3}),
    }
    expected = np.zeros(400, np.uint8)
    for at, (reason, values) in planted.items():
        expected[at] = reason
        for name, value in values.items():
            metrics[name][at] = value
    found = verdict(metrics, min_features=10)
    assert {at: REASONS[found.reason[at]] for at in np.flatnonzero(found.reason)} == {
        at: REASONS[expected[at]] for at in np.flatnonzero(expected)
    }


def test_a_clean_population_loses_nothing():
    assert not verdict(population(5000)).reason.any()


def test_a_normal_population_loses_what_the_rule_says():
    """Five plain deviations are 3.37 standard deviations: 0.075 % of a normal distribution lie beyond."""
    random = np.random.default_rng(0)
    metrics = population(100_000)
    metrics["counts"] = np.exp(random.normal(9, 0.4, 100_000)).astype(np.int64)
    metrics["features"][:] = 2000
    metrics["mito"][:] = 0
    found = verdict(metrics)
    assert set(np.unique(found.reason)) == {KEPT, OUT_COUNTS}
    assert 40 < (found.reason == OUT_COUNTS).sum() < 110


def test_each_group_has_limits_of_its_own():
    shallow, deep = population(200, seed=1), population(200, seed=2)
    deep["counts"] *= 30
    deep["mito"] *= 30
    deep["digest"] += np.uint64(1000)
    both = {name: np.concatenate([shallow[name], deep[name]]) for name in shallow}
    groups = np.repeat([0, 1], 200)
    found = verdict(both, None, groups)
    assert not found.reason.any()
    assert found.groups[0]["limits"]["counts"][1] < found.groups[1]["limits"]["counts"][0]


def test_limits_are_the_last_numbers_inside():
    metrics, groups, _ = messy(5)
    found = verdict(metrics, None, groups)
    low, high = found.groups[0]["limits"]["counts"]
    own = (groups == 0) & (metrics["counts"] > 0)
    logs = np.log1p(metrics["counts"][own])
    middle, reach = np.median(logs), 5 * median_abs_deviation(logs)
    assert abs(math.log1p(low) - middle) <= reach < abs(math.log1p(low - 1) - middle)
    assert math.log1p(high) - middle <= reach < math.log1p(high + 1) - middle


def test_a_metric_without_spread_and_a_small_group_drop_no_outliers():
    same = population(100)
    same["counts"][:], same["features"][:], same["mito"][:] = 1000, 500, 0
    same["counts"][7], same["features"][8], same["mito"][9] = 10**7, 3, 900
    found = verdict(same)
    assert not found.reason.any()
    assert found.groups[0]["limits"] == {
        **{"min_features": 1, "min_counts": 1, "max_mito": 1.0},
        **{"counts": None, "features": None, "mito": None, "judged_on": 100},
    }
    small = population(49)
    small["counts"][7] = 10**7
    assert not verdict(small).reason.any()
    assert verdict(small, QC(min_group=49)).reason[7] == OUT_COUNTS


def test_the_first_cell_in_the_atlas_stays_whatever_its_data_set():
    metrics = population(300)
    for values in metrics.values():
        values[250] = values[10]
        values[260] = values[10]
    groups = np.repeat([0, 1, 2], 100)
    assert np.flatnonzero(verdict(metrics, None, groups).reason).tolist() == [250, 260]
    backwards = verdict(metrics, None, groups, order=np.arange(300)[::-1])
    assert np.flatnonzero(backwards.reason).tolist() == [10, 250]
    assert not verdict(metrics, QC(duplicates="keep"), groups).reason.any()


def test_a_cell_stays_when_the_earlier_one_like_it_is_dropped():
    metrics = population(300)
    for values in metrics.values():
        values[250] = values[10]
    out = np.arange(300) == 10
    found = verdict(metrics, out=out)
    assert found.reason[10] == LABEL
    assert found.reason[250] == KEPT


def test_cells_that_are_held_already_are_duplicates_and_reported_as_such():
    metrics = population(300)
    metrics["counts"][20] = 10**7
    held = np.isin(np.arange(300), [10, 20])
    found = verdict(metrics, held=held)
    assert [REASONS[reason] for reason in found.reason[[10, 20]]] == ["duplicate", "outlier_counts"]
    assert found.groups[0]["reasons"] == {"kept": 298, "outlier_counts": 1, "duplicate": 1}
    assert sum(found.groups[0]["after"]["counts"]) == 298
    assert verdict(metrics, QC(duplicates="keep"), held=held).reason[10] == KEPT


def test_a_share_right_at_the_limit_stays():
    metrics = population(101)
    metrics["counts"][:] = 100
    metrics["mito"][:] = np.arange(101)
    for limit in (0.07, 0.29, 0.57):
        found = verdict(metrics, QC(max_mito=limit, mads=0.0))
        np.testing.assert_array_equal(found.reason == MITOCHONDRIAL, np.arange(101) > round(limit * 100))


def test_cells_that_could_not_be_compared_are_counted():
    metrics = population(100)
    metrics["digest"][:30] = 0
    found = verdict(metrics)
    assert found.groups[0]["uncompared"] == 30
    assert not found.reason.any()


def test_a_group_without_cells_is_reported_as_such():
    found = judge(Metrics(**population(60)), np.ones(60, int), ["none", "all"], np.zeros(60, bool), QC())
    assert [about["cells"] for about in found.groups] == [0, 60]
    assert found.groups[0]["reasons"] == {}


@pytest.mark.parametrize(
    "given",
    [
        {"min_counts": 0},
        {"max_mito": 5.0},
        {"max_mito": -0.1},
        {"mads": 0.5},
        {"mads": -1.0},
        {"mads": float("nan")},
        {"mads": float("inf")},
        {"min_group": 1},
        {"duplicates": "yes"},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        QC(**given)
