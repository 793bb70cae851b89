import json
import time

import fsspec
import numpy as np
import pytest

from cellray import bundle
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.embedder()


@pytest.fixture
def folder(tmp_path, model):
    url = str(tmp_path / "bundle")
    bundle.write(url, model, golden=tiny.tokens(20))
    return tmp_path / "bundle"


@pytest.fixture(params=["mlp", "transformer"])
def either(request, tmp_path):
    """A model of either kind, and its bundle."""
    model = tiny.embedder(kind=request.param)
    bundle.write(str(tmp_path / "bundle"), model, golden=tiny.tokens(20))
    return model, tmp_path / "bundle"


def change_network(folder, **changes):
    """Other sizes in config.json, signed; None takes one away."""
    config = json.loads((folder / "config.json").read_text())
    network = config["network"] | changes
    config["network"] = {name: size for name, size in network.items() if size is not None}
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder, "config.json")


def sign(folder, name):
    """The manifest as whoever changed the file `name` would forge it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "sha256": bundle.storage.sha256(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_loaded_bundle_answers_with_the_same_bits(either):
    model, folder = either
    loaded = bundle.load(str(folder))
    assert (loaded.student.kind, loaded.student.sizes) == (model.student.kind, model.student.sizes)
    cells = tiny.tokens(150, seed=5)
    assert np.array_equal(loaded.embed(cells).vectors, model.embed(cells).vectors)
    assert np.array_equal(loaded.embed(cells).ood, model.embed(cells).ood)
    assert np.array_equal(loaded.annotate(cells).probabilities, model.annotate(cells).probabilities)
    assert np.array_equal(loaded.annotate(cells).labels, model.annotate(cells).labels)
    assert np.array_equal(loaded.translate(cells, "atac"), model.translate(cells, "atac"))
    assert loaded.about == model.about
    assert loaded.tokenizer.hash == model.tokenizer.hash


def test_a_model_without_labels_makes_the_journey(tmp_path):
    bare = tiny.embedder(labelled=False)
    bundle.write(str(tmp_path / "b"), bare, golden=tiny.tokens(3))
    assert bundle.load(str(tmp_path / "b")).head is None


def test_the_same_model_gives_the_same_bytes(tmp_path, either):
    model, folder = either
    twin = tiny.embedder(kind=model.student.kind)
    again = bundle.write(str(tmp_path / "again"), twin, golden=tiny.tokens(20))
    assert again == bundle.load(str(folder)).hash
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_only_the_bundle_is_left_after_writing_and_rewriting(tmp_path, folder):
    bundle.write(str(folder), tiny.embedder(labelled=False), golden=tiny.tokens(3))
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*bundle.FILES, "manifest.json"])
    assert bundle.load(str(folder)).head is None


@pytest.mark.parametrize("name", bundle.FILES)
def test_one_changed_byte_anywhere_is_refused_by_name(folder, name):
    data = bytearray((folder / name).read_bytes())
    for at in np.random.default_rng(0).integers(0, len(data), 5):
        changed = data.copy()
        changed[at] ^= 1
        (folder / name).write_bytes(changed)
        start = time.perf_counter()
        with pytest.raises(ValueError, match=rf"{name} has sha256 .* was changed"):
            bundle.load(str(folder))
        assert time.perf_counter() - start < 2


@pytest.mark.parametrize("name", bundle.FILES)
def test_a_missing_or_short_file_is_refused_by_name(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{name} has sha256"):
        bundle.load(str(folder))
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}, listed in manifest.json, does not exist"):
        bundle.load(str(folder))


def test_a_changed_byte_of_the_manifest_is_refused_or_changes_the_hash(folder):
    before = bundle.load(str(folder)).hash
    data = (folder / "manifest.json").read_bytes()
    for at in range(0, len(data), 7):
        changed = bytearray(data)
        changed[at] ^= 1
        (folder / "manifest.json").write_bytes(changed)
        try:
            said = bundle.load(str(folder)).hash
        except ValueError as error:
            said = str(error)
        assert said != before
        assert str(folder) in said or len(said) == 64


def test_no_bundle_and_no_manifest_say_what_is_missing(tmp_path, folder):
    with pytest.raises(ValueError, match=r"no bundle at .*nowhere"):
        bundle.load(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no bundle at"):
        bundle.load(str(folder / "card.md"))
    (folder / "manifest.json").write_text("<html>")
    with pytest.raises(ValueError, match="is no manifest of a bundle"):
        bundle.load(str(folder))


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "more.txt"])
def test_files_a_bundle_does_not_have_are_refused(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"other files than a bundle has .*{name}"):
        bundle.load(str(folder))


def test_another_schema_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema": 99, "cellray": "9.9"}))
    with pytest.raises(ValueError, match=r"schema 99, .* reads 1: use the release that wrote it \(9\.9\)"):
        bundle.load(str(folder))


def test_another_tokenizer_is_refused_even_if_signed(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tokenizer": "0" * 64}))
    sign(folder, "config.json")
    with pytest.raises(ValueError, match=r"tokenizer hash .* belong to different models"):
        bundle.load(str(folder))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden": 25}, "size mismatch"),
        ({"blocks": 3}, "Missing key"),
        ({"blocks": 10**9}, "blocks of the network is 1000000000"),
        ({"width": -1}, "width of the network is -1"),
        ({"width": "16"}, "width of the network is '16'"),
        ({"width": True}, "width of the network is True"),
        ({"layers": 2}, "has no sizes"),
        ({"hidden": None}, "has no sizes"),
        ({"kind": "transformer"}, "has no sizes"),
        ({"kind": "forest"}, "no student of the kind 'forest', only of mlp, transformer"),
    ],
)
def test_a_network_that_the_weights_do_not_fit_is_refused_even_if_signed(folder, changes, says):
    change_network(folder, **changes)
    with pytest.raises(ValueError, match=rf"(?s)weights and config\.json do not fit together: .*{says}"):
        bundle.load(str(folder))


@pytest.mark.parametrize("changes", [{"layers": 1}, {"heads": 3}, {"heads": 4}, {"context": 20}])
def test_a_transformer_of_other_sizes_is_refused_even_if_signed(tmp_path, changes):
    bundle.write(str(tmp_path / "b"), tiny.embedder(kind="transformer"), golden=tiny.tokens(3))
    change_network(tmp_path / "b", **changes)
    with pytest.raises(ValueError, match=r"do not fit together|golden cells come out different"):
        bundle.load(str(tmp_path / "b"))


def test_a_bundle_from_before_there_were_kinds_is_a_sparse_mlp(folder, model):
    change_network(folder, kind=None)
    cells = tiny.tokens(5)
    assert np.array_equal(bundle.load(str(folder)).embed(cells).vectors, model.embed(cells).vectors)


def test_other_weights_fail_on_the_golden_cells_even_if_signed(tmp_path, folder, model):
    other = tiny.embedder()
    with bundle.torch.no_grad():
        other.student.bag.weight.neg_()
    bundle.write(str(tmp_path / "other"), other, golden=tiny.tokens(3))
    (folder / "student.safetensors").write_bytes((tmp_path / "other/student.safetensors").read_bytes())
    sign(folder, "student.safetensors")
    with pytest.raises(ValueError, match="golden cells come out different by up to"):
        bundle.load(str(folder))


def test_writing_over_something_else_is_refused_and_leaves_it(tmp_path, model):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("keep")
    with pytest.raises(ValueError, match="is no bundle"):
        bundle.write(str(tmp_path / "notes"), model, golden=tiny.tokens(3))
    assert (tmp_path / "notes/a.txt").read_text() == "keep"
    assert len(list(tmp_path.iterdir())) == 1


def test_without_golden_cells_nothing_is_written(tmp_path, model):
    with pytest.raises(ValueError, match="golden"):
        bundle.write(str(tmp_path / "b"), model, golden=tiny.tokens(1).take(np.empty(0, np.int64)))
    assert not list(tmp_path.iterdir())


def test_any_file_system_will_do(model):
    url = "memory://bundles/tiny"
    try:
        digest = bundle.write(url, model, golden=tiny.tokens(3))
        assert bundle.write(url, model, golden=tiny.tokens(3)) == digest
        assert bundle.load(url).hash == digest
    finally:
        fsspec.filesystem("memory").rm("/bundles", recursive=True)


def test_the_card_tells_the_kinds_that_were_compared():
    kinds = [{"kind": "mlp", "parameters": 5, "cosine": 0.81234, "probes": {"label accuracy": 0.9}}]
    about = {"kinds": kinds, "chosen": "It is the cheapest."}
    text = bundle.card(about, width=16, genes=120, classes=2)
    assert "| kind | parameters | cosine | label accuracy |" in text
    assert "| mlp | 5 | 0.8123 | 0.9 |" in text
    assert "It is the cheapest." in text


def test_the_card_tells_data_donors_scores_and_limits(folder):
    text = (folder / "card.md").read_text()
    assert "| a | 200 | d1, d2 | human |" in text
    assert "Donors seen in training: d1." in text
    assert "| annotation | student | 0.9123 | ties |" in text
    assert "## Limits" in text
