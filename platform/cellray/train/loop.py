"""Training on Ray: the chain of stages in the workers of a TorchTrainer, its events to whoever watches."""

import contextlib
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import torch

from cellray import cluster, heap
from cellray.train import lease, trackers, watchdog, workers
from cellray.train.chain import chain, check
from cellray.train.ending import Stopped
from cellray.train.fit import Emit, Event
from cellray.train.masks import notes
from cellray.train.recipe import Recipe, from_json, to_json
from cellray.train.run import Run
from cellray.train.skips import Diverged

POLL = "0.5"
"""Seconds between two looks of Ray Train at its workers; 2 by default. The environment goes before it."""
SILENT = 15.0
"""Seconds without a word of any worker after which a run that is to stop waits for them no longer."""
BARREN = 3
"""Times that a group of workers may fail to start, without a checkpoint between them."""


class Board:
    """Events of the workers, for whoever watches; and whether they should stop."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.stopping = False
        self.error = ""
        self.heard = time.monotonic()
        self.gains: set[tuple[str, int]] = set()

    def push(self, event: Event) -> None:
        """Note an event, and when it was heard of: seconds since 1970 by this machine's clock."""
        if "begun" in event:  # what an earlier group of workers failed of may not be there any more
            self.error = ""
        self.events.append({**event, "at": time.time()})
        for name in ("saved", "resumed"):  # who is killed when a checkpoint is written tells of it no more
            if name in event:
                self.gains.add((event["stage"], event[name]))

    def gained(self) -> int:
        """Checkpoints that were written, or gone on from, and not heard of before."""
        return len(self.gains)

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def stop(self) -> None:
        self.stopping = True

    def stopped(self) -> bool:
        """What workers ask all the time they are there."""
        self.heard = time.monotonic()
        return self.stopping

    def silent(self) -> float:
        """Seconds since a worker asked."""
        return time.monotonic() - self.heard

    def fail(self, why: str) -> None:
        """Note why the run cannot go on."""
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
    heap.keep()
    torch.set_num_threads(recipe.threads)
    device = str(ray.train.torch.get_device())

    def emit(event: Event) -> None:
        watchdog.beat()
        if workers.rank() == 0:
            ray.get(board.push.remote(event))

    def hangs(where: str) -> None:
        text = (
            f"worker {workers.rank()}, process {os.getpid()} on {socket.gethostname()}, has got no further "
            f"for {recipe.hang_seconds:g} s; it stands in {where}. It is killed, and all workers start again"
        )
        ray.get(board.push.remote({"stage": "run", "warning": text}))

    with watchdog.watched(recipe.hang_seconds, hangs):
        emit({"stage": "run", "begun": workers.world()})
        try:
            with _listening(board) as stop:
                chain(Run(recipe), emit, device, stop)
        except Stopped:
            pass  # all of them, at the same step
        except ValueError as error:
            ray.get(board.fail.remote(str(error)))
            # Raised it would be tried again: in vain after the one, well enough after a damaged read.
            if not isinstance(error, Diverged):
                raise
        ray.train.report({"finished": True})


def train(
    recipe: Recipe, on_event: Emit = lambda event: None, *, stop: threading.Event | None = None
) -> None:
    """Run the chain on Ray Train; Ray must be connected. `on_event` hears of progress, in this process.

    Running it again goes on where it stopped. Workers that die, or hang for `hang_seconds` of the recipe,
    are started again and resume from the newest checkpoint. Setting `stop`, from another thread or by
    a signal, ends it before it is done, with a checkpoint. Killing this process ends the workers too, but
    where Ray has no dashboard their CPUs stay taken until the whole job ends.

    ValueError if another process drives the run, or takes it over, if a stage cannot begin (`chain.check`),
    if there is no room for the workers, or they cannot go on with what they read; and Diverged, which is
    one, if too many batches in a row were of no use.
    """
    import ray
    from ray.train import TrainingFailedError

    trackers.check(recipe.track)
    run = Run(recipe)

    def say(text: str) -> None:
        on_event({"stage": "run", "warning": text})

    check(run)
    room(recipe, say)
    run.claim()
    _ = run.test
    for modality, note in notes(run.recipe.unimodal, run.tokenizer):
        on_event({"stage": f"unimodal-{modality}", "note": note})
    stop, lost = stop or threading.Event(), threading.Event()

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lease.held(run.url, say, stop=stop, lost=lost))
        except Stopped:
            return
        board = _board()
        stack.callback(ray.kill, board)
        with _watching(board, on_event, stop, lost):
            try:
                _fit(run, board, stop, lost)
            except Stopped:
                pass
            except TrainingFailedError as failure:
                if said := ray.get(board.failed.remote()):
                    raise ValueError(said) from failure
                raise
        error = ray.get(board.failed.remote())
    if error:
        raise Diverged(error)
    if lost.is_set():
        raise ValueError(
            f"{run.url} was taken over by another driver, as this one had shown no sign of life for "
            f"{lease.EXPIRY:.0f} s; that one goes on with it"
        )


