"""Rows on disk, in event files and in a bucket: whole, in order, none twice."""

import json
import struct
import sys

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.data import storage
from cellray.train import meters, trackers
from cellray.train.chain import chain
from cellray.train.run import Run
from cellray.train.trackers import Jsonl, TensorBoard, check, rows, tracked
from tests import stores
from tests.chains import Killed
from tests.test_fit import quick


def row(stage, step, **more):
    return {"stage": stage, "step": step, "steps": 9, "loss": step / 10, "mfu": None, **more}


def on_disk(folder):
    return rows((folder / "metrics.jsonl").read_bytes())


def places(found):
    return [(row["stage"], row["step"]) for row in found]


def events(folder):
    """(step, tags) of every event of the files in `folder`, in the order they were begun; no TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found.append(
                (event.step, {v.tag: v.simple_value for v in event.summary.value}, event.session_log)
            )
            at += 16 + length
    return found


def test_a_killed_run_has_every_step_once(tmp_path, monkeypatch):
    monkeypatch.setattr(meters, "ROW_SECONDS", (0.0, 0.0))
    run = quick(tmp_path, checkpoint_seconds=0.2)
    kills = {("unimodal-rna", 1), ("joint", 3), ("distil", 5)}

    def emit(event):
        place = (event["stage"], event.get("step"))
        if place in kills:
            kills.discard(place)
            raise Killed

    while kills:
        with pytest.raises(Killed):
            chain(Run(run.recipe), emit)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"stage": "unimodal-rna", "st')  # as a kill in the middle of a line would leave it
    finished: list = []
    chain(Run(run.recipe), finished.append)
    steps = {e["finished"]["name"]: e["finished"]["steps"] for e in finished if "finished" in e}
    assert places(on_disk(tmp_path)) == [(name, i + 1) for name in run.chain() for i in range(steps[name])]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), max_size=5), st.integers(0, 60))
def test_resuming_anywhere_leaves_no_step_twice(tmp_path_factory, sessions, torn):
    folder = tmp_path_factory.mktemp("rows")
    path, first = folder / "metrics.jsonl", 0
    wanted: list[int] = []
    for length, back in sessions:
        first = max(0, first - back)
        wanted = [*wanted[:first], *range(first + 1, first + length + 1)]
        tracker = Jsonl(str(path), path, "s", first)
        for step in range(first + 1, first + length + 1):
            tracker.log(step, row("s", step))
        tracker.close()
        first += length
        whole = path.read_bytes()
        cut = len(whole.splitlines(keepends=True)[-1]) - 1
        path.write_bytes(whole + whole.splitlines(keepends=True)[-1][: torn % cut])
    Jsonl(str(path), path, "other", 0).close()
    assert [r["step"] for r in rows(path.read_bytes() if path.exists() else b"")] == wanted


def test_rows_of_other_stages_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for stage in ("a", "b", "a"):
        tracker = Jsonl(str(path), path, stage, 1 if stage == "b" else 0)
        tracker.log(1, row(stage, 1))
        tracker.close()
    assert places(on_disk(tmp_path)) == [("b", 1), ("a", 1)]


def test_event_files_hold_the_numbers_of_the_rows(tmp_path):
    tracker = TensorBoard(tmp_path, 4)
    for step in (5, 6):
        tracker.log(step, row("s", step))
    tracker.close()
    _, start, *found = events(tmp_path)
    assert (start[0], start[2].status) == (5, 1)  # START: what earlier files have from step 5 on is hidden
    assert [(step, sorted(values)) for step, values, _ in found] == [
        (n, ["loss", "step", "steps"]) for n in (5, 6)
    ]
    assert found[1][1]["loss"] == pytest.approx(0.6)


def test_tensorboard_reads_them_and_shows_no_step_twice(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last in ((0, 6), (3, 8)):
        tracker = TensorBoard(tmp_path, first)
        for step in range(first + 1, last + 1):
            tracker.log(step, row("s", step, session=first))
        tracker.close()
    read = accumulator.EventAccumulator(str(tmp_path)).Reload()
    shown = [(e.step, e.value) for e in read.Scalars("session")]
    assert shown == [(n, 0.0) for n in (1, 2, 3)] + [(n, 3.0) for n in (4, 5, 6, 7, 8)]


def test_in_a_bucket_the_files_are_whole_after_each_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "UPLOAD_SECONDS", 0.0)
    local = stores.run(tmp_path)
    run = Run(Run(local.recipe).recipe)
    url = f"memory://{tmp_path.name}"
    monkeypatch.setattr(Run, "url", url)
    told: list[str] = []
    for first in (0, 2):
        with tracked(run, "s", first, told.append) as log:
            for step in range(first + 1, first + 4):
                log(step, row("s", step))
    assert places(rows(storage.read_bytes(f"{url}/metrics.jsonl"))) == [("s", n) for n in range(1, 6)]
    files = fsspec.filesystem("memory").find(f"/{tmp_path.name}/tensorboard/s")
    assert len(files) == 2
    assert told == []


def test_an_upload_that_fails_is_told_and_training_goes_on(tmp_path, monkeypatch):
    url = f"memory://{tmp_path.name}"
    told: list[str] = []
    real = storage.write_bytes

    def fails(where, data):
        if where.startswith(url):
            raise ConnectionError("no route")
        real(where, data)

    with trackers.Folder(url, told.append) as folder:
        (folder.path / "metrics.jsonl").write_text("{}\n")
        monkeypatch.setattr(storage, "write_bytes", fails)
    assert told == [f"metrics could not be written to {url}: no route"]
    assert not folder.path.exists()


def test_a_tracker_without_its_package_is_refused_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check(("jsonl",))
    with pytest.raises(ValueError, match=r"wandb needs the package wandb: pip install cellray\[wandb\]"):
        check(("jsonl", "wandb"))


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="track='csv'"):
        stores.run(tmp_path, track="csv")


def test_mlflow_gets_the_same_rows_and_goes_on_in_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = stores.run(tmp_path, track="mlflow")
    for first in (0, 2):
        with tracked(run, "joint", first, print) as log:
            for step in range(first + 1, first + 4):
                log(step, row("joint", step))
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("cellray").experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert sorted(point.step for point in history) == [1, 2, 3, 4, 5]
    assert found.data.metrics["loss"] == 0.5
