"""Training on Ray: the chain of stages in the workers of a TorchTrainer, its events to whoever watches."""

import contextlib
import tempfile
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import torch

from cellray.train import workers
from cellray.train.chain import chain
from cellray.train.fit import Emit, Event
from cellray.train.recipe import Recipe, from_json, to_json
from cellray.train.run import Run


class Board:
    """Events of the workers, for whoever watches."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def push(self, event: Event) -> None:
        self.events.append(event)

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events


@contextlib.contextmanager
def _watching(board: Any, on_event: Emit) -> Iterator[None]:
    """Pass events on while the body runs, and those left at its end."""
    import ray

    over = threading.Event()

    def watch() -> None:
        while True:
            last = over.wait(0.25)
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

    recipe = from_json(config["recipe"])
    torch.set_num_threads(recipe.threads)
    device = str(ray.train.torch.get_device())

    def emit(event: Event) -> None:
        if workers.rank() == 0:
            ray.get(config["board"].push.remote(event))

    chain(Run(recipe), emit, device)
    ray.train.report({"finished": True})


def train(recipe: Recipe, on_event: Emit = lambda event: None) -> None:
    """Run the chain on Ray Train; Ray must be connected. `on_event` hears of progress, in this process.

    Running it again goes on where it stopped. Workers that die are started again and resume
    from the newest checkpoint.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    run = Run(recipe)
    run.claim()
    _ = run.test
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    with tempfile.TemporaryDirectory(prefix="cellray-train-") as scratch, _watching(board, on_event):
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
