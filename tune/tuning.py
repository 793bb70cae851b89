"""What Ray Tune runs and tells: the attempt at a trial, and who watches all of them."""

import json
import queue
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from ray import tune

from cellray.data import storage
from cellray.train.progress import Progress
from cellray.train.recipe import from_json, override
from tune.trial import Judge, Report, Trial, folder, read_reports, spell


class Attempt(tune.Trainable):
    """Trains with the settings in `config["drawn"]`; each step is a report of the judged stage.

    An attempt at a trial of an interrupted sweep first tells again what was told then, so that the
    others are compared with it, and goes on from its checkpoint if it has not ended. Training is
    stopped, not killed: a killed driver leaves the CPUs of its workers taken.
    """

    def setup(self, config: dict[str, Any]) -> None:
        # When the sweep ends, the last attempt may be killed in its cleanup; this folder goes with Ray's.
        tempfile.tempdir = self.logdir
        self.run = folder(config["run"], config["drawn"]["trial"])
        self.reports: queue.Queue[Report] = queue.Queue()
        self.stopping = threading.Event()
        self.pool = ThreadPoolExecutor(1)
        before = read_reports(self.run)
        for report in before:
            self.reports.put(report)
        self.ended = storage.exists(storage.join(self.run, "outcome.json"))
        if not self.ended:
            self.training = self.pool.submit(self._train, config, before)

    def _train(self, config: dict[str, Any], before: list[Report]) -> None:
        from cellray.train.loop import train

        recipe = override(from_json(config["recipe"]), config["drawn"]["settings"] | {"run": self.run})
        train(recipe, Judge(config["stage"], before, self._tell), stop=self.stopping)

    def _tell(self, reports: list[Report]) -> None:
        storage.write_bytes(storage.join(self.run, "reports.json"), json.dumps(reports).encode())
        self.reports.put(reports[-1])

    def step(self) -> dict[str, Any]:
        report = self._next()
        last = report["percent"] == 100 or (self.ended and self.reports.empty())
        return {**report, "done": last}

    def _next(self) -> Report:
        while True:
            try:
                return self.reports.get(timeout=0.2)
            except queue.Empty:
                if self.training.done():
                    self.training.result()  # raises what went wrong
                    raise RuntimeError(f"{self.run} ended without a loss") from None

    def cleanup(self) -> None:
        self.stopping.set()
        self.pool.shutdown()


class Watch(tune.Callback):
    """Keeps `outcomes`, a line of progress, and RUN/trials/NUMBER/outcome.json of trials that ended.

    A failed trial leaves no outcome, so that the same command tries it again.
    """

    def __init__(self, run: str, trials: int, progress: Progress) -> None:
        self.run, self.progress = run, progress
        self.outcomes: list[Trial] = []
        self.line = progress.stage("trials", trials, unit="trials")

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks to restore them, which is not how a sweep goes on

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result
        self._end(trial, "finished" if last.get("percent") == 100 else "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "failed")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Only now does Tune know what the failed ones failed of."""
        why = {t.config["drawn"]["trial"]: str(t.get_error()).strip() for t in trials if t.status == t.ERROR}
        self.outcomes = [
            replace(o, error=why[o.trial].splitlines()[-1]) if o.trial in why else o for o in self.outcomes
        ]

    def _end(self, trial: Any, state: str) -> None:
        drawn, last = trial.config["drawn"], trial.last_result or {}
        outcome = Trial(
            trial=drawn["trial"],
            settings=drawn["settings"],
            loss=last.get("loss"),
            percent=int(last.get("percent", 0)),
            seconds=last.get("seconds", 0.0),
            state=state,
        )
        path = storage.join(folder(self.run, outcome.trial), "outcome.json")
        if state != "failed" and not storage.write_once(path, json.dumps(asdict(outcome)).encode()):
            outcome = Trial(**json.loads(storage.read_bytes(path)))
        self.outcomes.append(outcome)
        set_to = "  ".join(f"{key}={spell(value)}" for key, value in outcome.settings.items())
        told = "" if outcome.loss is None else f"loss {outcome.loss:.4f}"
        self.progress.say(f"trial {outcome.trial} {outcome.state} at {outcome.percent} %  {set_to}  {told}")
        self.line.update(len(self.outcomes))
