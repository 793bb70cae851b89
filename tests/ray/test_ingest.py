import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cellray.data.ingest import ingest
from cellray.data.simulate import simulate
from cellray.data.store import Store
from cellray.data.truth import Simulation, cells_of
from cellray.train.recipe import Recipe, override
from pipelines import ingest as command
from pipelines.command import Options
from tests.files import anndata, poisson, table, write

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray Data warns of its own defaults
]

SIMULATION = Simulation(cells=280, genes=60, peaks=80, proteins=7, depth=150)


def make(atlas, store, **settings):
    settings = {"qc__mads": 0} | settings
    recipe = override(Recipe(atlas=str(atlas)), {k.replace("__", "."): v for k, v in settings.items()})
    return ingest(recipe, str(store))


def content(store):
    """Every file below the store, with what is in it."""
    return {str(p.relative_to(store)): p.read_bytes() for p in Path(store).rglob("*") if p.is_file()}


def whole(store):
    """Cell ids in store order, and the counts of each modality over its vocabulary."""
    batch = store.read(np.arange(len(store)))
    words = store.tokenizer.vocabularies
    return store.cells["cell_id"].to_pylist(), {m: c.matrix(len(words[m])) for m, c in batch.counts.items()}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """The simulator's atlas: five data sets in mixed formats, paired, partly paired and unpaired."""
    return simulate(str(tmp_path_factory.mktemp("sim") / "atlas"), SIMULATION)


@pytest.fixture(scope="module")
def made(atlas, tmp_path_factory):
    """Its store and report, in several shards."""
    store = tmp_path_factory.mktemp("made") / "store"
    return store, make(atlas, store, ingest__unit_cells=64, ingest__shard_bytes=5_000)


def test_the_store_holds_every_simulated_count_under_its_cell(made):
    store = Store(str(made[0]))
    ids, counts = whole(store)
    truth = cells_of(SIMULATION, 0, SIMULATION.cells)
    names = [f"{d}:{n}" for d, n in zip(truth.dataset, truth.names, strict=True)]
    assert sorted(ids) == sorted(names)
    rows = np.array([names.index(cell) for cell in ids])
    cells = store.cells.to_pandas()
    for bit, modality in enumerate(store.tokenizer.vocabularies):
        expected = truth.counts[modality][rows]
        seen = np.flatnonzero(np.asarray(truth.counts[modality].sum(0)).ravel())
        assert counts[modality].shape[1] == len(seen)
        np.testing.assert_array_equal(counts[modality].sum(1), expected.sum(1))
        order = np.argsort(
            [store.tokenizer.vocabularies[modality].ids.index(n) for n in _names(modality, seen)]
        )
        np.testing.assert_array_equal(counts[modality].toarray(), expected[:, seen][:, order].toarray())
        np.testing.assert_array_equal(cells[f"{modality}.total"], np.asarray(expected.sum(1)).ravel())
        has = np.asarray(expected.sum(1)).ravel() > 0
        np.testing.assert_array_equal(cells["present"].to_numpy() >> bit & 1, has)
    np.testing.assert_array_equal(cells["donor"], truth.donor[rows])
    np.testing.assert_array_equal(cells["assay"], truth.assay[rows])
    known = truth.dataset[rows] != "atac"
    np.testing.assert_array_equal(cells["label"], np.where(known, truth.cell_type[rows], ""))


def _names(modality, features):
    from cellray.data import truth

    ids = {"rna": truth.gene_ids, "atac": truth.peak_ids, "protein": truth.protein_ids}[modality]
    return [ids(SIMULATION)[i] for i in features]


