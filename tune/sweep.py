"""Search the settings of a recipe: python -m tune.sweep RECIPE SPACE [key=value …]

SPACE is a function that returns {setting: distribution}, as tune.spaces:optimiser. Each trial is a
training run on one shared token store; trials that fall behind are stopped early (ASHA). The first
trial is the recipe as it stands, so the best one is never worse than that.

RUN/sweep-plan.json  what is searched: another plan is refused, the same one is gone on with
RUN/store/           the token store, ingested once
RUN/trials/          the trials' runs
RUN/sweep.json       every trial: settings, loss, seconds, state
RUN/best.json        settings of the best one, for `pipelines.pretrain RECIPE @RUN/best.json`
"""

import argparse
import importlib
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cellray import cluster
from cellray.data import storage
from cellray.train import recipe as recipes
from cellray.train.progress import Line, Mode, Progress
from cellray.train.recipe import KINDS, Recipe, override, to_json
from pipelines import command
from tune.trial import Trial, spell

DRIVER_CPUS = 0.1
"""What the driver of a trial takes. It waits for its workers; Ray refuses 0."""
SCHEMA = 1
"""Of sweep.json and sweep-plan.json."""
TRIES = 20
"""Draws for each trial wanted, before a space counts as too small for so many."""
GROUPS = ("network", "student", "optim", "feed", "unimodal", "joint", "distil")
"""Groups of settings that may be searched; others decide what data there is, or where things run."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How the settings are searched."""

    stage: str = "joint"
    """Stage whose training loss is judged: unimodal-rna (-atac, -protein), joint or distil."""
    trials: int = 8
    """Trials, the recipe as it stands among them."""
    concurrent: int = 1
    """Trials at a time; each takes the recipe's workers."""
    grace: int = 25
    """Percent of the judged stage before a trial may be stopped."""
    reduction: int = 3
    """At each comparison one trial in this many goes on."""

    def __post_init__(self) -> None:
        kind, _, modality = self.stage.partition("-")
        if kind not in KINDS or (kind == "unimodal") != bool(modality):
            raise ValueError(f"sweep.stage is {self.stage!r}; expected unimodal-rna, joint, distil or alike")
        if self.trials < 2 or self.concurrent < 1:
            raise ValueError(
                f"sweep.trials is {self.trials}, sweep.concurrent {self.concurrent}; "
                "at least 2 trials are needed, and 1 at a time"
            )
        if not 1 <= self.grace < 100 or self.reduction < 2:
            raise ValueError(
                f"sweep.grace is {self.grace}, sweep.reduction {self.reduction}; "
                "grace must lie between 1 and 99, reduction must be at least 2"
            )

    @property
    def kind(self) -> str:
        """The stage as a recipe names it."""
        return self.stage.partition("-")[0]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line may set beside the recipe."""

    sweep: Sweep = Sweep()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 if no trial finished; 2 with a line on the error stream if something is refused."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        cluster.prepare()
        changes = command.changes(args.settings)
        own = {key: value for key, value in changes.items() if key.startswith("sweep.")}
        sweep = override(Settings(), own).sweep
        recipe = recipes.load(args.recipe)
        recipe = override(recipe, {key: value for key, value in changes.items() if key not in own})
        space = load_space(args.space)
        trials = search(recipe, space, sweep, mode="quiet" if args.quiet else "auto")
    except ValueError as error:
        print(f"error: {getattr(error, 'cause', None) or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with this sweep", file=sys.stderr)
        return 130
    print(table(trials))
    chosen = best(trials)
    if chosen is None:
        print(f"error: no trial finished; see {storage.join(recipe.run, 'sweep.json')}", file=sys.stderr)
        return 1
    fixed = [word for word in args.settings if not word.startswith(("sweep.", "run=", "store="))]
    given = [word for word in fixed if word.partition("=")[0] not in space]
    words = [args.recipe, *given, f"@{storage.join(recipe.run, 'best.json')}"]
    words += [f"run={recipe.run}-best", f"store={recipe.store or storage.join(recipe.run, 'store')}"]
    print(f"\nThe best is {chosen.trial}. A run with its settings:\n")
    print(f"  python -m pipelines.pretrain {shlex.join(words)}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What the command line says. Leaves by SystemExit after `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m tune.sweep",
        description="Search the settings of a recipe; write the best ones to RUN/best.json.",
        epilog="RECIPE and SPACE are functions, as pipelines.recipes.demo:recipe and tune.spaces:optimiser.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="module:function that returns a recipe")
    parser.add_argument(
        "space", metavar="SPACE", nargs="?", help="module:function that returns distributions"
    )
    parser.add_argument(
        "settings", metavar="key=value", nargs="*", help="settings of the recipe, and sweep.…"
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this, with all settings")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_intermixed_args(argv)
    if args.help:
        columns = shutil.get_terminal_size().columns
        recipe = recipes.load(args.recipe) if args.recipe else Recipe()
        how: Any = Settings()
        print(parser.format_help() + "\n" + command.describe(how, columns))
        print("\nof the recipe:\n" + command.describe(recipe, columns).partition("\n")[2])
        raise SystemExit(0)
    if args.space is None or "=" in args.recipe + args.space:
        parser.error("RECIPE and SPACE are needed, as pipelines.recipes.demo:recipe tune.spaces:optimiser")
    return args


def load_space(path: str) -> dict[str, Any]:
    """The search space that the function `module:function` returns."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name) if name else None
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"space {path!r}: {error}") from None
    if function is None:
        raise ValueError(f"{path!r} is no space: write module:function, as in tune.spaces:optimiser")
    return dict(function())


