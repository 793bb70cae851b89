import json
import subprocess
import sys
from dataclasses import replace

import pytest

from cellray.train.recipe import Optim, Recipe, describe
from pipelines import command
from pipelines.command import Options


def recipe():
    return Recipe(optim=Optim(lr=0.5))


RECIPE = f"{__name__}:recipe"


def outcome(*argv):
    """Exit code, and what the command was given."""
    seen = []
    code = command.main("Do it.", lambda *given: seen.append(given), argv)
    return code, *seen


def test_settings_change_the_recipe():
    code, (given, options) = outcome(RECIPE, "optim.warmup=0.5", "run=here")
    assert code == 0
    assert given == replace(recipe(), optim=Optim(lr=0.5, warmup=0.5), run="here")
    assert options == Options()


def test_options_may_stand_anywhere():
    for argv in [
        ("--dry-run", RECIPE, "seed=1"),
        (RECIPE, "--dry-run", "seed=1"),
        (RECIPE, "seed=1", "--dry-run"),
    ]:
        _, (given, options) = outcome(*argv)
        assert given.seed == 1
        assert options.dry_run


@pytest.mark.parametrize(("flag", "mode"), [("--plain", "plain"), ("--quiet", "quiet")])
def test_progress_is_chosen_by_a_flag(flag, mode):
    _, (_, options) = outcome(RECIPE, flag)
    assert options.progress == mode


def test_a_file_of_settings_is_applied_and_the_command_line_wins(tmp_path):
    best = tmp_path / "best.json"
    best.write_text(json.dumps({"optim.lr": 0.25, "seed": 3, "unimodal.mask": [0.1, 0.2]}))
    _, (given, _) = outcome(RECIPE, "seed=4", f"@{best}")
    assert (given.optim.lr, given.seed, given.unimodal.mask) == (0.25, 4, (0.1, 0.2))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([RECIPE, "optim.rate=1"], "there is no setting 'optim.rate'"),
        ([RECIPE, "seed=x"], "seed='x': expected a whole number"),
        ([RECIPE, "seed"], "'seed' is no setting: write key=value"),
        ([RECIPE, "@nowhere.json"], "@nowhere.json: there is no such file"),
        (["pipelines.recipes.nowhere:recipe"], "there is no module 'pipelines.recipes.nowhere'"),
        ([f"{__name__}:nothing"], "has no function 'nothing'"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(argv, says, capsys):
    assert outcome(*argv) == (2,)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert says in lines[0]


@pytest.mark.parametrize("text", ["[1]", "{", "3"])
def test_a_file_that_holds_no_settings_is_refused(text, tmp_path, capsys):
    best = tmp_path / "best.json"
    best.write_text(text)
    assert outcome(RECIPE, f"@{best}") == (2,)
    assert str(best) in capsys.readouterr().err


def test_errors_of_the_command_are_shown_the_same_way(capsys):
    def fail(recipe, options):
        raise ValueError("atlas.csv, line 3: no file x.h5ad")

    assert command.main("Do it.", fail, [RECIPE]) == 2
    assert capsys.readouterr().err == "error: atlas.csv, line 3: no file x.h5ad\n"


def test_an_interrupt_is_130(capsys):
    def interrupted(recipe, options):
        raise KeyboardInterrupt

    assert command.main("Do it.", interrupted, [RECIPE]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_exit_code_is_handed_on():
    assert command.main("Do it.", lambda recipe, options: 3, [RECIPE]) == 3


def test_without_a_recipe_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as stopped:
        outcome()
    assert stopped.value.code == 2
    assert "RECIPE is missing" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["60", "80", "140"])
def test_help_lists_every_setting_with_its_documentation(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stopped:
        outcome(RECIPE, "seed=7", "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for key, _ in describe(recipe()):
        assert f"  {key}=" in text
    assert "optim.lr=0.5 " in text
    assert "seed=7 " in text
    assert "Peak learning rate." in text
    settings = text.partition("\nsettings:")[2].splitlines()
    assert not [line for line in settings if line.startswith(" " * 60)]


def test_every_setting_is_documented():
    groups = (
        "ingest",
        "split",
        "feed",
        "network",
        "student",
        "optim",
        "unimodal",
        "joint",
        "distil",
        "score",
    )
    for key, _ in describe(recipe()):
        _, holder = command._holder(recipe(), key)
        assert key in groups or command._docs(type(holder)).get(key.rpartition(".")[2]), key


def test_help_comes_before_anything_heavy_is_imported(root):
    code = (
        "import sys\nfrom pipelines import command\n"
        "try: command.main('Do it.', print, ['--help'])\n"
        "finally: assert not {'ray', 'torch', 'pandas', 'pyarrow', 'sklearn'} & set(sys.modules)"
    )
    environment = {"PYTHONPATH": f"{root / 'platform'}:{root}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
