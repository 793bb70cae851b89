"""The front that every `python -m pipelines.<name> RECIPE [key=value …]` has in common.

It parses before anything heavy is imported, so that `--help` is quick; a command imports Ray and torch
inside the function it hands to `main`.
"""

import argparse
import ast
import inspect
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cellray import cluster
from cellray.data import storage
from cellray.train import recipe as recipes
from cellray.train.progress import Mode
from cellray.train.recipe import Recipe

INDENT = 36
"""Column where the documentation of settings begins in the help."""

EPILOG = """\
RECIPE is a function that returns a recipe, as in pipelines.recipes.demo:recipe. Settings after it change
it: key=value, or @FILE for a JSON object of such, as a sweep writes it; key=value wins over a file.
`RECIPE --help` shows the recipe's own values."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says beside the recipe."""

    dry_run: bool = False
    """Say what would be done and what it would cost; do nothing."""
    progress: Mode = "auto"
    """How progress is shown."""


def main(
    description: str, run: Callable[[Recipe, Options], int | None], argv: Sequence[str] | None = None
) -> int:
    """Exit code of `run` on the recipe and options that the command line gives.

    Use it as `sys.exit(main("What it does.", run))`.
    """

    def work() -> int | None:
        recipe, options = parse(description, sys.argv[1:] if argv is None else argv)
        return run(recipe, options)

    return exit_code(work)


def exit_code(work: Callable[[], int | None]) -> int:
    """Exit code of `work`, which may import Ray.

    A ValueError becomes one line on the error stream and 2, an interrupt from the keyboard 130.
    """
    try:
        cluster.prepare()
        return work() or 0
    except ValueError as error:
        # An error from a Ray task is of both types; its cause is the bare message.
        print(f"error: {getattr(error, 'cause', None) or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(description: str, argv: Sequence[str]) -> tuple[Recipe, Options]:
    """The recipe with its changes, and the options. Leaves by SystemExit after `--help`."""
    parser = argparse.ArgumentParser(
        prog=_program(),
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="module:function")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings that change the recipe")
    parser.add_argument("-h", "--help", action="store_true", help="show this, with all settings")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; do nothing")
    add_progress(parser)
    args = parser.parse_intermixed_args(argv)
    if args.recipe is None and not args.help:
        parser.error("RECIPE is missing, as in pipelines.recipes.demo:recipe")
    recipe = Recipe() if args.recipe is None else recipes.load(args.recipe)
    recipe = recipes.override(recipe, changes(args.settings))
    if args.help:
        print(parser.format_help() + "\n" + describe(recipe, shutil.get_terminal_size().columns))
        raise SystemExit(0)
    return recipe, Options(dry_run=args.dry_run, progress=progress_mode(args))


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Add --plain and --quiet; `progress_mode` says which was given."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--plain", action="store_true", help="progress as plain lines, in a terminal too")
    how.add_argument("--quiet", action="store_true", help="no progress")


def progress_mode(args: argparse.Namespace) -> Mode:
    return "plain" if args.plain else "quiet" if args.quiet else "auto"


def changes(words: Sequence[str]) -> dict[str, Any]:
    """`["@best.json", "optim.lr=1e-4"]` as one mapping; what is written out wins over what is in a file."""
    found: dict[str, Any] = {}
    for word in words:
        if word.startswith("@"):
            found |= _read(word[1:])
    return found | recipes.settings([word for word in words if not word.startswith("@")])


def _read(url: str) -> dict[str, Any]:
    try:
        data = json.loads(storage.read_bytes(url))
    except FileNotFoundError:
        raise ValueError(f"@{url}: there is no such file") from None
    except ValueError as error:
        raise ValueError(f"@{url} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(
            f'@{url} holds a {type(data).__name__}; settings are an object: {{"optim.lr": 1e-4}}'
        )
    return data


def describe(recipe: Any, columns: int) -> str:
    """Every setting of a recipe, or of any dataclass like it, with its value and its documentation."""
    groups: dict[str, list[str]] = {"": ["settings:"]}
    docs: dict[type, dict[str, str]] = {}
    for key, value in recipes.describe(recipe):
        group, holder = _holder(recipe, key)
        if type(holder) not in docs:
            docs[type(holder)] = _docs(type(holder))
        about = (inspect.getdoc(type(holder)) or "").partition("\n")[0]
        lines = groups.setdefault(group, ["", f"  {group}: {about}"])
        setting = f"  {key}={_spell(value)}"
        if len(setting) > INDENT - 2:
            lines.append(setting)
            setting = ""
        text = f"{setting:{INDENT}}{docs[type(holder)].get(key.rpartition('.')[2], '')}"
        lines += textwrap.wrap(text, max(columns - 1, 60), subsequent_indent=" " * INDENT)
    return "\n".join(line for lines in groups.values() for line in lines)


def _holder(recipe: Any, key: str) -> tuple[str, Any]:
    """The group that a setting stands in, and the dataclass."""
    node: Any = recipe
    *path, _ = key.split(".")
    for name in path:
        if isinstance(node, tuple):
            node = next(item for item in node if item.name == name)
        else:
            node = getattr(node, name)
    return ".".join(path), node


def _docs(kind: type) -> dict[str, str]:
    """Field -> the string that stands below it in the source; Python itself drops it."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _spell(value: Any) -> str:
    """A value as it would be written after `key=`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return json.dumps(dict(value))
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _program() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name}" if spec else os.path.basename(sys.argv[0])
