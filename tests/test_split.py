import hashlib

import numpy as np
import pyarrow as pa
import pytest

from cellray.data.split import held_out


def cells(*, donors=5, batches=2, dataset="d", count=60, label="T", present=1):
    names = {"donor": donors, "batch": batches}
    columns = {
        "cell_id": [f"{dataset}:c{i}" for i in range(count)],
        "dataset": [dataset] * count,
        "label": [label] * count,
        "present": pa.array([present] * count, pa.uint32()),
    }
    for name, number in names.items():
        columns[name] = [f"{dataset}-{name}{i % number}" if number else "" for i in range(count)]
    return pa.table(columns)


def units_of(table, mask, column):
    values = np.array(table[column].to_pylist())
    return set(values[mask]), set(values[~mask])


def test_whole_donors_are_held_out_where_there_are_enough():
    table = cells()
    test, units = held_out(table)
    assert units == {"d": "donor"}
    inside, outside = units_of(table, test, "donor")
    assert len(inside) == 1
    assert not inside & outside


def test_batches_come_after_donors_and_cells_last():
    assert held_out(cells(donors=1, batches=4))[1] == {"d": "batch"}
    test, units = held_out(cells(donors=1, batches=2, count=1000))
    assert units == {"d": "cell"}
    assert 0.12 < test.mean() < 0.28


def test_cells_fold_as_the_published_figures_do():
    test, _ = held_out(cells(donors=0, batches=0), by="cell")
    expected = [int(hashlib.md5(f"c{i}".encode()).hexdigest(), 16) % 5 == 0 for i in range(60)]
    assert test.tolist() == expected


def test_a_further_data_set_moves_no_cell():
    alone = held_out(cells())[0]
    both = held_out(pa.concat_tables([cells(dataset="new", donors=4), cells()]))[0]
    np.testing.assert_array_equal(both[60:], alone)


def test_what_cannot_be_scored_is_not_split():
    test, units = held_out(cells(label=""))
    assert units == {"d": "none"}
    assert not test.any()
    assert held_out(cells(label="", present=3))[0].any()


def test_holding_out_the_only_donor_is_refused():
    with pytest.raises(ValueError, match=r"has one donor.*split\.by=cell"):
        held_out(cells(donors=1), by="donor")


def test_a_larger_fraction_holds_out_more_and_never_all():
    sizes = [len(units_of(cells(), held_out(cells(), fraction=f)[0], "donor")[0]) for f in (0.2, 0.5, 0.9)]
    assert sizes == [1, 3, 4]
