"""The driver of a training: what it refuses, and how it ends while it waits for workers."""

import threading
import time

import pytest
import ray

from cellray.train import loop
from cellray.train.ending import Stopped
from tests import stores


@pytest.mark.parametrize(
    ("setting", "says"), [("workers=9", "take 9 CPUs, .* has 4"), ("gpu=true", "take 2 GPUs, .* has 0")]
)
def test_workers_that_this_machine_has_no_room_for_are_refused(ray_session, tmp_path, setting, says):
    with pytest.raises(ValueError, match=f"{says}: lower workers="):
        loop.train(stores.run(tmp_path, **dict([setting.split("=")])).recipe)
    assert {path.name for path in tmp_path.iterdir()} == {"store"}


@pytest.fixture
def board(ray_session):
    found = loop._board()
    yield found
    ray.kill(found)


@pytest.fixture
def never():
    """What ends when the test does."""
    over = threading.Event()
    yield over.wait
    over.set()


def test_a_driver_that_is_to_stop_waits_no_longer_than_workers_are_heard_of(board, never, monkeypatch):
    monkeypatch.setattr(loop, "SILENT", 1.0)
    stop, asking = threading.Event(), threading.Event()

    def ask():
        while not asking.wait(0.1):
            ray.get(board.stopped.remote())

    worker = threading.Thread(target=ask)
    worker.start()
    threading.Timer(0.5, stop.set).start()
    threading.Timer(3.0, asking.set).start()
    begun = time.monotonic()
    with pytest.raises(Stopped):
        loop._waited(never, board, stop)
    worker.join()
    assert time.monotonic() - begun > 3.9


def test_what_a_call_comes_to_is_that_of_the_call(board):
    def fails():
        raise TimeoutError("its own")

    stop = threading.Event()
    loop._waited(lambda: None, board, stop)
    with pytest.raises(TimeoutError, match="its own"):
        loop._waited(fails, board, stop)
