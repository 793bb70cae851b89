"""Where the rows of a training run go: RUN/metrics.jsonl, TensorBoard, MLflow, Weights & Biases.

RUN/metrics.jsonl              one JSON object a row, `meters.py` says of what; only ever added to, except:
RUN/tensorboard/STAGE/         event files, one more each time the stage is begun or resumed
RUN/trackers/                  which MLflow or W&B run a stage has, so that it is continued

A stage that is resumed repeats the steps since its checkpoint. Their rows are taken out of metrics.jsonl
(and with them a last line that a kill tore) before it goes on; TensorBoard hides them by the mark that a
new event file begins with; MLflow and W&B keep the first. So no step is there twice.

Objects in a bucket cannot be added to: there files are written on the worker's own disk, and put to RUN
whole, now and then and at the end of a stage. A node that dies takes its last rows with it.
"""

import contextlib
import importlib.util
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from fsspec.implementations.local import LocalFileSystem

from cellray import cluster
from cellray.data import storage
from cellray.train import workers
from cellray.train.recipe import to_json
from cellray.train.run import Run

FILE = "metrics.jsonl"
NEEDS = {
    "tensorboard": ("tensorboardX", "cluster"),
    "mlflow": ("mlflow", "mlflow"),
    "wandb": ("wandb", "wandb"),
}
"""Tracker -> the package it needs, and the extra that brings it."""
UPLOAD_SECONDS = 30.0
"""Least time between two uploads; they also take no more than a twentieth of the time."""

Row = Mapping[str, float | str | None]


class Tracker(Protocol):
    """What gets the rows of one stage, in the order of their steps."""

    def log(self, step: int, row: Row) -> None:
        """Keep a row; `step` counts finished steps of the stage."""
        ...

    def close(self) -> None:
        """No row follows, whether the stage was finished or stopped."""
        ...


def check(names: Sequence[str]) -> None:
    """ValueError if a tracker's package is not installed."""
    for name in names:
        package, extra = NEEDS.get(name, ("", ""))
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"track={','.join(names)}: {name} needs the package {package}: pip install cellray[{extra}], "
                f"or leave {name} out"
            )


@contextlib.contextmanager
def tracked(
    run: Run, stage: str, first: int, warn: Callable[[str], None]
) -> Iterator[Callable[[int, Row], None]]:
    """What to call with each row of a stage that begins, or goes on, after `first` steps.

    The first worker's rows alone are kept. `warn` hears of uploads that failed; they are tried again.
    """
    if workers.rank() != 0:
        yield lambda step, row: None
        return
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(Folder(run.url, warn))
        trackers: list[Tracker] = []
        for name in run.recipe.track:
            trackers.append(_opened(name, run, stage, first, folder))
            stack.callback(trackers[-1].close)

        def log(step: int, row: Row) -> None:
            for tracker in trackers:
                tracker.log(step, row)
            folder.sync()

        yield log


def _opened(name: str, run: Run, stage: str, first: int, folder: "Folder") -> Tracker:
    if name == "jsonl":
        return Jsonl(run.path(FILE), folder.path / FILE, stage, first)
    if name == "tensorboard":
        return TensorBoard(folder.path / "tensorboard" / stage, first)
    return MLflow(run, stage, first) if name == "mlflow" else WandB(run, stage, first)


class Folder:
    """A folder of this machine whose metrics end up at `url`: that folder itself, or one beside a bucket."""

    def __init__(self, url: str, warn: Callable[[str], None]) -> None:
        fs, path = storage.locate(url)
        self.local = isinstance(fs, LocalFileSystem)
        self.url, self.warn = url, warn
        self._scratch = contextlib.ExitStack()
        if self.local:
            self.path = Path(path)
        else:
            self.path = Path(self._scratch.enter_context(cluster.scratch()), "metrics")
            self.path.mkdir()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._sent: Future[float] | None = None
        self._next = time.monotonic() + UPLOAD_SECONDS

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.local:
            self._settle()
            self._sent = self._pool.submit(self._upload, self._files())
            self._settle()
            self._scratch.close()
        self._pool.shutdown()

    def sync(self) -> None:
        """Begin an upload, in the background, if it is time and none is under way."""
        if self.local or time.monotonic() < self._next or (self._sent is not None and not self._sent.done()):
            return
        took = self._settle()
        self._sent = self._pool.submit(self._upload, self._files())
        self._next = time.monotonic() + max(UPLOAD_SECONDS, 20 * took)

    def _files(self) -> dict[str, bytes]:
        paths = sorted(path for path in self.path.rglob("*") if path.is_file())
        return {path.relative_to(self.path).as_posix(): path.read_bytes() for path in paths}

    def _upload(self, files: dict[str, bytes]) -> float:
        began = time.monotonic()
        for name, data in files.items():
            storage.write_bytes(storage.join(self.url, name), data)
        return time.monotonic() - began

    def _settle(self) -> float:
        """Wait for the last upload; seconds it took. Training does not end because of one that failed."""
        sent, self._sent = self._sent, None
        try:
            return sent.result() if sent is not None else 0.0
        except OSError as error:
            self.warn(f"metrics could not be written to {self.url}: {error}")
            return 0.0


