"""python -m pipelines.pretrain RECIPE [key=value …]: the stages as one resumable run on Ray Train."""

import sys
from typing import Any

from cellray import cluster
from cellray.train.ending import TERMINATED, on_terminate
from cellray.train.progress import Line, Progress
from cellray.train.recipe import Recipe
from pipelines.command import Options, main

SHOWN = (
    "loss",
    "cells_per_second",
    "tokens_per_second",
    "data_wait_share",
    "packing",
    "mfu",
    "peak_memory_bytes",
)
"""What a line of progress shows of a row, and in the end of the whole stage."""


class Watch:
    """Turns the events of a training run into lines of progress."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.line: Line | None = None
        self.resumed: dict[str, int] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        name = event["stage"]
        if "warning" in event:
            self.progress.say(f"warning: {event['warning']}")
        elif "note" in event:
            self.progress.say(f"{name}: {event['note']}")
        elif "resumed" in event:
            self.resumed[name] = event["resumed"]
            self.progress.say(f"{name}: goes on from step {event['resumed']:,}")
        elif "finished" in event:
            self._finish(event["finished"])
        elif "step" in event:
            if self.line is None or self.line.name != name:
                self.line = self.progress.stage(name, total=event["steps"], done=self.resumed.get(name, 0))
            self.line.update(event["step"], **{name: event[name] for name in SHOWN if name in event})
            if event.get("finish"):
                self.line.finish()
                self.line = None

    def _finish(self, facts: dict[str, Any]) -> None:
        if self.line is None or self.line.name != facts["name"]:
            self.progress.say(f"{facts['name']}: was finished before, loss {facts['loss_last']:.3f}")
            return
        whole = {name: facts[name] for name in SHOWN if name in facts}
        self.line.update(facts["steps"], loss=facts["loss_last"], **whole)
        self.line.finish()
        self.line = None


def pretrain(recipe: Recipe, progress: Progress) -> None:
    """Train what the recipe asks for. Ray must be connected.

    A SIGTERM ends it, and this process, after a last checkpoint.
    """
    from cellray.train.loop import train

    with on_terminate() as told:
        train(recipe, Watch(progress), stop=told)
    if told.is_set():
        progress.say("told to end: the same command goes on from here")
        raise SystemExit(TERMINATED)


def run(recipe: Recipe, options: Options) -> None:
    from cellray.train.chain import check
    from cellray.train.run import Run

    if options.dry_run:
        print(costs(Run(recipe)))
        return
    check(Run(recipe))  # before Ray starts
    with cluster.connect(threads=recipe.threads), Progress(options.progress) as progress:
        pretrain(recipe, progress)


def costs(run: Any) -> str:
    """What training would do: stages, steps, cells and tokens, which are finished, and what is hidden."""
    from cellray.train.chain import outlook
    from cellray.train.masks import notes

    lines = [f"{'stage':<18}{'steps':>9}{'cells':>13}{'tokens':>15}  state"]
    for s in outlook(run):
        state = "finished" if s.finished else "to do"
        lines.append(f"{s.name:<18}{s.steps:>9,}{s.cells:>13,}{s.tokens:>15,}  {state}")
    masks = notes(run.recipe.unimodal, run.tokenizer)
    lines += [f"unimodal-{modality}: {note}" for modality, note in masks]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main("Pretrain in three stages, and go on where an earlier run stopped.", run))
