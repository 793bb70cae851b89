"""Checkpoints: tensors in safetensors, facts and hashes in a manifest that is written last.

RUN/checkpoints/STAGE/STEP/state.safetensors, manifest.json     in the middle of a stage
RUN/stages/STAGE/model.safetensors, stage.json                  when it is done
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from cellray.data import storage

KEEP = 2
"""Whole checkpoints of a stage that stay."""


def save(
    folder: str, step: int, root: nn.Module, optimizer: torch.optim.Optimizer, about: Mapping[str, Any]
) -> None:
    """Write the checkpoint of `step`, then let old ones go."""
    tensors = {f"model.{name}": value for name, value in root.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    data = to_bytes({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    here = storage.join(folder, f"{step:08d}")
    storage.write_bytes(storage.join(here, "state.safetensors"), data)
    manifest = {"step": step, "sha256": storage.sha256(data), **about}
    storage.write_bytes(storage.join(here, "manifest.json"), json.dumps(manifest).encode())
    for old in steps(folder)[:-KEEP]:
        remove(storage.join(folder, f"{old:08d}"))


def steps(folder: str) -> list[int]:
    """Steps of which a checkpoint was begun, rising."""
    fs, path = storage.locate(folder)
    if not fs.isdir(path):
        return []
    names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)]
    return sorted(int(name) for name in names if re.fullmatch(r"\d{8}", name))


def newest(
    folder: str, key: str, report: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and manifest of the newest whole checkpoint of the work `key`; `report` hears of bad ones."""
    for step in reversed(steps(folder)):
        here = storage.join(folder, f"{step:08d}")
        try:
            manifest = json.loads(storage.read_bytes(storage.join(here, "manifest.json")))
            data = storage.read_bytes(storage.join(here, "state.safetensors"))
        except FileNotFoundError as error:
            report(f"checkpoint {here} is not whole ({error.filename or error} is missing): passed over")
            continue
        except ValueError:
            report(f"checkpoint {here} has an unreadable manifest: passed over")
            continue
        if storage.sha256(data) != manifest.get("sha256"):
            report(f"checkpoint {here} does not have the hash in its manifest: passed over")
        elif manifest.get("key") != key:
            report(f"checkpoint {here} belongs to other settings: passed over")
        else:
            return from_bytes(data), manifest
    return None


def restore(tensors: Mapping[str, Tensor], root: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the tensors of a checkpoint back, every one of them."""
    model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    root.load_state_dict(model, strict=True)
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, part = name.split(".", 2)
            found.setdefault(int(index), {})[part] = tensor
    state = optimizer.state_dict()
    optimizer.load_state_dict({"state": found, "param_groups": state["param_groups"]})


def commit(folder: str, root: nn.Module, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write what a stage came to: its model, then `stage.json` with the model's hash."""
    data = to_bytes({name: value.detach().cpu().contiguous() for name, value in root.state_dict().items()})
    storage.write_bytes(storage.join(folder, "model.safetensors"), data)
    facts = {**about, "sha256": storage.sha256(data)}
    storage.write_bytes(storage.join(folder, "stage.json"), json.dumps(facts, indent=1).encode())
    return facts


def committed(folder: str) -> dict[str, Any] | None:
    """Facts of a finished stage, None if it has not finished."""
    try:
        facts: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder, "stage.json")))
    except FileNotFoundError:
        return None
    return facts


def load(folder: str, root: nn.Module) -> dict[str, Any]:
    """Load the model of a finished stage into `root`, strictly. ValueError if it is not whole."""
    facts = committed(folder)
    if facts is None:
        raise ValueError(
            f"{folder} holds no finished stage: run `python -m pipelines.pretrain` with this run first"
        )
    data = storage.read_bytes(storage.join(folder, "model.safetensors"))
    if storage.sha256(data) != facts["sha256"]:
        raise ValueError(
            f"{folder}/model.safetensors has sha256 {storage.sha256(data)[:16]}…, stage.json says "
            f"{facts['sha256'][:16]}…: the file was changed. Delete {folder} and run the stage again."
        )
    root.load_state_dict(from_bytes(data), strict=True)
    return facts


def remove(folder: str) -> None:
    """Delete a folder, if it is there."""
    fs, path = storage.locate(folder)
    if fs.exists(path):
        fs.rm(path, recursive=True)
