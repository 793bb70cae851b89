import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data.atlas import FIELDS, File
from cellray.data.group import Group, Part
from cellray.data.harmony import Features
from cellray.data.modalities import ATAC, PROTEIN, RNA
from cellray.data.qc import DUPLICATE, EMPTY, FEW_FEATURES, KEPT, LABEL, OUT_COUNTS, QC, Metrics
from cellray.data.texts import Texts
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


def group(cells, parts, name="d", **fields):
    about = {field: Texts.of(fields[field]) if field in fields else Texts.full(cells, "") for field in FIELDS}
    names = pa.array([f"c{i}" for i in range(cells)], pa.large_string())
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


def test_cells_are_judged_by_data_set_and_assay_in_the_order_in_which_they_come():
    rng = np.random.default_rng(3)
    groups, expected = [], []
    for name in "ba":
        assays = rng.choice(["v3", "v2", "", "cel"], 40)
        parts = [part("rna", np.arange(10, 40)), part("rna", np.arange(10))]
        groups.append(group(40, parts, name, assay=assays))
        expected += [", ".join(filter(None, (name, assay))) for assay in [*assays[10:], *assays[:10]]]
    found = decided(groups, [metrics(np.full(len(p.cells), 9)) for g in groups for p in g.parts])
    (judged,) = found.judged
    assert [entry["group"] for entry in judged["groups"]] == list(dict.fromkeys(expected))
    for entry in judged["groups"]:
        assert entry["cells"] == expected.count(entry["group"])
        assert ", ".join(filter(None, (entry["dataset"], entry["assay"]))) == entry["group"]


CELLS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2), st.integers(1, 2)), max_size=9)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(CELLS.filter(bool), min_size=1, max_size=3), CELLS)
def test_duplicates_are_those_that_cells_met_one_by_one_would_be(sets, earlier):
    groups = [group(len(own), [part("rna", np.arange(len(own)))], f"d{i}") for i, own in enumerate(sets)]
    measured = []
    for own in sets:
        digest, counts, features = np.array(own).T
        measured.append(metrics(counts, features, digest))
    known = np.array(earlier, np.int64).reshape(-1, 3).T
    found = decided(groups, measured, there=(known[0].astype(np.uint64), known[1]))
    there = {(digest, depth) for digest, depth, _ in earlier}
    seen = set()
    for i, own in enumerate(sets):
        expected = []
        for cell in own:
            again = cell[0] != 0 and (cell in seen or cell[:2] in there)
            expected.append(DUPLICATE if again else KEPT)
            seen.add(cell)
        assert found.cells[f"d{i}"].tolist() == expected
    entries = found.judged[0]["groups"]
    assert [entry["reasons"].get("duplicate", 0) for entry in entries] == [
        int((found.cells[g.name] == DUPLICATE).sum()) for g in groups
    ]