def test_every_shard_knows_its_data_sets_donors_and_files(made):
    store = Store(str(made[0]))
    cells = store.cells.to_pandas()
    first = 0
    for number, shard in enumerate(store.shards):
        own = cells[first : first + shard.rows]
        first += shard.rows
        found = store.lineage(number)
        assert {n: e["cells"] for n, e in found.items()} == own["dataset"].value_counts().to_dict()
        for name, entry in found.items():
            assert entry["donors"] == own[own["dataset"] == name]["donor"].value_counts().to_dict()
            assert all(len(file["sha256"]) == 64 for file in entry["files"])
    assert {file["url"] for file in found["rna"]["files"]} == {"rna.zarr"}


def test_cells_are_shuffled_over_shards_and_within(made):
    store = Store(str(made[0]))
    assert len(store.shards) > 2
    datasets = np.array(store.cells["dataset"].to_pylist())
    first = datasets[: store.shards[0].rows]
    assert len(set(first)) == 5
    assert (first[1:] != first[:-1]).mean() > 0.5


def test_the_report_adds_up(made):
    report = made[1]
    assert report["cells_in"] == report["cells_kept"] + sum(report["dropped"].values()) == SIMULATION.cells
    for group in report["datasets"]:
        assert sum(group["labels"].values()) == group["cells_kept"] == sum(group["present"].values())
        for part in group["modalities"].values():
            for what in ("cells", "features", "counts"):
                assert part[f"{what}_in"] == part[f"{what}_kept"] + sum(part[f"{what}_dropped"].values())