def check_space(space: Mapping[str, Any], recipe: Recipe, sweep: Sweep) -> None:
    """ValueError for a space that has no trials, or whose trials could not be compared."""
    from ray.tune.search.sample import Domain

    known = {key for key, _ in recipes.describe(recipe)}
    if not space:
        raise ValueError("the space is empty: return {setting: distribution}, as tune.spaces:optimiser does")
    for key, domain in space.items():
        if not isinstance(domain, Domain):
            raise ValueError(
                f"space: {key} is {domain!r}, which is no distribution; write tune.choice([…]), "
                "tune.loguniform(low, high) or another of ray.tune"
            )
        if key not in known:
            override(recipe, {key: None})
        group, _, name = key.partition(".")
        if group not in GROUPS:
            raise ValueError(f"space: {key} is not for a sweep; settings of {', '.join(GROUPS)} are")
        kind = sweep.kind
        judged = {"unimodal": ("unimodal",), "joint": ("joint", "feed")}
        moves = group != "student" if kind == "distil" else group in judged[kind]
        if moves and (group, name) != (kind, "epochs"):
            raise ValueError(
                f"space: {key} changes what the loss of {sweep.stage} measures, so that trials could not be "
                "compared; judge by another stage with sweep.stage=…, or leave it out"
            )


def check_room(recipe: Recipe, sweep: Sweep, resources: Mapping[str, float]) -> None:
    """ValueError if not all workers could start: the trials would wait for each other for ever."""
    needed = {"CPU": sweep.concurrent * (recipe.workers + DRIVER_CPUS)}
    if recipe.gpu:
        needed["GPU"] = sweep.concurrent * recipe.workers
    for name, need in needed.items():
        if need > resources.get(name, 0.0):
            raise ValueError(
                f"{sweep.concurrent} trials at a time with {recipe.workers} workers each need {need:g} "
                f"{name}s, the cluster has {resources.get(name, 0.0):g}: lower sweep.concurrent= or workers="
            )


def search(recipe: Recipe, space: Mapping[str, Any], sweep: Sweep, *, mode: Mode = "auto") -> list[Trial]:
    """Every trial, best first; RUN/sweep.json and RUN/best.json hold them too.

    Starts or joins Ray. Goes on with a sweep that was interrupted; returns one that has ended at once.
    """
    recipe = replace(recipe, run=storage.absolute(recipe.run), stages=KINDS[: KINDS.index(sweep.kind) + 1])
    check_space(space, recipe, sweep)
    drawn = draw(space, recipe, sweep.trials)
    claim(recipe, drawn, sweep)
    ended = storage.join(recipe.run, "sweep.json")
    if storage.exists(ended):
        return [Trial(**row) for row in json.loads(storage.read_bytes(ended))["trials"]]
    with cluster.connect(), Progress(mode) as progress:
        import ray

        check_room(recipe, sweep, ray.cluster_resources())
        store = shared_store(recipe, sweep, progress)
        trials = run_trials(replace(recipe, store=store), drawn, sweep, progress)
    chosen = best(trials)
    if chosen is not None:
        text = json.dumps(chosen.settings, indent=1) + "\n"
        storage.write_bytes(storage.join(recipe.run, "best.json"), text.encode())
    about = {"schema": SCHEMA, "stage": sweep.stage, "best": chosen.trial if chosen else None}
    about["trials"] = [asdict(t) for t in trials]
    storage.write_bytes(ended, (json.dumps(about, indent=1) + "\n").encode())
    return trials


