"""An environment of its own for each competitor, made when it is first needed, versions pinned."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.harness.rounds import ROOT


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What is installed for one competitor, on top of which this repository's constraints hold."""

    name: str
    packages: tuple[str, ...]
    python: tuple[int, int] = (3, 11)
    """The oldest Python that it runs on."""


def python_of(environment: Environment, folder: Path, *, make: bool) -> str | None:
    """The interpreter of `environment` below `folder`; None if it is not there and not to be made.

    ValueError where it cannot be made, with the end of what was said.
    """
    constraints = ROOT / "constraints.txt"
    key = repr((environment, constraints.read_text()))
    home = folder / f"{environment.name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    python = home / "bin" / "python"
    if (home / "made").exists():
        return str(python)
    if not make:
        return None
    shutil.rmtree(home, ignore_errors=True)
    _run([_interpreter(environment), "-m", "venv", str(home)], environment)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "-c", str(constraints), *environment.packages], environment)
    (home / "made").touch()
    return str(python)


def _interpreter(environment: Environment) -> str:
    """This Python if it is new enough, else one on PATH or of pyenv."""
    if sys.version_info[:2] >= environment.python:
        return sys.executable
    names = [f"python3.{minor}" for minor in range(environment.python[1], environment.python[1] + 3)]
    found = [path for name in names if (path := shutil.which(name))]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found += [str(path) for name in names for path in sorted(pyenv.glob(f"*/bin/{name}"))]
    for path in found:
        # A shim of pyenv may stand on PATH for a version that is not switched on.
        if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    wanted = ".".join(map(str, environment.python))
    raise ValueError(f"{environment.name} needs Python {wanted} or newer; put one on PATH")


def _run(command: Sequence[str], environment: Environment) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-600:]
        raise ValueError(f"the environment for {environment.name} cannot be made: {said}")
