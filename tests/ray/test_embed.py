import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from cellray import bundle
from cellray.embedder import tokens_from
from pipelines import embed
from tests import tiny
from tests.files import anndata, table, write

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray Data warns of its own defaults
]

CELLS = {"a.h5ad": 100, "b.zarr": 70}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("model") / "bundle")
    bundle.write(url, tiny.embedder(), golden=tiny.tokens(5))
    return url


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of cells with the same names, in two formats."""
    folder = tmp_path_factory.mktemp("files")
    return [
        write(anndata(tiny.counts(cells, seed=i), features=tiny.GENES), folder / name)
        for i, (name, cells) in enumerate(CELLS.items())
    ]


@pytest.fixture(scope="module")
def made(model, files, tmp_path_factory):
    """Their embeddings, by one worker."""
    output = tmp_path_factory.mktemp("made") / "out"
    assert ask(model, output, *files, "--rows", "40", "--workers", "1") == 0
    return output


def ask(model, output, *words):
    return embed.main([model, str(output), *words, "--quiet"])


def content(folder):
    """Every file below the folder, with what is in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def times(folder):
    return {p.name: p.stat().st_mtime_ns for p in Path(folder).rglob("*") if p.is_file()}


def test_embeddings_and_labels_are_the_embedders_bits(made, model, files):
    offline = bundle.load(model)
    found = pq.read_table(made / "parts").to_pydict()
    for i, (file, cells) in enumerate(zip(files, CELLS.values(), strict=True)):
        mine = np.flatnonzero(np.array(found["file"]) == file)
        tokens = tokens_from(offline.tokenizer, tiny.counts(cells, seed=i), tiny.GENES)[0]
        where, what = offline.embed(tokens), offline.annotate(tokens)
        own = {name: np.array([values[row] for row in mine]) for name, values in found.items()}
        assert own["cell_id"].tolist() == [f"c{c}" for c in range(cells)]
        assert np.array_equal(own["embedding"].astype(np.float32), where.vectors)
        assert np.array_equal(own["ood"].astype(np.float32), where.ood)
        assert own["label"].tolist() == what.labels.tolist()
        assert np.array_equal(own["confidence"].astype(np.float32), what.confidence)
        assert own["genes"].tolist() == tokens.lengths.tolist()
        assert (own["kept"] == 1).all()


def test_the_manifest_knows_model_files_and_parts(made, model, files):
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["model"] == bundle.load(model).hash
    assert [(f["file"], f["cells"], f["genes_known"]) for f in manifest["files"]] == [
        (files[0], 100, 120), (files[1], 70, 120)
    ]  # fmt: skip
    assert all(len(f["sha256"]) == 64 for f in manifest["files"])
    # What one chunk of the second file holds is read together.
    assert [(p["file"], p["start"], p["stop"]) for p in manifest["parts"]] == [
        (0, 0, 40), (0, 40, 80), (0, 80, 100), (1, 0, 70)
    ]  # fmt: skip
    for part in manifest["parts"]:
        data = (made / "parts" / part["name"]).read_bytes()
        assert embed.storage.sha256(data) == part["sha256"]
    assert sorted(p.name for p in (made / "parts").iterdir()) == [p["name"] for p in manifest["parts"]]
    assert pd.read_parquet(made / "parts")["embedding"].map(len).eq(16).all()


def test_the_number_of_workers_changes_no_byte(made, model, files, tmp_path):
    assert ask(model, tmp_path / "out", *files, "--rows", "40", "--workers", "2") == 0
    assert content(tmp_path / "out") == content(made)


