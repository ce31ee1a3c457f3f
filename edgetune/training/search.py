"""`edgetune train --search`: short trainings that choose what the recipe leaves open ("auto").

Optuna proposes (TPE, seeded by the recipe's seed and the trial's number) and kills a trial whose
curve lies below the median of those before it at the same share of its steps (median pruning). The
first trial is the rule's own proposal. Every trial that has ended is a line of a file, from which
an interrupted search goes on.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from edgetune.adapters.runs import check_replaceable
from edgetune.core.errors import RecipeError, TrainingError
from edgetune.core.layout import TRIALS
from edgetune.core.progress import Progress, duration
from edgetune.core.settings import flat
from edgetune.core.tasks import best_by, lower_is_better
from edgetune.models.torch_device import choose_device
from edgetune.recipe.schema import Recipe
from edgetune.training.automatic import with_settings
from edgetune.training.checkpoint import unfinished
from edgetune.training.inputs import Inputs, read_inputs
from edgetune.training.parallel.distributed import Group, launched
from edgetune.training.resolve import resolve
from edgetune.training.resume import Course
from edgetune.training.run import first_model, run_settings
from edgetune.training.stages import Stages
from edgetune.training.trial_watch import OutOfTimeError, Pace, TrialJournal, TrialProgress
from edgetune.training.trials import TrialFile

POINTS = 8  # validations of a trial, so that curves can be compared
AWAY = 8.0  # a rate is looked for between the rule's divided and multiplied by this
RANKS = (4, 8, 16, 32)
STARTUP = 3  # trials before one may be killed, and validations of it


@dataclass(frozen=True)
class Searched:
    """What a search came to."""

    recipe: Recipe  # with the chosen numbers
    trials: Path  # the file of its trials
    facts: dict[str, Any]  # for summary.json


class _HopelessError(Exception):
    """The trial's curve lies below the others'."""


def find_settings(
    recipe: Recipe,
    *,
    seconds: float,
    out: Path | None = None,
    resume: bool = False,
    replace_finished: bool = True,
    most: int | None = None,
    progress: Progress | None = None,
) -> Searched:
    """Search for at most `seconds`, also within a trial, or `most` trials, and return the recipe
    with the best trial's numbers. RecipeError where nothing is "auto" or nothing can be measured.
    """
    progress = progress if progress is not None else Progress()
    folder = Path(recipe.out if out is None else out)
    keys = [key for key, value in flat(recipe) if value == "auto" and _searched(key, recipe)]
    if not keys:
        raise RecipeError(
            "a search has nothing to look for: the recipe gives every number",
            fix='Set learning_rate, epochs or rank to "auto", or leave them out.',
        )
    if any(stage.batch_size == "auto" for stage in recipe.stage):
        raise RecipeError(
            'a search needs batch_size as a number: what "auto" measures may change from one trial'
            " to the next",
            fix="Give a number of rows.",
        )
    if launched().size > 1:
        raise TrainingError(
            "a search runs in one process",
            fix="Search in one, then train its recipe.toml in several.",
        )
    check_replaceable(folder, finished=replace_finished or resume)
    with unfinished(folder, keep=recipe.keep_checkpoints, say=progress.say) as checkpoints:
        inputs = read_inputs(recipe)
        if not inputs.sets[-1].validation:
            raise RecipeError(
                "a search needs validation rows, by which trials are compared",
                where=f"stage.{len(recipe.stage) - 1}.data",
                fix="Name them as validation, or set hold_out.",
            )
        origin = {**inputs.origin(processes=1), "searched": ", ".join(keys)}
        finished = folder / TRIALS
        path = checkpoints.folder / TRIALS
        if resume and not path.exists() and finished.exists():
            path = finished
        trials = TrialFile.open(path, origin, resume=resume)
        search = _Search(recipe, inputs, keys, trials, seconds, most or sys.maxsize, progress)
        if trials.chosen is None:
            try:
                trials.choose(search.run())
            except BaseException:
                progress.say(
                    f"{len(trials.records)} trials are kept in {path}; --search with --resume goes"
                    " on from there"
                )
                raise
    facts = search.facts()
    progress.say(
        f"search: {facts['trials']} trials in {duration(facts['seconds'])}, {facts['ended_early']}"
        f" ended early; chosen: {_words(facts['settings'])}"
        + ("" if facts["best"] is None else f" ({facts['metric']} {facts['best']:.4f})")
    )
    return Searched(with_settings(recipe, facts["settings"] | search.points()), path, facts)


def _searched(key: str, recipe: Recipe) -> bool:
    return key.endswith((".learning_rate", ".epochs")) or (
        key == "parameters.rank" and recipe.parameters.train == "lora"
    )


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in settings.items())


@dataclass
class _Search:
    recipe: Recipe
    inputs: Inputs
    keys: Sequence[str]
    trials: TrialFile
    seconds: float
    most: int
    progress: Progress
    precisions: list[str] | None = None
    metric: str = ""
    pace: Pace = field(default_factory=Pace)

    def run(self) -> dict[str, Any]:
        """Try until the time is over; the settings to train with."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        rule = {key: dict(flat(self.inputs.recipe))[key] for key in self.keys}
        space = {key: _distribution(key, value) for key, value in rule.items()}
        self.metric = self.trials.metric
        deadline = time.monotonic() + self.seconds - self.trials.seconds
        pruner = optuna.pruners.MedianPruner(STARTUP, n_warmup_steps=STARTUP)
        study = None
        while len(self.trials.records) < self.most:
            # a trial that could not come to its first validation would measure nothing
            if time.monotonic() + self._first_validation() >= deadline:
                break
            number = len(self.trials.records)
            # proposals follow from the trials before and the number, so a resumed search has them
            sampler = optuna.samplers.TPESampler(seed=self.recipe.seed + number)
            if study is None:
                study = optuna.create_study(sampler=sampler, pruner=pruner)
                for record in self.trials.records:
                    study.add_trial(_past(record, space))
            study.sampler = sampler
            if number == 0:
                study.enqueue_trial(self._first(rule))
            self._try(study, study.ask(space), number, deadline)
        return self._best() or self._settings(rule)

    def _first_validation(self) -> float:
        """Seconds that the quickest trial needed to be measured once; 0 before there is one."""
        known = (record.get("first_validation_seconds") for record in self.trials.records)
        return min((seconds for seconds in known if seconds is not None), default=0.0)

    def _first(self, rule: Mapping[str, float]) -> dict[str, float]:
        """The rule's numbers, as a proposal."""
        return {k: round(value) if k.endswith("epochs") else value for k, value in rule.items()}

    def _try(self, study: Any, trial: Any, number: int, deadline: float) -> None:
        """One trial, to its line in the file."""
        settings = self._settings(trial.params)
        started, curve = time.monotonic(), list[list[float]]()
        first = math.inf  # seconds to its first validation

        def seen(metrics: Mapping[str, Any]) -> None:
            self.metric = self.metric or best_by(
                self.recipe.stage[-1].learned,
                metrics,
                weighted=self.recipe.stage[-1].class_weights != "none",
            )
            nonlocal first
            first = min(first, time.monotonic() - started)
            value = float(metrics[self.metric])
            curve.append([metrics["step"], value])
            if math.isfinite(value):
                trial.report(self._cost(value), len(curve))
            if trial.should_prune():
                raise _HopelessError

        state = "complete"
        try:
            self._train(with_settings(self.inputs.recipe, settings), seen, deadline)
        except OutOfTimeError:
            state = "out of time"
        except _HopelessError:
            state = "killed"
        except TrainingError as error:
            state = f"failed: {error.what}"
        values = [value for _, value in curve if math.isfinite(value)]
        best = min(values, key=self._cost, default=None)
        if state == "complete" and best is None:
            state = "failed: no validation gave a number"
        record = {
            "number": number,
            "settings": settings,
            "parameters": trial.params,
            "state": state,
            "value": best,
            "curve": curve,
            "seconds": time.monotonic() - started,
            "first_validation_seconds": None if math.isinf(first) else first,
        }
        self.trials.add(record, metric=self.metric)
        study.tell(trial, **_told(record, self._cost))
        shown = "nothing measured" if best is None else f"{self.metric} {best:.4f}"
        self.progress.say(
            f"trial {number}: {_words(settings)}: {shown}, {state}, {duration(record['seconds'])}"
        )

    def _train(
        self, recipe: Recipe, seen: Callable[[Mapping[str, Any]], None], deadline: float
    ) -> None:
        """The stages of a trial, in memory alone."""
        device = choose_device(recipe.device)
        with run_settings(recipe):
            inputs = replace(self.inputs, recipe=recipe)
            run = resolve(inputs, device=device, group=Group(), precisions=self.precisions)
            self.precisions = [stage.precision for stage in run.stages]
            last = run.stages[-1]
            last = replace(last, validate_every=max(1, -(-last.total_steps // POINTS)))
            run = replace(run, stages=(*run.stages[:-1], last))
            model = first_model(run, Group())
            watching = TrialProgress(self.progress, deadline, self.pace, last)
            journal = TrialJournal(last.index, seen, watching)
            course = Course(
                model.learning, run.stages, {}, journal, Group(), None, None, time.perf_counter()
            )
            with Stages(run, model, journal, watching, Group()) as stages:
                course.run(stages.run)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers as the recipe takes them: a rate of three digits, alpha twice the rank."""
        settings = {
            key: float(f"{value:.2e}")
            if key.endswith("rate")
            else float(value)
            if key.endswith("epochs")
            else int(value)
            for key, value in params.items()
        }
        if "parameters.rank" in settings and self.recipe.parameters.alpha == "auto":
            settings["parameters.alpha"] = 2.0 * settings["parameters.rank"]
        return settings

    def _cost(self, value: float) -> float:
        return value if lower_is_better(self.metric) else -value

    def _best(self) -> dict[str, Any] | None:
        """The settings of the best trial that came to its end; where none did, of the best."""
        self.metric = self.trials.metric
        measured = [r for r in self.trials.records if r["value"] is not None]
        whole = [r for r in measured if r["state"] == "complete"]
        best = min(whole or measured, key=lambda r: self._cost(r["value"]), default=None)
        return None if best is None else dict(best["settings"])

    def points(self) -> dict[str, int]:
        """Where the chosen trial was measured, so that the run keeps what the trial's figure is of;
        not where the recipe says where.
        """
        if self.recipe.stage[-1].validate_every is not None:
            return {}
        curves = [r["curve"] for r in self.trials.records if r["settings"] == self.trials.chosen]
        key = f"stage.{len(self.recipe.stage) - 1}.validate_every"
        return {key: int(curves[0][0][0])} if curves and curves[0] else {}

    def facts(self) -> dict[str, Any]:
        """For summary.json."""
        records, chosen = self.trials.records, self.trials.chosen or {}
        values = [r["value"] for r in records if r["settings"] == chosen]
        return {
            "trials": len(records),
            "ended_early": sum(record["state"] != "complete" for record in records),
            "seconds": self.trials.seconds,
            "at_most_seconds": self.seconds,
            "metric": self.trials.metric,
            "best": values[0] if values else None,
            "settings": chosen,
        }


def _distribution(key: str, rule: float) -> Any:
    """Where a setting is looked for."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if key.endswith("rate"):
        return FloatDistribution(rule / AWAY, rule * AWAY, log=True)
    if key.endswith("epochs"):
        return IntDistribution(1, max(3, 2 * round(rule)), log=True)
    return CategoricalDistribution(RANKS)


def _told(record: Mapping[str, Any], cost: Callable[[float], float]) -> dict[str, Any]:
    """How a trial ended, in Optuna's words. What ended early counts with its curve."""
    from optuna.trial import TrialState

    if record["state"] == "complete":
        return {"values": cost(record["value"])}
    early = record["state"] in ("killed", "out of time") and record["curve"]
    return {"state": TrialState.PRUNED if early else TrialState.FAIL}


def _past(record: Mapping[str, Any], space: Mapping[str, Any]) -> Any:
    """A trial of the file, for a study that goes on."""
    import optuna

    metric = record["metric"]

    def cost(value: float) -> float:
        return value if lower_is_better(metric) else -value

    told = _told(record, cost)
    return optuna.trial.create_trial(
        state=told.get("state", optuna.trial.TrialState.COMPLETE),
        values=[told["values"]] if "values" in told else None,
        params=dict(record["parameters"]),
        distributions=dict(space),
        intermediate_values={
            at: cost(value)
            for at, (_, value) in enumerate(record["curve"], start=1)
            if math.isfinite(value)
        },
    )