def test_counts_above_a_byte_come_back_be_they_few_or_many(tmp_path):
    rna, protein = poisson(50, 40, mean=2), poisson(50, 40, mean=300)
    rna[[0, 7, 7], [3, 5, 9]] = 256, 70_000, 255
    for name, counts in (("rna", rna), ("protein", protein)):
        write(anndata(counts), tmp_path / f"{name}.h5ad")
    rows = [{"dataset": "d", "modality": name, "url": f"{name}.h5ad"} for name in ("rna", "protein")]
    make(table(tmp_path / "atlas.csv", *rows), tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    ids, counts = whole(store)
    order = [int(cell.removeprefix("d:c")) for cell in ids]
    for name, given in (("rna", rna), ("protein", protein)):
        words = [int(word.removeprefix("ENSG")) for word in store.tokenizer.vocabularies[name].ids]
        np.testing.assert_array_equal(counts[name].toarray(), given[order][:, words])
    assert {name: str(width) for name, width in store.widths.items()} == {
        "rna": "uint32",
        "protein": "uint16",
    }
    with pa.ipc.open_file(next((tmp_path / "store" / "shards").iterdir())) as file:
        stored = {name: file.schema.field(f"{name}.counts").type.value_type for name in store.names}
        assert stored == {"rna": pa.uint8(), "protein": pa.uint16()}
        assert len(file.read_all()["rna.high"].combine_chunks().values) == 2


def test_units_shards_and_their_order_do_not_change_a_byte(made, atlas, tmp_path):
    again = make(atlas, tmp_path / "store", ingest__unit_cells=1000, ingest__shard_bytes=5_000)
    assert again == made[1]
    assert content(tmp_path / "store") == content(made[0])


def test_other_shard_sizes_hold_the_same_cells(made, atlas, tmp_path):
    make(atlas, tmp_path / "store")
    one, other = Store(str(tmp_path / "store")), Store(str(made[0]))
    assert len(one.shards) == 1
    assert one.tokenizer.hash == other.tokenizer.hash
    (ids, counts), (ids2, counts2) = whole(one), whole(other)
    rows = np.array([ids2.index(cell) for cell in ids])
    for modality in counts:
        assert (counts[modality] != counts2[modality][rows]).nnz == 0


def test_a_finished_store_is_returned_at_once_and_left_alone(made, atlas):
    before = {path: os.stat(made[0] / path).st_mtime_ns for path in content(made[0])}
    steps = []
    recipe = override(
        Recipe(atlas=str(atlas)), {"qc.mads": 0, "ingest.unit_cells": 64, "ingest.shard_bytes": 5_000}
    )
    assert ingest(recipe, str(made[0]), lambda *event: steps.append(event)) == made[1]
    assert steps == []
    assert {path: os.stat(made[0] / path).st_mtime_ns for path in content(made[0])} == before


def test_a_store_of_other_settings_is_not_overwritten(made, atlas):
    with pytest.raises(ValueError, match=r"store\.json is of a store made from other.*min_cells") as error:
        make(atlas, made[0], ingest__min_cells=9)
    assert "run=" in str(error.value)
    Store(str(made[0]))


class Stop(Exception):
    """The run was killed here."""


@pytest.mark.parametrize(("step", "share"), [("read", 0.4), ("count", 0.4), ("shards", 0.5)])
def test_a_run_that_stopped_goes_on_where_it_was(made, atlas, tmp_path, step, share):
    recipe = override(
        Recipe(atlas=str(atlas)), {"qc.mads": 0, "ingest.unit_cells": 64, "ingest.shard_bytes": 5_000}
    )

    def stop(name, done, total):
        if name == step and done > share * total:
            raise Stop

    with pytest.raises(Stop):
        ingest(recipe, str(tmp_path / "store"), stop)
    with pytest.raises(ValueError, match="no store at"):
        Store(str(tmp_path / "store"))
    events = []
    ingest(recipe, str(tmp_path / "store"), lambda *event: events.append(event))
    begun = {name: done / total for name, done, total in reversed(events)}
    assert begun[step] > 0
    assert content(tmp_path / "store") == content(made[0])


def one(tmp_path, counts, *, name="cells", **more):
    """An atlas of a single RNA file."""
    data = more.pop("data", None)
    write(data if data is not None else anndata(counts), tmp_path / f"{name}.h5ad")
    return table(tmp_path / "atlas.csv", {"dataset": "d", "modality": "rna", "url": f"{name}.h5ad"} | more)


def test_dropped_labels_features_and_cells_are_reported_with_their_counts(tmp_path):
    counts = poisson(40, 12)
    counts[:, 3] = 0
    counts[5, 3] = 4
    counts[7] = 0
    counts[8] = 0
    counts[8, 0] = 9
    labels = ["bad" if i < 3 else "good" for i in range(40)]
    atlas = one(tmp_path, None, data=anndata(counts, obs={"type": labels}), label="type")
    settings = {"ingest__drop_labels": "bad", "ingest__min_cells": 2, "modalities__rna__min_features": 2}
    report = make(atlas, tmp_path / "store", **settings, ingest__unit_cells=11)
    assert report["cells_in"] == 40
    assert report["dropped"] == {"label": 3, "nothing_left": 2}
    (group,) = report["datasets"]
    assert group["labels"] == {"good": 35}
    rna = group["modalities"]["rna"]
    assert rna["counts_dropped"] == {
        "label": int(counts[:3].sum()),
        "too_few_features": 9,
        "feature_in_too_few_cells": 4,
    }
    assert rna["cells_dropped"] == {"label": 3, "empty": 1, "too_few_features": 1, "nothing_left": 0}
    assert (rna["features_in"], rna["features_kept"]) == (12, 11)
    store = Store(str(tmp_path / "store"))
    cells = store.cells.to_pandas().set_index("cell_id")
    assert cells.loc["d:c5", "rna.total"] == counts[5].sum()  # the depth counts what the vocabulary lacks too
    assert store.tokenizer.vocabularies["rna"].cells == {"": 35}


def test_genes_that_repeat_are_summed(tmp_path):
    counts = poisson(6, 3)
    data = anndata(counts, features=["ENSG00000000001.1", "B", "ENSG00000000001.2"])
    make(one(tmp_path, None, data=data), tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    ids, found = whole(store)
    rows = [int(cell.removeprefix("d:c")) for cell in ids]
    assert store.tokenizer.vocabularies["rna"].ids == ("B", "ENSG00000000001")
    expected = np.stack([counts[:, 1], counts[:, 0] + counts[:, 2]], axis=1)
    np.testing.assert_array_equal(found["rna"].toarray(), expected[rows])


def refused(atlas, tmp_path, match, **settings):
    """The error is plain, of one line, and leaves nothing that could be taken for a store."""
    with pytest.raises(ValueError, match=match) as error:
        make(atlas, tmp_path / "store", **settings)
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store" / "store.json").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (np.log1p, "values that are not whole"),
        (lambda x: x - 2, "negative"),
        (lambda x: x / 7 * 1e4, "normalised to a depth"),
    ],
)
def test_what_is_no_raw_count_is_refused_wherever_it_stands_in_the_file(tmp_path, change, match):
    counts = poisson(50, 8)
    counts[40:] = change(counts[40:] + 1)
    message = refused(one(tmp_path, counts), tmp_path, match, ingest__unit_cells=10)
    assert re.search(r"cells\.h5ad: X", message)
    assert "layer=" in message


