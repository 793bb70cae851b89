"""What the driver of a sweep hears of its trials: it shows them, and writes down how they ended."""

import json
from dataclasses import asdict, replace
from typing import Any

from ray import tune

from cellray.data import storage
from cellray.train.progress import Progress
from tune.trial import Trial, folder, spell


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