class Jsonl:
    """Rows as lines of JSON, in the file `path`, after those that `url` has already."""

    def __init__(self, url: str, path: Path, stage: str, first: int) -> None:
        """Rows of `stage` beyond the step `first` go, as do lines that are not whole."""
        before = storage.read_bytes(url) if storage.exists(url) else b""
        kept = [row for row in rows(before) if row["stage"] != stage or row["step"] <= first]
        after = "".join(_line(row) for row in kept).encode()
        if after != before or not path.exists():
            storage.write_bytes(str(path), after)
        self._file = path.open("a")

    def log(self, step: int, row: Row) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def rows(data: bytes) -> list[dict[str, Any]]:
    """The rows in the bytes of a metrics.jsonl; lines that are not whole are passed over."""
    found = []
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"stage", "step"} <= row.keys():
            found.append(row)
    return found


class TensorBoard:
    """Rows as scalars in an event file of its own in `folder`."""

    def __init__(self, folder: Path, first: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{uuid.uuid4().hex[:8]}")
        start = SessionLog(status=SessionLog.START)  # hides what earlier files have from this step on
        self._writer.write_event(Event(wall_time=time.time(), step=first + 1, session_log=start))
        self._writer.flush()

    def log(self, step: int, row: Row) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        summary = Summary()
        for name, value in numbers(row).items():
            summary.value.add(tag=name, simple_value=value)
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """Rows as metrics of an MLflow run a stage, in the experiment "cellray".

    Where that is, MLFLOW_TRACKING_URI says, as MLflow documents.
    """

    def __init__(self, run: Run, stage: str, first: int) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        self._last, self._done = 0, False
        path = run.path("trackers", f"mlflow-{stage}")
        if first and storage.exists(path):
            self._id = storage.read_bytes(path).decode()
            self._client.update_run(self._id, status="RUNNING")
            history = self._client.get_metric_history(self._id, "loss")
            self._last = max((point.step for point in history), default=0)
            return
        known = self._client.get_experiment_by_name("cellray")
        experiment = known.experiment_id if known else self._client.create_experiment("cellray")
        tags = {"cellray.run": run.url, "cellray.stage": stage}
        name = f"{os.path.basename(run.url.rstrip('/'))} {stage}"
        self._id = self._client.create_run(experiment, tags=tags, run_name=name).info.run_id
        storage.write_bytes(path, self._id.encode())

    def log(self, step: int, row: Row) -> None:
        from mlflow.entities import Metric

        self._done = step == row["steps"]
        if step > self._last:
            now = round(1000 * time.time())
            points = [Metric(name, value, now, step) for name, value in numbers(row).items()]
            self._client.log_batch(self._id, metrics=points)

    def close(self) -> None:
        self._client.set_terminated(self._id, "FINISHED" if self._done else "KILLED")


class WandB:
    """Rows as the history of a Weights & Biases run a stage, in the project "cellray"; a group is RUN.

    WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and the like say otherwise, as W&B documents.
    """

    def __init__(self, run: Run, stage: str, first: int) -> None:
        import wandb

        path = run.path("trackers", f"wandb-{stage}")
        known = storage.read_bytes(path).decode() if first and storage.exists(path) else ""
        self._last = 0
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cellray"),
            group=os.path.basename(run.url.rstrip("/")),
            name=stage,
            id=known or uuid.uuid4().hex[:12],
            resume="allow",
            config=to_json(run.recipe),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._last = max(0, int(self._run.step) - 1)
        if not known:
            storage.write_bytes(path, str(self._run.id).encode())

    def log(self, step: int, row: Row) -> None:
        if step > self._last:
            self._run.log(numbers(row), step=step)

    def close(self) -> None:
        self._run.finish()


def numbers(row: Row) -> dict[str, float]:
    """What can be plotted of a row."""
    return {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