def _board() -> Any:
    """A board on this process's node: one on a worker's would be lost with that node, and the run with it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(num_cpus=0)(Board)
    return board.options(scheduling_strategy=here).remote()


def room(recipe: Recipe, say: Callable[[str], None]) -> None:
    """ValueError if the workers could never start; a word if they have to wait for nodes to join."""
    import ray

    kind = "GPU" if recipe.gpu else "CPU"
    has = ray.cluster_resources().get(kind, 0.0)
    if has >= recipe.workers:
        return
    needs = f"workers={recipe.workers} {'takes' if recipe.workers == 1 else 'take'} {recipe.workers} {kind}s"
    if cluster.own():
        raise ValueError(
            f"{needs}, and Ray on this machine has {has:g}: lower workers=, "
            f"{'leave gpu=true out, ' if recipe.gpu else ''}or set RAY_ADDRESS=HOST:PORT of a larger cluster"
        )
    say(f"{needs}, and the cluster has {has:g}: training begins when nodes with more have joined")


def _fit(run: Run, board: Any, *stops: threading.Event) -> None:
    """Run the workers to their end. They may fail as often as they like while they get further.

    Stopped as from `_waited`.
    """
    import ray
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL)
    barren = 0
    with cluster.scratch() as scratch:
        while True:
            gained = ray.get(board.gained.remote())
            trainer = TorchTrainer(
                worker,
                train_loop_config={"recipe": to_json(run.recipe) | {"run": run.url}, "board": board},
                torch_config=TorchConfig(
                    # Numbers that all workers have to know stay on the CPU, and go over gloo.
                    backend="cpu:gloo,cuda:nccl" if run.recipe.gpu else "gloo",
                    timeout_s=_patience(run.recipe.hang_seconds),
                ),
                scaling_config=ScalingConfig(num_workers=run.recipe.workers, use_gpu=run.recipe.gpu),
                run_config=RunConfig(
                    name=f"cellray-{uuid.uuid4().hex[:8]}",
                    storage_path=scratch,
                    failure_config=FailureConfig(max_failures=3),
                ),
            )
            try:
                _waited(trainer.fit, board, *stops)
                return
            except TrainingFailedError as error:
                if ray.get(board.gained.remote()) > gained:
                    barren = 0
                    continue
                barren += 1
                # A worker that dies while its group starts may end Ray's controller, which then gives up.
                if not isinstance(error, ControllerError) or barren == BARREN:
                    raise


def _waited(fit: Callable[[], object], board: Any, *stops: threading.Event) -> None:
    """Call `fit`, in a thread. Stopped where it is to stop and no worker has been heard of for SILENT.

    They may wait for nodes that never join. Of what such a call comes to after that nobody hears.
    """
    import ray

    ended: Future[object] = Future()

    def work() -> None:
        try:
            ended.set_result(fit())
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=work, name="fit", daemon=True).start()
    while not wait([ended], timeout=0.25).done:
        if any(stop.is_set() for stop in stops) and ray.get(board.silent.remote()) > SILENT:
            raise Stopped
    ended.result()


def _patience(hang_seconds: float) -> int:
    """Seconds for which torch waits for other workers: the watchdog comes first; without one, a week."""
    return math.ceil(2 * hang_seconds) + 60 if hang_seconds else 7 * 24 * 3600
