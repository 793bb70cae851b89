"""Training on Ray: the chain of stages in the workers of a TorchTrainer, its events to whoever watches."""

import contextlib
import tempfile
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import torch

from cellray.train import trackers, workers
from cellray.train.chain import chain
from cellray.train.fit import Emit, Event
from cellray.train.recipe import Recipe, from_json, to_json
from cellray.train.run import Run


class Board:
    """Events of the workers, for whoever watches; and whether they should stop."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.stopping = False

    def push(self, event: Event) -> bool:
        """Note an event; True if the workers should stop."""
        self.events.append(event)
        return self.stopping

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def stop(self) -> None:
        self.stopping = True

    def stopped(self) -> bool:
        return self.stopping


class Stopped(Exception):
    """The first worker was told to stop."""


@contextlib.contextmanager
def _watching(board: Any, on_event: Emit, stop: threading.Event) -> Iterator[None]:
    """Pass events on while the body runs, and those left at its end; tell the workers when to stop."""
    import ray

    over = threading.Event()

    def watch() -> None:
        while True:
            last = over.wait(0.25)
            if stop.is_set():
                ray.get(board.stop.remote())
            for event in ray.get(board.take.remote()):
                on_event(event)
            if last:
                return

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=10)


def worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray
    import ray.train.torch

    board, recipe = config["board"], from_json(config["recipe"])
    if ray.get(board.stopped.remote()):
        return
    torch.set_num_threads(recipe.threads)
    device = str(ray.train.torch.get_device())

    def emit(event: Event) -> None:
        if workers.rank() == 0 and ray.get(board.push.remote(event)):
            raise Stopped

    try:
        chain(Run(recipe), emit, device)
    except Stopped:
        # The others wait for this one in an exchange. Failing ends them; all return when started again.
        if workers.world() > 1:
            raise
    ray.train.report({"finished": True})


def train(
    recipe: Recipe, on_event: Emit = lambda event: None, *, stop: threading.Event | None = None
) -> None:
    """Run the chain on Ray Train; Ray must be connected. `on_event` hears of progress, in this process.

    Running it again goes on where it stopped. Workers that die are started again and resume
    from the newest checkpoint. Setting `stop`, from another thread, ends it before it is done.
    Killing this process ends the workers too, but where Ray has no dashboard their CPUs stay
    taken until the whole job ends.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trackers.check(recipe.track)
    run = Run(recipe)
    run.claim()
    _ = run.test
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    with (
        tempfile.TemporaryDirectory(prefix="cellray-train-") as scratch,
        _watching(board, on_event, stop or threading.Event()),
    ):
        trainer = TorchTrainer(
            worker,
            train_loop_config={"recipe": to_json(recipe) | {"run": run.url}, "board": board},
            scaling_config=ScalingConfig(num_workers=recipe.workers, use_gpu=recipe.gpu),
            run_config=RunConfig(
                name=f"cellray-{uuid.uuid4().hex[:8]}",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=3),
            ),
        )
        trainer.fit()
    ray.kill(board)