def test_running_again_does_only_what_is_missing(made, model, files, tmp_path, capsys):
    whole, before = content(made), times(made)
    command = (*files, "--rows", "40", "--workers", "1")
    assert ask(model, made, *command) == 0
    assert times(made) == before
    parts = sorted((made / "parts").iterdir())
    parts[1].rename(f"{parts[1]}.0123.part")  # what a killed writer leaves
    (made / "manifest.json").unlink()
    assert ask(model, made, *command, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[-4].split()[1:] == ["100", "3", "2"]
    assert ask(model, made, *command) == 0
    assert content(made) == whole
    after = times(made)
    assert {name for name in after if after[name] != before[name]} == {parts[1].name, "manifest.json"}


def test_a_file_with_bad_counts_is_refused_by_name(model, files, tmp_path, capsys):
    counts = tiny.counts(300).toarray()
    counts[280] *= 0.5
    bad = write(anndata(counts, features=tiny.GENES), tmp_path / "bad.h5ad")
    output = tmp_path / "out"
    assert ask(model, output, files[0], bad, "--rows", "100", "--workers", "1") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"error: {bad}: X has values that are not whole")
    assert not (output / "manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: np.log1p(x.toarray()), "it looks log-normalised"),
        (lambda x: x[:0], "bad.h5ad has no cells"),
        (lambda x: x[:, :3], "3 of 3 genes"),
    ],
)
def test_what_the_first_look_finds_is_refused_before_anything_is_written(
    change, says, model, files, tmp_path, capsys
):
    counts = change(tiny.counts(100))
    bad = write(anndata(counts, features=tiny.GENES[: counts.shape[1]]), tmp_path / "bad.h5ad")
    assert ask(model, tmp_path / "out", files[0], bad) == 2
    assert says in capsys.readouterr().err
    assert ask(model, tmp_path / "out", files[0], str(tmp_path / "nowhere.h5ad")) == 2
    assert "nowhere.h5ad does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_of_something_else_is_refused(made, model, files, tmp_path, capsys):
    other = str(tmp_path / "bundle")
    bundle.write(other, tiny.embedder(labelled=False), golden=tiny.tokens(5))
    before = content(made)
    for wrong, says in (
        ((other, *files, "--rows", "40"), "another model"),
        ((model, files[0], "--rows", "40"), f"more files, with {files[1]}"),
        ((model, *files, "--rows", "41"), "another size"),
        ((model, *files, "--rows", "40", "--names", "id"), "no column 'id'"),
    ):
        assert ask(wrong[0], made, *wrong[1:]) == 2
        assert says in capsys.readouterr().err
    (tmp_path / "out/parts").mkdir(parents=True)
    (tmp_path / "out/parts/notes.txt").write_text("")
    assert ask(model, tmp_path / "out", *files) == 2
    assert "notes.txt is of another model or file" in capsys.readouterr().err
    assert content(made) == before


def test_an_atlas_table_says_what_to_read_and_a_model_without_labels_gives_none(tmp_path, capsys):
    model = str(tmp_path / "bundle")
    bundle.write(model, tiny.embedder(labelled=False), golden=tiny.tokens(5))
    counts = tiny.counts(30)
    data = anndata(np.log1p(counts.toarray()), features=[f"g{i}" for i in range(120)], var={"id": tiny.GENES})
    data.layers["counts"] = counts
    write(data, tmp_path / "rna.h5ad")
    rows = [
        {"dataset": "mine", "modality": "rna", "url": "rna.h5ad", "layer": "counts", "names": "id"},
        {"dataset": "mine", "modality": "atac", "url": "atac.h5ad"},
    ]
    atlas = table(tmp_path / "atlas.csv", *rows)
    assert ask(model, tmp_path / "out", atlas, "--workers", "1") == 0
    found = pq.read_table(tmp_path / "out/parts").to_pydict()
    assert list(found) == ["cell_id", "file", "embedding", "ood", "genes", "kept"]
    assert found["cell_id"][:2] == ["mine:c0", "mine:c1"]
    offline = bundle.load(model)
    wanted = offline.embed(tokens_from(offline.tokenizer, counts, tiny.GENES)[0]).vectors
    assert np.array_equal(np.array(found["embedding"], np.float32), wanted)
    table(tmp_path / "atlas.csv", rows[1])
    assert ask(model, tmp_path / "other", atlas) == 2
    assert "atlas.csv has no RNA" in capsys.readouterr().err
