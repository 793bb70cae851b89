"""Stage 1 on a store, a step at a time: as it runs, on Ray or not, and as bare loops on what is in memory.

python -m tests.bench.drivers.training WAY STORE RUN [--cores N …] [key=value …]

ray        `cellray.train.loop.train`, a worker
loop       `cellray.train.chain.chain` in this process; with several cores as many workers, over gloo
batches    a bare torch loop over batches of the feed that are in memory
tensors    the same, with the tensors that are made of them in memory too
"""

import argparse
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cellray import cluster, heap
from cellray.train import sharding, stages, workers
from cellray.train.chain import chain
from cellray.train.ending import Stopped
from cellray.train.feed import Feed
from cellray.train.fit import adamw, fast_bf16, plan_of
from cellray.train.recipe import Recipe, load, override, settings
from cellray.train.run import Run
from tests.bench.harness.serve import Delivery, serve
from tests.bench.training.gate import Gate, hold, served

RESIDENT = 16
"""Batches that bare loops have in memory."""
MADE = ("masked_tokens", "plain_tokens", "kept", "targets", "asked_features")
"""Functions of `stages` that make tensors of a batch, each a pure function of batch and step."""


def recipe(store: str, run: str, words: list[str]) -> Recipe:
    """The recipe `small`, stage 1 alone, as long as it takes, without checkpoints in the middle."""
    fixed = {
        "store": store,
        "run": run,
        "workers": 1,
        "stages": ("unimodal",),
        "checkpoint_seconds": 1e9,
        "unimodal.epochs": 500.0,
    }
    return override(load("pipelines.recipes.small:recipe"), {**fixed, **settings(words)})


class Memory:
    """What functions answered before, by step and by the place of the call within it."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], Any] = {}
        self._step = self._call = 0
        self.made = 0
        """Answers that were not there."""

    def at(self, step: int) -> None:
        """Step `step` begins."""
        self._step, self._call = step, 0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, called once for each place in each step."""

        def remembered(*args: Any, **kwargs: Any) -> Any:
            key = (self._step, self._call)
            self._call += 1
            if key not in self._held:
                self._held[key] = function(*args, **kwargs)
                self.made += 1
            return self._held[key]

        return remembered


def bare(run: Run, memory: Memory) -> Iterator[Delivery]:
    """Steps of stage 1 on the first batches of its feed, over and over."""
    setting, teacher = run.recipe, run.teacher()
    stage = stages.Unimodal(setting.unimodal, teacher, run.tokenizer, "rna", seed=setting.seed, device="cpu")
    teacher.train().requires_grad_(False)
    for module in stage.trained():
        module.requires_grad_(True)
    parameters, optimizer = adamw(stage.trained(), setting.optim, asked=stage.asked, read=setting.feed.tokens)
    plan = plan_of(run.store, setting, ~run.test, stage.needs(), stage.reads(), 1.0)
    with Feed(run.store, plan, first=0, rank=0, world=1) as feed:
        batches = [(share.batch, share.cells, share.tokens) for share in itertools.islice(feed, RESIDENT)]
    halved = setting.precision == "bf16" or (setting.precision == "auto" and fast_bf16("cpu"))
    while True:
        for step, (batch, cells, tokens) in enumerate(batches):
            memory.at(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=halved):
                losses = stage.losses(batch, step).values()
                loss = sum((x.weight / max(x.count, 1.0) * x.sum for x in losses), torch.zeros(()))
            loss.backward()
            workers.sum_gradients(parameters, optimizer.tables)
            sharding.clip(parameters, setting.optim.clip)
            optimizer.step()
            optimizer.zero_grad()
            yield cells, tokens, None


def remember(memory: Memory) -> None:
    """Make `stages`, in this process, keep the tensors that it makes."""
    for name in MADE:
        setattr(stages, name, memory.of(vars(stages)[name]))


def alone(run: Run, workers: int) -> None:
    """The chain in this process, let on by commands."""
    stop = threading.Event()
    gate = Gate(Path(run.url, "pauses"))
    hold(stages.Unimodal, gate, workers=workers)
    thread = served(gate, stop.set)
    train(run, stop)
    thread.join()


def train(run: Run, stop: threading.Event) -> None:
    try:
        chain(run, lambda event: None, "cpu", stop)
    except Stopped:
        return
    raise AssertionError("the stage was over before the bench was: more epochs")


def several(run: Run, cores: list[int], arguments: list[str], rank: int) -> None:
    """Worker `rank` of as many as there are cores, on its own; the first one starts the others."""
    import torch.distributed as dist

    others: list[subprocess.Popen[bytes]] = []
    meeting = Path(run.url, "meeting")
    if rank == 0:
        meeting.parent.mkdir(parents=True, exist_ok=True)
        _ = run.test  # writes the split, so that no two workers do it at once
        for other in range(1, len(cores)):
            command = [sys.executable, "-m", "tests.bench.drivers.training", *arguments, f"--rank={other}"]
            others.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", world_size=len(cores), rank=rank)
    try:
        # The first worker alone is held: the others wait for it wherever workers exchange something.
        if rank == 0:
            alone(run, len(cores))
        else:
            train(run, threading.Event())
    finally:
        dist.destroy_process_group()
        for process in others:
            process.wait(timeout=60)


def on_ray(setting: Recipe) -> None:
    """The product's own training, whose worker answers in place of this process, through its pipes."""
    own, answers = f"/proc/{os.getpid()}/fd", os.dup(1)
    os.dup2(2, 1)
    pauses = str(Path(Run(setting).url, "pauses"))

    def worker(config: dict[str, Any]) -> None:
        import ray

        from cellray.train import loop, stages
        from tests.bench.training.gate import Gate, hold, served

        def over() -> None:
            ray.get(config["board"].stop.remote())

        with open(f"{own}/0") as commands, open(f"{own}/{answers}", "w") as said:
            gate = Gate(Path(pauses))
            hold(stages.Unimodal, gate)
            thread = served(gate, over, commands, said)
            loop.worker(config)
            thread.join()

    cluster.prepare("local")
    with cluster.connect("local", cpus=2, object_store_bytes=256 << 20):
        from cellray.train import loop

        vars(loop)["worker"] = worker
        loop.train(setting)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("ray", "loop", "batches", "tensors"))
    parser.add_argument("store")
    parser.add_argument("run")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--cores", nargs="*", type=int, default=[])
    parser.add_argument("--rank", type=int, default=0)
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, {options.cores[options.rank]})
    heap.keep()  # as workers do
    torch.set_num_threads(1)
    setting = recipe(options.store, options.run, options.settings)
    if options.way == "ray":
        on_ray(setting)
    elif options.way == "loop":
        run = Run(setting)
        if len(options.cores) > 1:
            several(run, options.cores, sys.argv[1:], options.rank)
        else:
            alone(run, 1)
    else:
        memory = Memory()
        if options.way == "tensors":
            remember(memory)
        steps = bare(Run(setting), memory)
        serve(lambda: steps, first=RESIDENT, about=f"{RESIDENT} batches in memory")


if __name__ == "__main__":
    main()
