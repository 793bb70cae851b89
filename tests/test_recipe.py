import json
import math
from dataclasses import FrozenInstanceError, replace

import pytest

from cellray.train.limits import LIMITS
from cellray.train.recipe import (
    LAUNCH,
    DataSet,
    Network,
    Optim,
    Recipe,
    Split,
    describe,
    fingerprint,
    from_json,
    load,
    override,
    settings,
    to_json,
)


def recipe():
    return Recipe(optim=Optim(lr=0.5))


def not_a_recipe():
    return {"lr": 1}


def test_a_recipe_is_loaded_by_its_path():
    assert load(f"{__name__}:recipe") == recipe()


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("pipelines.recipes.demo", "write module:function"),
        (":recipe", "write module:function"),
        ("nowhere.at.all:recipe", "there is no module 'nowhere'"),
        (f"{__name__}:missing", "has no function 'missing'"),
        (f"{__name__}:not_a_recipe", "returned dict, not a Recipe"),
    ],
)
def test_what_is_no_recipe_is_refused(path, says):
    with pytest.raises(ValueError, match=says):
        load(path)


def test_an_error_within_a_recipe_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "broken_recipe.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load("broken_recipe:recipe")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "7", 7),
        ("optim.lr", "1e-4", 1e-4),
        ("optim.lr", "1", 1.0),
        ("gpu", "true", True),
        ("gpu", "False", False),
        ("precision", "bf16", "bf16"),
        ("run", "s3://bucket/run", "s3://bucket/run"),
        ("unimodal.mask", "0.1,0.5", (0.1, 0.5)),
        ("ingest.drop_labels", "Mis", ("Mis",)),
        ("ingest.drop_labels", "Mis,Doublet", ("Mis", "Doublet")),
        ("ingest.drop_labels", "", ()),
        ("notes", '{"why": "a test"}', {"why": "a test"}),
        ("modalities.atac.context", "64", 64),
        ("dataset.label", "cell type=1", "cell type=1"),
        ("student.kinds", "mlp,transformer", ("mlp", "transformer")),
    ],
)
def test_text_and_typed_values_set_the_same(key, text, value):
    changed = override(recipe(), {key: text})
    assert dict(describe(changed))[key] == value
    assert override(recipe(), {key: value}) == changed
    assert override(recipe(), {key: json.loads(json.dumps(value))}) == changed


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("optim.warm_up", "1", "'warm_up' is none of lr, .* Did you mean 'warmup'"),
        ("optimizer.lr", "1", "there is no setting 'optimizer.lr'"),
        ("seed", "1.5", "expected a whole number"),
        ("seed", True, "expected a whole number"),
        ("seed", "", "expected a whole number"),
        ("optim.lr", "fast", "expected a number"),
        ("optim.lr", "nan", "expected a number"),
        ("optim.lr", "inf", "expected a number"),
        ("gpu", "yes", "expected true or false"),
        ("run", 3, "expected text"),
        ("precision", "fp8", "expected one of .*fp32, bf16"),
        ("unimodal.mask", "0.1", "expected values with commas"),
        ("unimodal.mask", "0.1,0.2,0.3", "expected values with commas"),
        ("optim", "1", "is a group of settings: lr"),
        ("modalities", "rna", "is a group of settings: rna, "),
        ("seed.x", "1", "is a plain setting"),
        ("modalities.rnaa.context", "1", "Did you mean 'rna'"),
        ("modalities.rna", "1", "set one of its fields"),
        ("optim.lr", "5", "optim.lr is 5.0; it must lie between"),
        ("workers", "0", "workers is 0"),
    ],
)
def test_a_wrong_setting_is_refused(key, value, says):
    with pytest.raises(ValueError, match=says):
        override(recipe(), {key: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"network.heads": 3, "network.width": 96},
        {"score.student": "transformer", "student.kinds": "mlp,transformer"},
        {"modalities.rna.context": 64, "modalities.atac.context": 32, "seed": 5},
    ],
)
def test_settings_that_need_each_other_are_set_in_any_order(changes):
    found = override(Recipe(), changes)
    assert found == override(Recipe(), dict(reversed(changes.items()))) != Recipe()
    kept = {key: value for key, value in describe(found) if dict(describe(Recipe()))[key] != value}
    assert set(kept) == set(changes)