def draw(space: Mapping[str, Any], recipe: Recipe, trials: int) -> list[dict[str, Any]]:
    """Settings of each trial, the recipe's own first, no two alike: fewer than `trials` in a small space."""
    rng = np.random.default_rng(recipe.seed)
    standing = dict(recipes.describe(recipe))
    drawn = [{key: standing[key] for key in space}]
    for _ in range(TRIES * trials):
        settings = {key: domain.sample(random_state=rng) for key, domain in space.items()}
        if len(drawn) < trials and settings not in drawn:
            override(recipe, settings)  # refuses here and now what cannot be
            drawn.append(settings)
    return drawn


def claim(recipe: Recipe, drawn: Sequence[Mapping[str, Any]], sweep: Sweep) -> None:
    """Write down what is searched, or check that it is what the folder was begun with."""
    facts = {
        "schema": SCHEMA,
        "recipe": recipes.fingerprint(recipe),
        "sweep": asdict(replace(sweep, concurrent=1)),
        "trials": list(drawn),
    }
    path = storage.join(recipe.run, "sweep-plan.json")
    mine = (json.dumps(facts, indent=1) + "\n").encode()
    if storage.write_once(path, mine):
        return
    before, facts = json.loads(storage.read_bytes(path)), json.loads(mine)
    changed = [name for name in facts if before.get(name) != facts[name]]
    if changed:
        raise ValueError(
            f"{recipe.run} holds a sweep with another {' and another '.join(changed)} (see {path}): "
            "give this one a folder of its own with run=…, or delete that one"
        )


def shared_store(recipe: Recipe, sweep: Sweep, progress: Progress) -> str:
    """URL of the store that all trials read; ingested now if it is not there."""
    from cellray.train.run import Run

    run = Run(recipe)
    if not (recipe.store and storage.exists(storage.join(run.store_url, "store.json"))):
        from cellray.data.ingest import ingest

        lines: dict[str, Line] = {}

        def show(step: str, done: int, total: int) -> None:
            line = lines[step] = lines.get(step) or progress.stage(f"ingest {step}", total, unit="units")
            line.update(done)
            if done >= total:
                line.finish()

        ingest(recipe, run.store_url, show)
    if sweep.stage not in run.chain():
        stages = ", ".join(name for name in run.chain() if name != "control")
        raise ValueError(f"there is no stage {sweep.stage!r} with this atlas; sweep.stage= one of {stages}")
    return run.store_url


def run_trials(
    recipe: Recipe, drawn: Sequence[Mapping[str, Any]], sweep: Sweep, progress: Progress
) -> list[Trial]:
    """Run the trials on Ray Tune, or what an interrupted sweep still lacks of them; best first."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from tune.tuning import Attempt, Watch

    # Tune's own tables and log files say less than Watch; its answer to ctrl-c is to end as if done.
    for name in ("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "TUNE_DISABLE_SIGINT_HANDLER"):
        os.environ[name] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # Watch tells what failed
    watch = Watch(recipe.run, len(drawn), progress)
    numbered = [{"trial": f"{i:03d}", "settings": dict(settings)} for i, settings in enumerate(drawn)]
    tuner = tune.Tuner(
        tune.with_resources(Attempt, {"CPU": DRIVER_CPUS}),
        param_space={
            "recipe": to_json(recipe),
            "run": recipe.run,
            "stage": sweep.stage,
            "drawn": tune.grid_search(numbered),
        },
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            max_concurrent_trials=sweep.concurrent,
            scheduler=ASHAScheduler(
                time_attr="percent", max_t=100, grace_period=sweep.grace, reduction_factor=sweep.reduction
            ),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=recipe.run,
            verbose=0,
            callbacks=[watch],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    tuner.fit()
    storage.remove_folder(storage.join(recipe.run, "tune"))
    if len(watch.outcomes) == len(drawn):
        watch.line.finish()
    return sorted(watch.outcomes, key=lambda t: (t.state != "finished", t.state == "failed", t.loss or 0.0))


def best(trials: Sequence[Trial]) -> Trial | None:
    """The finished trial of the lowest loss; those that were stopped have not shown what they can."""
    finished = [t for t in trials if t.state == "finished" and t.loss is not None]
    return min(finished, key=lambda t: t.loss or 0.0, default=None)


def table(trials: Sequence[Trial]) -> str:
    """The trials as text, a row each."""
    keys = list(trials[0].settings) if trials else []
    rows = [["trial", *keys, "loss", "at", "seconds", "state"]]
    for t in trials:
        loss = "" if t.loss is None else f"{t.loss:.4f}"
        values = [spell(t.settings[key]) for key in keys]
        rows.append(
            [t.trial, *values, loss, f"{t.percent} %", f"{t.seconds:.0f}", f"{t.state} {t.error}".strip()]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
