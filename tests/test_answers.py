import numpy as np
import pytest

from cellray.answers import annotation, answers, check, embedding, everything, open_cells
from cellray.data.reading import CELLXGENE
from cellray.embedder import UnknownGenes
from tests import tiny
from tests.files import anndata, write


@pytest.fixture(scope="module")
def model():
    return tiny.embedder()


def test_rows_read_at_a_time_and_ranges_change_no_bit(model, tmp_path):
    file = write(anndata(tiny.counts(150), features=tiny.GENES), tmp_path / "cells.h5ad")
    wanted = model.embed(tiny.tokens(150)).vectors
    heard: list[int] = []
    with open_cells(file) as source:
        whole = answers(model, source, embedding, 0, 150)
        part = answers(model, source, embedding, 30, 100, rows=21, on_rows=heard.append)
    assert np.array_equal(whole.columns["embedding"], wanted)
    assert np.array_equal(part.columns["embedding"], wanted[30:100])
    assert heard == [21, 42, 63, 70]
    assert part.about["counts"] == tiny.counts(150)[30:100].sum()
    assert part.about["counts_kept"] == 1


def test_one_pass_says_what_embedding_and_annotation_say(model, tmp_path):
    counts = tiny.counts(70).toarray()
    counts[5] = 0
    file = write(anndata(counts, features=tiny.GENES), tmp_path / "cells.h5ad")
    with open_cells(file) as source:
        both = answers(model, source, everything, 0, 70).columns
        for answer in (embedding, annotation):
            for name, values in answers(model, source, answer, 0, 70).columns.items():
                assert np.array_equal(both[name], values), name
                assert both[name].dtype == values.dtype
    assert (both["label"][5], both["confidence"][5], both["ood"][5]) == ("", 0, 1)
    assert set(answers_of(tiny.embedder(labelled=False), file)) == {"embedding", "ood", "genes", "kept"}


def answers_of(model, file):
    with open_cells(file) as source:
        return answers(model, source, everything, 0, 10).columns


def test_of_a_cellxgene_file_the_raw_counts_are_read(model, tmp_path):
    counts = tiny.counts(20)
    data = anndata(counts, features=tiny.GENES, obs={name: ["x"] * 20 for name in CELLXGENE})
    data.raw = data.copy()
    data.X = np.log1p(counts.toarray())
    file = write(data, tmp_path / "cells.h5ad")
    wanted = model.embed(tiny.tokens(20)).vectors
    assert np.array_equal(answers_of(model, file)["embedding"], wanted[:10])


def test_a_check_looks_at_the_first_cells_and_the_genes(model, tmp_path):
    normal = np.log1p(tiny.counts(20).toarray())
    for counts, says in ((normal, "log-normalised"), (tiny.counts(20), "0 of 120 genes")):
        genes = tiny.GENES if counts is normal else [f"ENSMUSG{i:011d}" for i in range(120)]
        file = write(anndata(counts, features=genes), tmp_path / "cells.h5ad")
        with open_cells(file) as source, pytest.raises(ValueError, match=says):
            check(model, source)
    columns = anndata(tiny.counts(20).tocsc(), features=[f"g{i}" for i in range(120)])
    file = write(columns, tmp_path / "columns.h5ad")
    with open_cells(file) as source, pytest.raises(UnknownGenes, match="0 of 120"):
        check(model, source)