def test_a_file_that_lies_is_refused(tmp_path):
    import h5py

    atlas = one(tmp_path, poisson(20, 8))
    with h5py.File(tmp_path / "cells.h5ad", "a") as file:
        file["X/indices"][-1] = 8
    refused(atlas, tmp_path, r"cells\.h5ad: the sparse counts contradict themselves")


def test_a_bad_data_set_may_be_left_out_and_is_listed(tmp_path):
    counts = poisson(50, 8)
    write(anndata(counts), tmp_path / "good.h5ad")
    counts[45] += 0.5
    write(anndata(counts), tmp_path / "late.h5ad")
    (tmp_path / "early.h5ad").write_bytes(b"")
    rows = [{"dataset": n, "modality": "rna", "url": f"{n}.h5ad"} for n in ("early", "good", "late")]
    atlas = table(tmp_path / "atlas.csv", *rows)
    report = make(atlas, tmp_path / "store", ingest__unit_cells=20)
    assert [group["name"] for group in report["datasets"]] == ["good"]
    assert [entry["dataset"] for entry in report["failed"]] == ["early", "late"]
    assert "late.h5ad: X has values that are not whole" in report["failed"][1]["reason"]
    store = Store(str(tmp_path / "store"))
    assert len(store) == 50
    assert store.tokenizer.vocabularies["rna"].cells == {"": 50}
    assert make(atlas, tmp_path / "store", ingest__unit_cells=20) == report
    assert not [name for name in os.listdir(tmp_path / "store") if name.startswith(".parts")]


def test_the_command_fails_for_data_sets_left_out_unless_that_is_allowed(tmp_path, capsys):
    write(anndata(poisson(20, 8)), tmp_path / "good.h5ad")
    (tmp_path / "bad.h5ad").write_bytes(b"")
    rows = [{"dataset": n, "modality": "rna", "url": f"{n}.h5ad"} for n in ("good", "bad")]
    recipe = Recipe(atlas=table(tmp_path / "t.csv", *rows), run=str(tmp_path / "run"))
    assert command.run(recipe, Options(progress="quiet")) == 1
    assert re.search(r"cannot be read: bad: .*bad\.h5ad is empty", capsys.readouterr().out)
    assert command.run(override(recipe, {"ingest.allow_failed_files": True}), Options(progress="quiet")) == 0
    assert len(Store(str(tmp_path / "run" / "store"))) == 20
    with pytest.raises(ValueError, match=r"data sets could not be read: bad.*allow_failed_files=true"):
        command.complete(json.loads((tmp_path / "run/store/ingest.json").read_text()), recipe)


def test_a_data_set_that_was_mended_comes_as_the_next_edition(tmp_path):
    counts = poisson(50, 8)
    for name, data in (("good", counts), ("late", counts[::-1] + 0.5)):
        write(anndata(data), tmp_path / f"{name}.h5ad")
    rows = [{"dataset": n, "modality": "rna", "url": f"{n}.h5ad"} for n in ("good", "late")]
    atlas = table(tmp_path / "atlas.csv", *rows)
    assert [entry["dataset"] for entry in make(atlas, tmp_path / "store")["failed"]] == ["late"]
    write(anndata(poisson(30, 9, seed=4)), tmp_path / "late.h5ad")
    report = make(atlas, tmp_path / "store")
    assert report["failed"] == []
    assert [(group["name"], group["cells_kept"]) for group in report["datasets"]] == [
        ("good", 50),
        ("late", 30),
    ]
    assert len(Store(str(tmp_path / "store"))) == 80


