"""What holds for the repository as a whole."""

import ast
import importlib
import inspect
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cellray.train import recipe as recipes

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "platform" / "cellray"
APPLICATIONS = ("pipelines", "serve", "tune")
RAY = {"cluster.py", "data/ingest.py", "data/work.py", "train/loop.py"}
"""The files of the library that may import Ray."""
LIGHT = {"client.py", "cluster.py", "train/progress.py", "train/recipe.py"}
"""Files outside of data/ that must not import torch: a command parses before torch is loaded."""
UNSAFE = {
    "pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib",
}  # fmt: skip
"""Modules that run what they read."""


def sources(*folders):
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def imported(path):
    """(line, dotted name) of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute here"
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imports_of(path, *names):
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imported(path)
        if any(name == banned or name.startswith(f"{banned}.") for banned in names)
    ]


def modules(*folders):
    """Dotted names of every module."""
    for path in sources(*folders):
        base = LIBRARY.parent if path.is_relative_to(LIBRARY) else ROOT
        parts = path.relative_to(base).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tracked():
    """Files that are, or would be, in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git repository")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def python(*args, cwd=ROOT, **environment):
    path = os.pathsep.join([str(LIBRARY.parent), str(ROOT)])
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_platform_is_the_standard_librarys():
    assert not (ROOT / "platform" / "__init__.py").exists()
    done = python("-c", "import platform; print(platform.__file__, platform.system())", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert not done.stdout.startswith(str(ROOT))


def test_no_application_module_is_named_like_one_of_the_standard_library():
    names = [path for path in sources(*APPLICATIONS) if path.stem in sys.stdlib_module_names]
    names += [name for name in APPLICATIONS if name in sys.stdlib_module_names]
    assert not names


def test_the_library_imports_no_application():
    assert not [hit for path in sources(LIBRARY) for hit in imports_of(path, *APPLICATIONS, "tests")]


def test_the_endpoint_imports_no_training_application():
    assert not [hit for path in sources("serve") for hit in imports_of(path, "pipelines", "tune", "tests")]


def test_applications_import_no_tests():
    assert not [hit for path in sources(*APPLICATIONS) for hit in imports_of(path, "tests")]


def test_few_files_of_the_library_import_ray():
    others = [path for path in sources(LIBRARY) if path.relative_to(LIBRARY).as_posix() not in RAY]
    assert not [hit for path in others for hit in imports_of(path, "ray")]


def test_data_and_what_help_needs_do_not_import_torch():
    light = [path for path in sources(LIBRARY) if path.relative_to(LIBRARY).as_posix() in LIGHT]
    assert not [hit for path in [*sources(LIBRARY / "data"), *light] for hit in imports_of(path, "torch")]


@pytest.mark.parametrize(
    ("banned", "chosen"),
    [
        (
            ["ray", "torch"],
            lambda name: (
                name.startswith("cellray.data") and name not in ("cellray.data.ingest", "cellray.data.work")
            ),
        ),
        (
            ["ray", "torch._dynamo"],
            lambda name: name.partition(".")[2] in ("answers", "bundle", "cli", "client", "embedder"),
        ),
        (["ray"], lambda name: name.startswith(("cellray.model", "cellray.tasks"))),
    ],
    ids=["data", "laptop", "model"],
)
def test_what_a_module_pulls_in_is_as_light_as_it_is_itself(banned, chosen):
    names = [name for name in modules(LIBRARY) if chosen(name)]
    code = f"import sys, {', '.join(names)}; print([name for name in {banned} if name in sys.modules])"
    done = python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_nothing_happens_on_import(tmp_path):
    names = [*modules(LIBRARY, *APPLICATIONS)]
    code = f"""
import importlib, json, os, sys, threading
before = dict(os.environ)
for name in {names}:
    importlib.import_module(name)
ray = sys.modules.get("ray")
print(json.dumps({{
    "ray": bool(ray and ray.is_initialized()),
    "threads": [t.name for t in threading.enumerate() if t is not threading.main_thread()],
    "files": [str(path) for path in __import__("pathlib").Path.cwd().rglob("*")],
}}))
"""
    done = python("-c", code, cwd=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "something printed while it was imported"
    assert json.loads(done.stdout) == {"ray": False, "threads": [], "files": []}


def test_nothing_that_is_read_can_run_code():
    hits = []
    for path in sources(LIBRARY, *APPLICATIONS):
        hits += imports_of(path, *UNSAFE)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (
                called in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
                or given.get("allow_pickle", "False") != "False"
                or (called == "torch.load" and given.get("weights_only") != "True")
            ):
                hits.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {ast.unparse(node)}")
    assert not hits


def recipe_paths():
    for path in sorted((ROOT / "pipelines" / "recipes").glob("[a-z]*.py")):
        module = importlib.import_module(f"pipelines.recipes.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                yield f"{module.__name__}:{name}"


def test_every_recipe_gives_a_recipe():
    paths = list(recipe_paths())
    assert {f"pipelines.recipes.{name}:recipe" for name in ("tiny", "demo", "small")} <= set(paths)
    for path in paths:
        recipe = recipes.load(path)
        assert recipes.from_json(json.loads(json.dumps(recipes.to_json(recipe)))) == recipe


def commands():
    """Modules that are run with `python -m`."""
    for path in sources("pipelines", "tune"):
        if 'if __name__ == "__main__":' in path.read_text():
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("module", [*commands(), "cellray.cli"])
def test_help_is_quick_and_says_how_to_call(module):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python("-m", module, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2, "seconds of CPU"


def code_in(markdown):
    """What stands in code spans and code blocks of a Markdown text."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", markdown, flags=re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S))
    return "\n".join([*blocks, *spans])


def test_what_the_readme_tells_to_run_exists():
    text = code_in((ROOT / "README.md").read_text())
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", text)) <= targets
    known = set(modules(LIBRARY, *APPLICATIONS, "tests"))
    named = set(re.findall(r"python -m ((?:cellray|pipelines|serve|tune|tests)[\w.]*\w)", text))
    assert named <= known
    for path in re.findall(r"pipelines\.recipes\.\w+:\w+", text):
        recipes.load(path)


def test_continuous_integration_runs_the_tests_of_the_readme():
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), flags=re.M)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_no_file_names_a_path_of_one_machine():
    place = re.compile(rb"(?:^|[^A-Za-z0-9_.])/(?:work|farm|root|home|Users|tmp/w)/", flags=re.M)
    hits = [str(path) for path in tracked() if place.search(path.read_bytes())]
    assert not hits


def test_everything_that_is_installed_has_an_exact_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    assert "torch==2.13.0" in pins
    names = {re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    bare = {re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower() for requirement in wanted}  # type: ignore[index]
    assert not bare - names - {"cellray"}
