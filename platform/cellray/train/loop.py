"""Training on Ray: the chain of stages in the workers of a TorchTrainer, its events to whoever watches."""

import contextlib
import tempfile
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import torch

from cellray.train import lease, trackers, workers
from cellray.train.chain import chain
from cellray.train.ending import Stopped
from cellray.train.fit import Emit, Event
from cellray.train.masks import notes
from cellray.train.recipe import Recipe, from_json, to_json
from cellray.train.run import Run
from cellray.train.skips import Diverged


class Board:
    """Events of the workers, for whoever watches; and whether they should stop."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.stopping = False
        self.error = ""
        self.gains: set[tuple[str, int]] = set()

    def push(self, event: Event) -> None:
        self.events.append(event)
        if "saved" in event:
            self.gains.add((event["stage"], event["saved"]))

    def gained(self) -> int:
        """Checkpoints of which there was none before."""
        return len(self.gains)

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def stop(self) -> None:
        self.stopping = True

    def stopped(self) -> bool:
        return self.stopping

    def fail(self, why: str) -> None:
        """Note why the run cannot go on, not even if it is started again."""
        self.error = why

    def failed(self) -> str:
        return self.error


@contextlib.contextmanager
def _watching(board: Any, on_event: Emit, *stops: threading.Event) -> Iterator[None]:
    """Pass events on while the body runs, and those left at its end; tell the workers when to stop."""
    import ray

    over = threading.Event()

    def watch() -> None:
        while True:
            last = over.wait(0.25)
            if any(stop.is_set() for stop in stops):
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


@contextlib.contextmanager
def _listening(board: Any) -> Iterator[threading.Event]:
    """An event that is set, while the body runs, when the workers should stop."""
    import ray

    stop, over = threading.Event(), threading.Event()

    def listen() -> None:
        while not over.wait(0.25):
            if ray.get(board.stopped.remote()):
                stop.set()
                return

    thread = threading.Thread(target=listen, name="listen", daemon=True)
    thread.start()
    try:
        yield stop
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
        if workers.rank() == 0:
            ray.get(board.push.remote(event))

    try:
        with _listening(board) as stop:
            chain(Run(recipe), emit, device, stop)
    except Stopped:
        pass  # all of them, at the same step
    except Diverged as error:
        # As an error of the worker it would be tried again, and come to the same.
        ray.get(board.fail.remote(str(error)))
    ray.train.report({"finished": True})


def train(
    recipe: Recipe, on_event: Emit = lambda event: None, *, stop: threading.Event | None = None
) -> None:
    """Run the chain on Ray Train; Ray must be connected. `on_event` hears of progress, in this process.

    Running it again goes on where it stopped. Workers that die are started again and resume
    from the newest checkpoint. Setting `stop`, from another thread or by a signal, ends it before it
    is done, with a checkpoint. Killing this process ends the workers too, but where Ray has no
    dashboard their CPUs stay taken until the whole job ends.

    ValueError if another process drives the run, or takes it over, and Diverged, which is one, if too
    many batches in a row were of no use.
    """
    import ray

    trackers.check(recipe.track)
    run = Run(recipe)
    run.claim()
    _ = run.test
    for modality, note in notes(run.recipe.unimodal, run.tokenizer):
        on_event({"stage": f"unimodal-{modality}", "note": note})
    stop, lost = stop or threading.Event(), threading.Event()

    def say(text: str) -> None:
        on_event({"stage": "run", "warning": text})

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lease.held(run.url, say, stop=stop, lost=lost))
        except Stopped:
            return
        board: Any = ray.remote(num_cpus=0)(Board).remote()
        with _watching(board, on_event, stop, lost):
            _fit(run, board)
        error = ray.get(board.failed.remote())
        ray.kill(board)
    if error:
        raise Diverged(error)
    if lost.is_set():
        raise ValueError(
            f"{run.url} was taken over by another driver, as this one had shown no sign of life for "
            f"{lease.EXPIRY:.0f} s; that one goes on with it"
        )


def _fit(run: Run, board: Any) -> None:
    """Run the workers to their end. They may fail as often as they like while they get further."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    with tempfile.TemporaryDirectory(prefix="cellray-train-") as scratch:
        while True:
            gained = ray.get(board.gained.remote())
            trainer = TorchTrainer(
                worker,
                train_loop_config={"recipe": to_json(run.recipe) | {"run": run.url}, "board": board},
                # Numbers that all workers have to know stay on the CPU, and go over gloo.
                torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if run.recipe.gpu else "gloo"),
                scaling_config=ScalingConfig(num_workers=run.recipe.workers, use_gpu=run.recipe.gpu),
                run_config=RunConfig(
                    name=f"cellray-{uuid.uuid4().hex[:8]}",
                    storage_path=scratch,
                    failure_config=FailureConfig(max_failures=3),
                ),
            )
            try:
                trainer.fit()
                return
            except TrainingFailedError:
                if ray.get(board.gained.remote()) == gained:
                    raise