def test_data_sets_are_added_as_an_edition_that_shares_shards_and_statistics(tmp_path):
    counts = [poisson(40, 8, seed=seed) for seed in (1, 2)]
    rows = [{"dataset": n, "modality": "rna", "url": f"{n}.h5ad"} for n in "ab"]
    write(anndata(counts[0]), tmp_path / "a.h5ad")
    more = np.concatenate([counts[1], np.full((40, 1), 3.0, np.float32)], axis=1)
    write(anndata(more), tmp_path / "b.h5ad")
    folder = tmp_path / "store"
    first = make(table(tmp_path / "one.csv", rows[0]), folder)
    before = content(folder)
    report = make(table(tmp_path / "two.csv", *rows), folder)
    after = content(folder)
    assert {path: after[path] for path in before} == before
    assert report["datasets"][0] == first["datasets"][0]
    assert report["datasets"][1]["modalities"]["rna"]["features_dropped"] == {"not_in_vocabulary": 1}
    assert report["datasets"][1]["modalities"]["rna"]["counts_dropped"]["feature_not_in_vocabulary"] == 120
    old, new = json.loads(after["store.json"]), json.loads(after["store-000002.json"])
    assert new["shards"][: len(old["shards"])] == old["shards"]
    assert (new["tokenizer"], new["edition"]) == (old["tokenizer"], 2)
    ids, found = whole(Store(str(folder)))
    whole_counts = np.concatenate(counts)
    at = [int(cell[3:]) + 40 * (cell[0] == "b") for cell in ids]
    np.testing.assert_array_equal(found["rna"].toarray(), whole_counts[at])
    assert make(table(tmp_path / "two.csv", *rows), folder) == report
    with pytest.raises(ValueError, match=r"store-000002\.json is of a store.*b\.h5ad of b is no longer read"):
        make(table(tmp_path / "one.csv", rows[0]), folder)


def test_cells_that_another_data_set_holds_already_are_dropped_within_and_across_editions(tmp_path):
    counts = poisson(30, 60, mean=2.0)
    write(anndata(counts), tmp_path / "a.h5ad")
    write(anndata(counts[:7, ::-1], features=[f"ENSG{i:011d}" for i in range(60)][::-1]), tmp_path / "b.h5ad")
    rows = [{"dataset": n, "modality": "rna", "url": f"{n}.h5ad"} for n in "ab"]
    report = make(table(tmp_path / "t.csv", *rows), tmp_path / "both")
    assert report["dropped"]["duplicate"] == 7
    make(table(tmp_path / "a.csv", rows[0]), tmp_path / "later")
    assert make(table(tmp_path / "t.csv", *rows), tmp_path / "later")["dropped"]["duplicate"] == 7
    kept = make(table(tmp_path / "t.csv", *rows), tmp_path / "kept", qc__duplicates="keep")
    assert kept["cells_kept"] == 37


def test_outliers_of_a_data_set_are_dropped_and_told(tmp_path):
    counts = poisson(200, 80, mean=2.0)
    counts[11] *= 100
    report = make(one(tmp_path, counts), tmp_path / "store", qc__mads=5)
    assert report["datasets"][0]["dropped"]["outlier_counts"] >= 1
    assert report["cells_kept"] + sum(report["dropped"].values()) == 200
    (judged,) = report["quality"]
    assert judged["groups"][0]["limits"]["counts"][1] < counts[11].sum()


