"""Checkpoints: tensors in safetensors, facts and hashes in a manifest that is written last.

RUN/checkpoints/STAGE/STEP/state.safetensors, manifest.json     in the middle of a stage
RUN/checkpoints/STAGE/STEP/part-*.safetensors, manifest.json    one part a worker, where they share it out
RUN/stages/STAGE/model.safetensors, stage.json                  when it is done

A manifest holds the hash of every file and, in "sha256", that of all else it says: of a checkpoint
that was changed in any bit nothing is used. What is in it fixes the rest of the stage: model, optimizer,
averaged weights, the step (learning rate, batches and masks follow from it; nothing else is drawn at
random), and what the loop counts. Tensors are found by their names and are whole once they are read, so
any number of workers goes on from what any other number wrote, sharing parameters out or not.
"""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from cellray.data import storage
from cellray.train import workers
from cellray.train.averages import Averages
from cellray.train.parts import Part, joined
from cellray.train.rowwise import RowwiseAdamW, matched
from cellray.train.sharding import own, rows_of, shared_like

STATE, MANIFEST = "state.safetensors", "manifest.json"
Optimizer = torch.optim.Optimizer | RowwiseAdamW
"""Whose `state`, by parameter, is all that it keeps."""
KEEP = 2
"""Whole checkpoints of a stage that stay, unless told otherwise."""
PATIENCE = 5.0
"""Seconds that training waits, once, for a write that is still under way when the next is due."""
GRACE = 7.0
"""Seconds that a run that is told to stop waits for its last checkpoint."""


def snapshot(root: nn.Module, optimizer: Optimizer, averages: Averages | None = None) -> dict[str, Tensor]:
    """All tensors of model, optimizer and means as they are now, copied to the CPU's memory.

    Of tensors that are shared out, the rows of this worker; of others, all, on the first worker alone.
    """
    tensors = _weights(root, averages)
    for name, p in root.named_parameters():
        state = optimizer.state.get(p, {})
        tensors |= {f"optimizer.{name}.{part}": value for part, value in state.items()}
    return {
        name: own(value).detach().to("cpu", copy=True).contiguous()  # a view of itself would go on changing
        for name, value in tensors.items()
        if workers.rank() == 0 or own(value) is not value
    }


def _weights(root: nn.Module, averages: Averages | None) -> dict[str, Tensor]:
    """What a checkpoint holds of the model and its means, under its names. No copies."""
    means = averages.means if averages else {}
    return {f"model.{name}": value for name, value in root.state_dict().items()} | {
        f"ema.{name}": value for name, value in means.items()
    }


def save(
    folder: str,
    step: int,
    root: nn.Module,
    optimizer: Optimizer,
    about: Mapping[str, Any],
    *,
    keep: int = KEEP,
) -> None:
    """Write the checkpoint of `step`, then let all but the newest `keep` whole ones go."""
    write(folder, step, snapshot(root, optimizer), about, keep=keep)


def write(
    folder: str,
    step: int,
    tensors: dict[str, Tensor],
    about: Mapping[str, Any],
    *,
    keep: int = KEEP,
    part: Part | None = None,
) -> None:
    """`save` of a snapshot, or of one `part` of it: then the first worker waits for the parts of all.

    `about` holds the `key` of the work, and what JSON brings back unchanged.
    """
    data = to_bytes(tensors)
    digest, here = storage.sha256(data), _place(folder, step)
    storage.write_bytes(storage.join(here, part.name(digest) if part else STATE), data)
    if part and part.rank:
        return
    manifest = {**about, "step": step, "files": part.files(here) if part else {STATE: digest}}
    text = json.dumps({**manifest, "sha256": _hash(manifest)})
    storage.write_bytes(storage.join(here, MANIFEST), text.encode())
    with contextlib.suppress(OSError):  # what stays for now goes with the next
        _tidy(folder, step, keep)


def _hash(manifest: Mapping[str, Any]) -> str:
    """Hash of what a manifest says, without that hash."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return storage.sha256(json.dumps(said, sort_keys=True).encode())


def _tidy(folder: str, step: int, keep: int) -> None:
    """Let all go but the newest `keep` checkpoints up to `step` that were written to the end.

    One beyond `step` was passed over when the stage was gone on with, and never comes to use.
    """
    found = [s for s in steps(folder) if s <= step]
    whole = [s for s in found if storage.exists(_place(folder, s, MANIFEST))]
    for old in set(steps(folder)) - set(whole[-keep:]):
        # Without its manifest it is none, however far the rest gets.
        storage.remove_file(_place(folder, old, MANIFEST))
        storage.remove_folder(_place(folder, old))


def _place(folder: str, step: int, *parts: str) -> str:
    return storage.join(folder, f"{step:08d}", *parts)


def steps(folder: str) -> list[int]:
    """Steps of which a checkpoint was begun, rising."""
    return [int(name) for name in storage.names(folder) if re.fullmatch(r"\d{8}", name)]


def newest(
    folder: str, key: str, report: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and manifest of the newest whole checkpoint of the work `key`; `report` hears of bad ones.

    ConnectionError if a store cannot be reached: that says nothing about what is in it.
    """
    for step in reversed(steps(folder)):
        try:
            return read(folder, step, key)
        except FileNotFoundError as error:
            why = f"is not whole ({error.filename or error} is missing)"
        except ValueError as error:
            why = str(error)
        report(f"checkpoint {_place(folder, step)} {why}: passed over")
    return None


