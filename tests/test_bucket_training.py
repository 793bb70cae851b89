"""Training whose checkpoints go to an object store that fails: it does not end, and comes to the same."""

import threading

import pytest

from cellray.data import faults, storage
from cellray.train import checkpoint
from cellray.train.chain import chain
from cellray.train.run import Run
from tests import proxy, stores
from tests.chains import Killed

CHANGES = {"stages": "unimodal", "checkpoint_seconds": 0.02, "track": ()}
STAGES = ("unimodal-rna", "unimodal-atac", "unimodal-protein")


@pytest.fixture(scope="module")
def server():
    """A proxy before an object store with one bucket; clients of this process go through it."""
    with (
        proxy.object_store() as upstream,
        proxy.proxy(upstream) as server,
        proxy.pointed(server.server_port, read_timeout=10),
    ):
        storage.locate("s3://runs")[0].mkdir("runs")
        yield server


def outcome(run):
    found = {}
    for name in STAGES:
        facts = checkpoint.committed(run.path("stages", name))
        assert facts is not None, name
        found[name] = facts["sha256"], facts["curve"]
    return found


def rough(server, tmp_path, *, epochs, share, name):
    """A run in the bucket, of whose requests for checkpoints a share fails; its events, and both outcomes."""
    changes = CHANGES | {"unimodal.epochs": epochs}
    calm = stores.run(tmp_path / "calm", **changes)
    chain(calm, lambda event: None)
    run = stores.run(f"s3://runs/{name}", **changes)
    events: list[dict] = []
    server.plan = proxy.Plan(share, {"error": 6, "throttle": 4, "reset": 5, "lost": 5}, only="checkpoints")
    try:
        chain(run, events.append)
    finally:
        plan, server.plan = server.plan, None
    return events, plan, outcome(calm), outcome(run)


def test_failing_requests_cost_no_step(server, tmp_path):
    events, plan, calm, found = rough(server, tmp_path, epochs=1.0, share=0.3, name="light")
    assert plan.injected.total() > 3
    assert sum("saved" in event for event in events) > 2
    assert found == calm


def test_what_is_done_with_is_listed_and_removed_once_the_bucket_is_back(server, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name in ("a/1", "a/2", "b"):
        storage.write_bytes(f"s3://runs/done/{name}", b"x")

    def gone():
        server.plan = plan = proxy.Plan(1.0, {"error": 1})
        threading.Timer(1.0, setattr, (server, "plan", None)).start()
        return plan

    plan = gone()
    assert storage.names("s3://runs/done") == ["a", "b"]
    assert plan.injected.total() > 1
    for remove, url in (
        (storage.remove_file, "s3://runs/done/b"),
        (storage.remove_folder, "s3://runs/done/a"),
    ):
        plan = gone()
        remove(url)
        assert plan.injected.total() > 1
        assert not storage.exists(url)
        remove(url)  # what is not there is no error
    assert storage.names("s3://runs/done") == []


@pytest.mark.slow
def test_many_failing_requests_cost_no_step(server, tmp_path):
    injected = runs = 0
    while injected <= 200:  # how often a run saves, and so how much can fail, depends on the machine
        name = f"heavy-{runs}"
        events, plan, calm, found = rough(server, tmp_path / name, epochs=60.0, share=0.4, name=name)
        print(plan.requests, plan.injected, sum("saved" in event for event in events))
        assert plan.injected.total() > 3
        assert found == calm
        injected, runs = injected + plan.injected.total(), runs + 1


def test_a_bucket_that_is_gone_for_a_while_costs_checkpoints_and_no_more(server, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    changes = CHANGES | {"unimodal.epochs": 1.0}
    calm = stores.run(tmp_path / "calm", **changes)
    chain(calm, lambda event: None)
    run, heard = stores.run("s3://runs/gone", **changes), []

    def emit(event):
        heard.append(event)
        if event["stage"] == STAGES[0] and "saved" in event:
            server.plan = proxy.Plan(1.0, {"error": 1}, only="checkpoints")
            monkeypatch.setattr(faults, "DEADLINE", 0.3)
        if "could not be written" in event.get("warning", ""):
            server.plan = None
            monkeypatch.setattr(faults, "DEADLINE", 300.0)
            raise Killed

    with pytest.raises(Killed):
        chain(run, emit)
    (failed,) = [event["warning"] for event in heard if "warning" in event]
    heard.clear()
    chain(Run(run.recipe), heard.append)
    resumed = next(event["resumed"] for event in heard if "resumed" in event)
    assert resumed > 0
    assert not failed.startswith(f"checkpoint of step {resumed} ")
    assert outcome(run) == outcome(calm)