def test_what_failed_once_and_not_again_does_not_mix_with_earlier_tokens(tmp_path):
    for number, name in enumerate(("a", "b")):
        data = anndata(poisson(30, 8, seed=number), features=[f"{name}{i}" for i in range(8)])
        write(data, tmp_path / f"{name}.h5ad")
    rows = [{"dataset": n, "modality": "rna", "url": f"{n}.h5ad"} for n in ("a", "b")]
    recipe = override(Recipe(atlas=table(tmp_path / "t.csv", *rows)), {"qc.mads": 0})

    def stop(name, done, total):
        if name == "read" and done == 0:
            os.rename(tmp_path / "a.h5ad", tmp_path / "gone.h5ad")
        if name == "shards":
            raise Stop

    with pytest.raises(Stop):
        ingest(recipe, str(tmp_path / "store"), stop)
    os.rename(tmp_path / "gone.h5ad", tmp_path / "a.h5ad")
    assert ingest(recipe, str(tmp_path / "store"))["failed"] == []
    ingest(recipe, str(tmp_path / "clean"))
    assert content(tmp_path / "store") == content(tmp_path / "clean")


def test_an_atlas_of_which_nothing_is_left_is_refused(tmp_path):
    refused(one(tmp_path, np.zeros((5, 4), np.float32)), tmp_path, "rna: no feature is counted in 1 cells")
    (tmp_path / "cells.h5ad").write_bytes(b"")
    message = refused(str(tmp_path / "atlas.csv"), tmp_path, "no data set", ingest__allow_failed_files=True)
    assert "is empty" in message


def test_the_manifest_knows_what_the_store_was_made_from(tmp_path):
    atlas = one(tmp_path, poisson(20, 8), donor="=d1", label_from="protein")
    make(atlas, tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "store.json").read_text())
    (file,) = manifest["inputs"]["files"]
    assert file["url"] == "cells.h5ad"
    assert file["bytes"] == (tmp_path / "cells.h5ad").stat().st_size
    assert len(file["sha256"]) == 64
    assert manifest["tokenizer"] == Store(str(tmp_path / "store")).tokenizer.hash
    assert manifest["ingest"]["datasets"][0]["donors"] == {"d1": 20}
    assert manifest["ingest"]["datasets"][0]["label_from"] == "protein"
    assert str(tmp_path) not in json.dumps(manifest)
    assert sorted(os.listdir(tmp_path / "store")) == sorted(
        ["shards", "store.json", manifest["vocabulary"]["name"]]
    )


def test_a_store_at_a_url_is_the_same(tmp_path):
    atlas = one(tmp_path, poisson(20, 8))
    make(atlas, tmp_path / "plain")
    make(f"file://{atlas}", f"file://{tmp_path}/url")
    assert content(tmp_path / "plain") == content(tmp_path / "url")


def test_the_command_shows_what_it_would_read_and_what_it_made(tmp_path, capsys):
    atlas = one(tmp_path, poisson(20, 8))
    recipe = Recipe(atlas=atlas, run=str(tmp_path / "run"))
    assert command.run(recipe, Options(dry_run=True, progress="quiet")) == 0
    out = capsys.readouterr().out
    assert re.search(r"^d +rna +human +cells\.h5ad +20 +0 +8 +0 +\d+$", out, re.MULTILINE)
    assert re.search(r"^store: about [\d.,]+ (bytes|kB)", out, re.MULTILINE)
    assert re.search(r"^time: about \d+ s of one core", out, re.MULTILINE)
    assert "nothing was written" in out
    assert not (tmp_path / "run").exists()
    assert command.run(recipe, Options(progress="plain")) == 0
    shown = capsys.readouterr()
    assert re.search(r"^d +rna +20 +20 +8 +8 +(\d+) +\1$", shown.out, re.MULTILINE)
    assert "20 of 20 cells kept" in shown.out
    assert [line.split()[0] for line in shown.err.splitlines()] == ["read", "count", "shards"]
    assert len(Store(str(tmp_path / "run" / "store"))) == 20
