import numpy as np
import pytest

from cellray.data.atlas import FIELDS, File
from cellray.data.group import Group, Part
from cellray.data.harmony import Features
from cellray.data.modalities import ATAC, PROTEIN, RNA
from cellray.data.qc import DUPLICATE, EMPTY, FEW_FEATURES, KEPT, LABEL, OUT_COUNTS, QC, Metrics
from cellray.data.shuffle import order
from cellray.data.units import UNKNOWN
from cellray.data.verdicts import decide

NONE = Features(
    names=np.empty(0, str),
    symbols=np.empty(0, object),
    columns=np.empty(0, np.int32),
    mito=np.empty(0, bool),
    about={},
)


def part(modality, cells):
    file = File(dataset="d", url="f", given="f", where="w", modality=modality)
    return Part(file=file, cells=np.asarray(cells), features=NONE, stored=1, step=100)


def group(cells, parts, name="d"):
    about = {field: np.full(cells, "", object) for field in FIELDS}
    names = np.array([f"c{i}" for i in range(cells)], object)
    known = {"species": "", "species_from": "", "label_from": ""}
    return Group(name=name, cells=names, about=about, parts=tuple(parts), **known)


def metrics(counts, features=None, digest=None):
    counts = np.asarray(counts, np.int64)
    own = np.arange(1, len(counts) + 1) * 7919 if digest is None else digest
    return Metrics(
        counts=counts,
        features=np.asarray(counts if features is None else features, np.int32),
        mito=np.zeros(len(counts), np.int64),
        digest=np.asarray(own, np.uint64),
    )


def decided(groups, measured, out=None, qc=None, modalities=(RNA, ATAC, PROTEIN), there=None):
    parts = [(g, p) for g in groups for p in g.parts]
    out = out or {g.name: np.zeros(len(g.cells), bool) for g in groups}
    return decide(parts, measured, out, modalities, qc or QC(mads=0), there)


def test_an_empty_modality_is_dropped_alone_and_a_cell_without_any_whole():
    d = group(4, [part("rna", [0, 1, 2]), part("atac", [1, 2, 3])])
    found = decided([d], [metrics([9, 0, 0]), metrics([5, 5, 0])])
    assert [rows.tolist() for rows in found.rows] == [[KEPT, EMPTY, EMPTY], [KEPT, KEPT, EMPTY]]
    assert found.cells["d"].tolist() == [KEPT, KEPT, KEPT, EMPTY]


def test_too_few_features_are_judged_by_modality():
    d = group(2, [part("rna", [0, 1]), part("protein", [0, 1])])
    modalities = (RNA, PROTEIN.__class__(**(vars(PROTEIN) | {"min_features": 3})))
    found = decided([d], [metrics([9, 9]), metrics([9, 9], [2, 3])], modalities=modalities)
    assert [rows.tolist() for rows in found.rows] == [[KEPT, KEPT], [FEW_FEATURES, KEPT]]
    assert found.cells["d"].tolist() == [KEPT, KEPT]


def test_an_outlier_of_the_leading_modality_goes_whole_and_others_are_not_asked():
    rng = np.random.default_rng(0)
    depth = rng.integers(900, 1100, 200)
    depth[3] = 10
    other = rng.integers(900, 1100, 200)
    other[5] = 10
    d = group(200, [part("atac", np.arange(200)), part("rna", np.arange(200))])
    found = decided([d], [metrics(other), metrics(depth)], qc=QC())
    assert np.flatnonzero(found.cells["d"]).tolist() == [3]
    assert found.cells["d"][3] == OUT_COUNTS
    assert [int(rows[3]) for rows in found.rows] == [OUT_COUNTS, OUT_COUNTS]
    assert [entry["modality"] for entry in found.judged] == ["rna"]


def test_a_dropped_label_comes_before_all_else():
    d = group(2, [part("rna", [0, 1])])
    found = decided([d], [metrics([0, 5])], {"d": np.array([True, False])})
    assert found.rows[0].tolist() == [LABEL, KEPT]
    assert found.cells["d"].tolist() == [LABEL, KEPT]


@pytest.mark.parametrize(("keep", "reason"), [("drop", DUPLICATE), ("keep", KEPT)])
def test_a_cell_met_before_is_a_duplicate_in_this_and_in_an_earlier_edition(keep, reason):
    a, b = group(2, [part("rna", [0, 1])], "a"), group(2, [part("rna", [0, 1])], "b")
    measured = [metrics([8, 9], digest=[70, 71]), metrics([9, 5], digest=[71, 72])]
    there = (np.array([72], np.uint64), np.array([5]))
    qc = QC(mads=0, duplicates=keep)
    assert decided([a, b], measured, qc=qc).cells["b"].tolist() == [reason, KEPT]
    assert decided([a, b], measured, qc=qc, there=there).cells["b"].tolist() == [reason, reason]
    depth = (np.array([72], np.uint64), np.array([6]))
    assert decided([a, b], measured, qc=qc, there=depth).cells["b"].tolist() == [reason, KEPT]


def test_every_cell_that_stays_has_one_place_whatever_else_is_there():
    a, b = group(50, [part("rna", np.arange(50))], "a"), group(30, [part("rna", np.arange(30))], "b")
    counts = [np.where(np.arange(n) % 7, 5, 0) for n in (50, 30)]
    found = decided([a, b], [metrics(counts[0]), metrics(counts[1], digest=np.arange(900, 930))])
    table, places, bounds = order([a, b], found, 4)
    stay = [name for name in ("a", "b") for i in range(len(places[name])) if i % 7]
    assert len(table) == len(stay) == bounds[-1]
    ids = table["cell_id"].to_pylist()
    for name in places:
        for cell, place in enumerate(places[name]):
            assert (place == UNKNOWN) == (cell % 7 == 0)
            assert place == UNKNOWN or ids[place] == f"{name}:c{cell}"
    alone = order([b], decided([b], [metrics(counts[1], digest=np.arange(900, 930))]), 4)[0]
    assert alone["cell_id"].to_pylist() == [i for i in ids if i.startswith("b:")]
    assert table["digest"].to_pylist()[places["b"][1]] == 901