def read(folder: str, step: int, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and manifest of a checkpoint. ValueError or FileNotFoundError if it is not whole."""
    text = storage.read_bytes(_place(folder, step, MANIFEST))
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("has an unreadable manifest") from None
    if not isinstance(manifest, dict) or not {"step", "files", "key", "sha256"} <= manifest.keys():
        raise ValueError("has a manifest in which things are missing")
    if manifest["sha256"] != _hash(manifest) or manifest["step"] != step:
        raise ValueError("has a manifest that was changed")
    if manifest["key"] != key:
        raise ValueError("belongs to other settings")
    parts = []
    for name, digest in sorted(manifest["files"].items()):  # the order of the workers is that of the names
        try:
            parts.append(from_bytes(storage.read_verified(_place(folder, step, name), digest)))
        except ValueError as error:
            raise ValueError(f"was changed ({error})") from None
    return joined(parts), manifest


@torch.no_grad()
def restore(
    tensors: Mapping[str, Tensor],
    root: nn.Module,
    optimizer: Optimizer,
    averages: Averages | None = None,
) -> None:
    """Put the tensors of a checkpoint back, every one of them; of those shared out, this worker's rows."""
    weights = _weights(root, averages)
    parameters = dict(root.named_parameters())
    missing = weights.keys() - tensors.keys()
    assert not missing, f"a checkpoint lacks {sorted(missing)}"
    by_rows = optimizer.tables if isinstance(optimizer, RowwiseAdamW) else {}
    tables = [name for name, p in parameters.items() if id(p) in by_rows]
    tensors = matched(tensors, tables, optimizer.param_groups[0])
    optimizer.state.clear()
    for name, tensor in tensors.items():
        if name in weights:
            own(weights[name]).copy_(rows_of(tensor, weights[name]))
            continue
        place, _, part = name.removeprefix("optimizer.").rpartition(".")
        p = parameters[place]
        like = p if tensor.shape == p.shape else tensor  # what is one number a parameter is not shared out
        rows = rows_of(tensor, like).to(p.device, copy=True)
        optimizer.state[p][part] = shared_like(rows, like)


class Saver:
    """Writes checkpoints of one stage while training goes on; use as a context manager.

    `save` copies what is to be saved and returns; a thread writes it. A store that fails does not end
    the training: `events` tells of it, and the next `save` tries again. Where parameters are shared out
    every worker writes its `part`, and all of them have to save the same steps.
    """

    def __init__(self, folder: str, keep: int, part: Part | None = None) -> None:
        self.folder, self.keep, self.part = folder, keep, part
        self._thread: threading.Thread | None = None
        self._step = 0
        self._waited = False
        self._error: BaseException | None = None
        self._told: list[dict[str, Any]] = []

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A write that hangs is given up by the storage in the end; who was interrupted has no time for that.
        self._join(None if kind is None else GRACE)

    def ready(self) -> bool:
        """Whether nothing is being written any more; that is waited for, up to PATIENCE and once."""
        if self._join(0.0 if self._waited else PATIENCE):
            return True
        if not self._waited:
            self._warn(f"checkpoint of step {self._step} is still being written; training goes on")
        self._waited = True
        return False

    def save(
        self,
        step: int,
        root: nn.Module,
        optimizer: Optimizer,
        about: Mapping[str, Any],
        averages: Averages | None = None,
    ) -> None:
        """Begin to write the checkpoint of `step`; the one before is waited for, up to PATIENCE.

        Where that is not written by then, as a store hangs, this one is left out.
        """
        if self.ready():
            tensors = snapshot(root, optimizer, averages)
            # As text: what it was made of goes on changing.
            self._begin(step, tensors, json.loads(json.dumps(about)))

    def last(
        self,
        step: int,
        root: nn.Module,
        optimizer: Optimizer,
        about: Mapping[str, Any],
        averages: Averages | None = None,
    ) -> None:
        """Write the checkpoint of `step` and wait for it, GRACE in all: the process is about to end."""
        until = time.monotonic() + GRACE
        if self._join(GRACE / 2):
            self._begin(step, snapshot(root, optimizer, averages), about)
            if self._join(until - time.monotonic()):
                return
        self._warn(f"checkpoint of step {step} could not be written in time: an older one will be used")

    def events(self) -> list[dict[str, Any]]:
        """What is to be told since the last call: `saved` steps, `warning` texts."""
        self._join(0.0)
        told, self._told = self._told, []
        return told

    def _begin(self, step: int, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> None:
        self._step, self._waited = step, False

        def work() -> None:
            try:
                write(self.folder, step, tensors, about, keep=self.keep, part=self.part)
            except BaseException as error:  # it is raised, or told of, in the thread that asks
                self._error = error

        # A daemon: a write that hangs must not keep a process that was told to end.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def _join(self, seconds: float | None) -> bool:
        """Wait for the write under way; whether there is none any more. Raises what is no store's fault."""
        if self._thread is None:
            return True
        self._thread.join(seconds)
        if self._thread.is_alive():
            return False
        self._thread = None
        error, self._error = self._error, None
        if error is None:
            self._told.append({"saved": self._step})
        elif isinstance(error, OSError):
            self._warn(f"checkpoint of step {self._step} could not be written ({error}); training goes on")
        else:
            raise error
        return True

    def _warn(self, text: str) -> None:
        self._told.append({"warning": text})


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
