"""What scores a policy's answers: Python functions, and reward adapters on the policy's own
base.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgetune.adapters.runs import find_adapter
from edgetune.core.errors import EdgetuneError, RecipeError, TrainingError
from edgetune.core.files import sha256_file
from edgetune.core.layout import ADAPTER_METADATA
from edgetune.data.conversations import Prompt, last_turn
from edgetune.models.base import Base
from edgetune.models.torch_device import Precision
from edgetune.recipe.own_settings import Grpo
from edgetune.recipe.paths import split_function
from edgetune.training.reinforcement.reward_adapter import check_reward_adapter, reward_adapter

RewardFunction = Callable[[str, str, dict[str, Any]], float]  # (prompt, completion, row) → reward


@dataclass(frozen=True)
class Answered:
    """An answer to score."""

    prompt: Prompt
    completion: str
    values: Mapping[str, Any]  # the row's columns
    row: int  # its line in the data file


class Scorer(Protocol):
    """Something that scores answers."""

    name: str

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        """A finite number for each answer."""


class FunctionScorer:
    """A user's function, every answer by itself."""

    def __init__(self, name: str, function: RewardFunction) -> None:
        self.name, self.function = name, function

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        """TrainingError when the function raises or returns anything but a finite number."""
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answered) -> float:
        try:
            value = self.function(last_turn(answer.prompt), answer.completion, dict(answer.values))
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise self._error(f"raised {type(error).__name__}: {line}", answer) from error
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise self._error(f"returned {value!r:.60}", answer, expected="a finite number")
        return float(value)

    def _error(self, what: str, answer: Answered, *, expected: str = "") -> TrainingError:
        shown = answer.completion if len(answer.completion) <= 60 else answer.completion[:59] + "…"
        return TrainingError(
            f"the reward function {what}",
            where=f"{self.name}, row {answer.row} of the data file",
            expected=expected,
            got=f"completion {shown!r}",
            fix="A reward function must score every completion, also an empty or a broken one.",
        )


@dataclass(frozen=True)
class Rewards:
    """Several scorers and their weights."""

    scorers: tuple[Scorer, ...]
    weights: tuple[float, ...]

    def __call__(self, answers: Sequence[Answered]) -> tuple[list[float], dict[str, list[float]]]:
        """The weighted sum for each answer, and each scorer's own scores."""
        scores = {scorer.name: scorer(answers) for scorer in self.scorers}
        totals = [0.0] * len(answers)
        for values, weight in zip(scores.values(), self.weights, strict=True):
            totals = [total + weight * value for total, value in zip(totals, values, strict=True)]
        return totals, scores


def check_rewards(grpo: Grpo, base: Base) -> None:
    """RecipeError or AdapterError for a reward that cannot be loaded."""
    for name in grpo.rewards:
        if split_function(name) is not None:
            load_function(name)
        else:
            check_reward_adapter(Path(name), base)


def reward_digests(grpo: Grpo) -> dict[str, str]:
    """sha256 of every function's file and of every adapter's description, which holds the digests
    of its files.
    """
    digests: dict[str, str] = {}
    for name in grpo.rewards:
        function_of = split_function(name)
        file = (
            find_adapter(Path(name)) / ADAPTER_METADATA
            if function_of is None
            else getattr(_load_module(function_of[0], name), "__file__", None)
        )
        if file is not None:  # a module that is built in has none
            digests[f"reward {name}"] = sha256_file(Path(file))
    return digests


def reward_notes(grpo: Grpo, base: Base) -> Iterator[str]:
    """A line for each reward adapter that learned on the base rounded otherwise than it is for this
    policy.
    """
    for name in grpo.rewards:
        if split_function(name) is None:
            recorded = check_reward_adapter(Path(name), base)[1].get("base_precision")
            theirs, ours = (
                recorded and recorded["weights"],
                base.precision and base.precision.weights,
            )
            if theirs != ours:
                yield (
                    f"the reward {name} was trained on the {theirs or 'unrounded'} base and scores"
                    f" on the {ours or 'unrounded'} one, as the policy does"
                )


@contextlib.contextmanager
def open_rewards(
    grpo: Grpo, model: Any, tokenizer: Any, base: Base, *, precision: Precision = "fp32"
) -> Iterator[Rewards]:
    """The rewards; reward adapters are on the model for as long as this is open."""
    names = grpo.rewards
    labels = _labels(names)
    weights = grpo.reward_weights or (1.0,) * len(names)
    with contextlib.ExitStack() as stack:
        scorers: list[Scorer] = []
        for number, (name, label) in enumerate(zip(names, labels, strict=True)):
            if split_function(name) is not None:
                scorers.append(FunctionScorer(label, load_function(name)))
            else:
                opened = reward_adapter(
                    Path(name),
                    model,
                    tokenizer,
                    base,
                    name=f"reward{number}",
                    label=label,
                    precision=precision,
                )
                scorers.append(stack.enter_context(opened))
        yield Rewards(tuple(scorers), weights)


def load_function(name: str) -> RewardFunction:
    """The function that `module:function` or `file.py:function` names. RecipeError when there is
    none.
    """
    function_of = split_function(name)
    if function_of is None:
        raise RecipeError(
            "not a reward function", got=name, expected='"module:function" or "file.py:function"'
        )
    place, attribute = function_of
    module = _load_module(place, name)
    function = getattr(module, attribute, None)
    if not callable(function):
        found = sorted(
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and not key.startswith("_")
        )
        raise RecipeError(
            f"there is no function {attribute!r} in {place}",
            where="reward",
            got=name,
            expected=f"one of {', '.join(found) or '(none)'}",
        )
    try:
        inspect.signature(function).bind("prompt", "completion", {})
    except TypeError as error:
        expected = "a function (prompt: str, completion: str, row: dict) -> float"
        raise RecipeError(
            f"{attribute} cannot be called with three values: {error}",
            where="reward",
            got=name,
            expected=expected,
        ) from error
    except ValueError:
        pass  # built in, without a signature to look at
    checked: RewardFunction = function
    return checked


def _load_module(place: str, name: str) -> Any:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place)
        if not path.is_file():
            raise RecipeError("there is no such file", where="reward", got=name)
        spec = importlib.util.spec_from_file_location(f"edgetune_reward_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise RecipeError("not a Python file", where="reward", got=name)
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))  # its own imports may lie beside it
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
        return module
    except EdgetuneError:
        raise
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise RecipeError(
            f"the reward's module cannot be loaded: {type(error).__name__}: {line}",
            where="reward",
            got=name,
            expected="a module of Python's path, or one beside the recipe",
        ) from error


def _labels(names: Sequence[str]) -> list[str]:
    """Short names for logs: the function, or the run folder; numbered where they would be the
    same.
    """
    short = [(split_function(name) or ("", Path(name).name))[1] for name in names]
    return [label if short.count(label) == 1 else f"{label}{at}" for at, label in enumerate(short)]