def test_a_whole_number_keeps_every_digit():
    for value in ((1 << 60) + 1, str((1 << 60) + 1)):
        assert override(recipe(), {"seed": value}).seed == (1 << 60) + 1
    assert override(recipe(), {"cache_bytes": "1e9"}).cache_bytes == 10**9
    assert override(recipe(), {"seed": 3.0}).seed == 3


def test_an_override_leaves_the_original_alone():
    original = recipe()
    override(original, {"optim.lr": "0.1"})
    assert original == recipe()
    with pytest.raises(FrozenInstanceError):
        original.seed = 1


def test_settings_split_at_the_first_equals_sign():
    assert settings(["a.b=1", "dataset.assay==10x"]) == {"a.b": "1", "dataset.assay": "=10x"}


@pytest.mark.parametrize("args", [["seed"], ["=1"], ["seed=1", "seed=2"]])
def test_what_is_no_setting_is_refused(args):
    with pytest.raises(ValueError, match=r"no setting|set twice"):
        settings(args)


def test_json_gives_the_recipe_back():
    changed = override(
        recipe(),
        {
            "unimodal.mask": "0.1,0.2",
            "ingest.drop_labels": "a,b",
            "notes": '{"a": "b"}',
            "modalities.rna.context": 9,
        },
    )
    text = json.dumps(to_json(changed))
    assert from_json(json.loads(text)) == changed


def test_the_fingerprint_follows_what_decides_the_outcome():
    same = replace(recipe(), run="elsewhere", workers=7, notes={"a": "b"})
    assert fingerprint(same) == fingerprint(recipe())
    others: list[dict[str, object]] = [
        {"seed": 1},
        {"optim.lr": 0.1},
        {"dataset.rna": "x"},
        {"modalities.rna.context": 3},
    ]
    for changes in others:
        assert fingerprint(override(recipe(), changes)) != fingerprint(recipe())


def test_launch_names_settings_that_exist():
    assert set(LAUNCH) <= {key.partition(".")[0] for key, _ in describe(recipe())}


def test_describe_names_every_setting_that_can_be_set():
    found = dict(describe(recipe()))
    assert {"optim.lr", "modalities.protein.context", "run", "dataset.rna"} <= set(found)
    for key, value in found.items():
        assert override(recipe(), {key: value}) == recipe(), key


def test_checks_are_made_wherever_a_value_comes_from():
    with pytest.raises(ValueError, match="no multiple"):
        Recipe(network=Network(width=10, heads=4))
    with pytest.raises(ValueError, match=r"split\.fraction"):
        Recipe(split=Split(fraction=0))
    with pytest.raises(ValueError, match=r"student\.kinds is 'mlp,mlp'"):
        override(recipe(), {"student.kinds": "mlp,mlp"})
    with pytest.raises(ValueError, match=r"expected values with commas|expected one of"):
        override(recipe(), {"student.kinds": "forest"})
    with pytest.raises(ValueError, match=r"64 is no multiple of student\.heads 5"):
        override(recipe(), {"student.kinds": "mlp,transformer", "student.heads": 5})
    with pytest.raises(ValueError, match=r"score\.student is 'transformer', but student\.kinds"):
        override(recipe(), {"score.student": "transformer"})
    for wrong in ({"student.kinds": "transformer"}, {"score.student": "mlp"}):
        with pytest.raises(ValueError, match="method=reference has one kind of student"):
            override(recipe(), {"method": "reference", **wrong})
    with pytest.raises(ValueError, match="'rna' among them"):
        Recipe(modalities=())
    with pytest.raises(TypeError):
        DataSet("positional")  # type: ignore[call-arg]


def test_every_number_of_a_recipe_has_limits_and_its_own_lies_within():
    kept = {
        key
        for key, value in describe(Recipe())
        for first in (value[:1] if isinstance(value, tuple) else (value,))
        if isinstance(first, int | float) and not isinstance(first, bool)
    }
    assert {key for key in kept if not key.startswith(("qc.", "modalities."))} == set(LIMITS)


@pytest.mark.parametrize("key", LIMITS)
def test_a_number_beyond_its_limits_is_refused(key):
    low, high = LIMITS[key]
    before = dict(describe(Recipe()))[key]
    for number in (low - 1, high + 1):
        if math.isfinite(number):
            value = (type(before[0])(number),) * 2 if isinstance(before, tuple) else type(before)(number)
            with pytest.raises(ValueError, match=rf"{key} is .*; it must lie between"):
                override(Recipe(), {key: value})
