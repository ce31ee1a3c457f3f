"""Which weights learn: what of `[parameters]` goes together, and with which method. No torch
here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edgetune.core.errors import RecipeError
from edgetune.core.tasks import CLASSIFICATION, METHODS
from edgetune.core.templates import referred_column
from edgetune.recipe.confidence import can_calibrate
from edgetune.recipe.own_settings import stages_of
from edgetune.recipe.parameters import ALPHA, RANK
from edgetune.recipe.paths import split_function
from edgetune.recipe.schema import Data, Recipe, Stage

if TYPE_CHECKING:
    from edgetune.recipe.own_settings import Grpo
    from edgetune.recipe.schema import Parameters


SETTLED = {"rank": RANK, "alpha": ALPHA}  # in the recipe.toml of every run
INIT = re.compile(r"default|gaussian|orthogonal|olora|loftq|pissa(_niter_[1-9]\d*)?")
UNUSABLE_INITS = {
    "corda": "it needs calibration data that a recipe has no place for",
    "eva": "it needs calibration data that a recipe has no place for",
    "lora_ga": "it needs gradients of calibration data that a recipe has no place for",
}


def check_parameters(parameters: Parameters, *, where: str) -> None:
    """RecipeError for settings of an adapter where there is none, an unknown `init`, layers that
    are no range.
    """
    if parameters.train == "full" and parameters.base_precision is not None:
        raise RecipeError(
            f'parameters.base_precision = "{parameters.base_precision}" has no meaning with train ='
            ' "full"',
            where=where,
            expected="a base that stays as it ships, beside what learns",
            fix='Remove base_precision, or use parameters.train = "lora".',
        )
    if parameters.shard and parameters.train != "full":
        raise RecipeError(
            f'parameters.shard has no meaning with train = "{parameters.train}"',
            where=where,
            expected='train = "full", whose optimizer state is worth spreading',
            fix=(
                "Remove shard: several processes each keep the frozen base, and an adapter is"
                " small."
            ),
        )
    if parameters.train != "lora":
        _check_no_adapter_settings(parameters, where=where)
    layers = parameters.layers
    if layers is not None and not (len(layers) == 2 and 0 <= layers[0] <= layers[1]):
        raise RecipeError(
            "parameters.layers is no range",
            where=where,
            expected="[first, last], counted from 0",
            got=str(list(layers)),
        )
    if parameters.start is not None and parameters.init != "default":
        raise RecipeError(
            f'parameters.init = "{parameters.init}" has no meaning with parameters.start',
            where=where,
            expected="one beginning: the adapter that start names, or a fresh one",
            fix="Remove one of them.",
        )
    if parameters.init == "loftq" and parameters.base_precision is None:
        raise RecipeError(
            'parameters.init = "loftq" starts from what rounding the base loses, and this base is'
            " not rounded",
            where=where,
            expected='base_precision = "int4" or "int8"',
            got="base_precision not set",
            fix="Set parameters.base_precision, or remove init.",
        )
    if INIT.fullmatch(parameters.init):
        return
    reason = UNUSABLE_INITS.get(parameters.init)
    raise RecipeError(
        f'parameters.init = "{parameters.init}" '
        + ("cannot be used: " + reason if reason else "is not known"),
        where=where,
        expected="default, gaussian, orthogonal, olora, pissa, pissa_niter_N or loftq",
    )


def check_trained(parameters: Parameters, stage: Stage, *, path: str, where: str) -> None:
    """RecipeError when a head alone shall learn and the method has none that could, or when the
    method needs the base unchanged beside what learns and the parameters leave none."""
    expected = ""
    if parameters.train == "head" and not METHODS[stage.method].has_head:
        headed = [name for name, method in METHODS.items() if method.has_head]
        expected = "a method with a task head: " + ", ".join(headed)
    if parameters.train == "full" and stage.method == "reward":
        expected = "an adapter, which scores answers on the base that it shares with a policy"
    if parameters.shard and stage.method == "grpo":
        raise RecipeError(
            f'parameters.shard does not fit {path}.method = "grpo"',
            where=where,
            expected="a policy that is whole where answers are sampled",
            fix="Remove shard.",
        )
    if expected:
        raise RecipeError(
            f'parameters.train = "{parameters.train}" does not fit {path}.method ='
            f' "{stage.method}"',
            where=where,
            expected=expected,
            fix='Use parameters.train = "lora".',
        )
    key = (
        "train"
        if parameters.train == "full"
        else "init"
        if changes_the_base(parameters.init)
        else None
    )
    needed = None if stage.grpo is None else next(_needs_the_base(stage.grpo), None)
    if key is not None and needed is not None:
        setting, fix = needed
        raise RecipeError(
            f"{path}.grpo.{setting} needs the base as it ships beside the policy",
            where=where,
            expected="an adapter that leaves it as it is",
            got=f'parameters.{key} = "{getattr(parameters, key)}"',
            fix=f"{fix}, or remove {key}.",
        )


def check_problem(stage: Stage, *, path: str, where: str) -> None:
    """RecipeError where classes share no probability mass and it shall be spread over them all the
    same, or where a column of lists is given as a template."""
    if stage.problem != "single-label" and stage.label_smoothing:
        raise RecipeError(
            f'{path}.label_smoothing has no meaning with problem = "{stage.problem}"',
            where=where,
            fix="Remove label_smoothing.",
        )
    if stage.problem != "single-label" and stage.data.label_names:
        raise RecipeError(
            f'{path}.data.label_names has no meaning with problem = "{stage.problem}"',
            where=where,
            fix="Remove label_names.",
        )
    if stage.data.text_pair is not None and stage.data.label_names:
        raise RecipeError(
            f"{path}.data.label_names has no meaning with text_pair: a label's name is one text",
            where=where,
            fix="Remove label_names.",
        )
    if stage.class_weights != "none" and (
        not METHODS[stage.method].has_head or stage.problem == "regression"
    ):
        what = f'problem = "{stage.problem}"' if METHODS[stage.method].has_head else stage.method
        raise RecipeError(
            f"{path}.class_weights has no meaning for {what}",
            where=where,
            expected="a stage that learns labels",
            fix="Remove class_weights.",
        )
    if isinstance(stage.data.label, tuple) and stage.problem != "multi-label":
        raise RecipeError(
            f"{path}.data.label lists columns, which only several labels a row can have",
            where=where,
            expected="one column or template",
            fix='Name one column, or set problem = "multi-label".',
        )
    if stage.data.normalise_labels and stage.problem != "single-label":
        raise RecipeError(
            f'{path}.data.normalise_labels has no meaning with problem = "{stage.problem}"',
            where=where,
            fix="Remove normalise_labels.",
        )
    lists = {"tokens": stage.data.tokens, "tags": stage.data.tags} | (
        {"label": stage.data.label}
        if stage.problem == "multi-label" and isinstance(stage.data.label, str)
        else {}
    )
    for key, value in lists.items():
        if value is not None and column_name(value) is None:
            raise RecipeError(
                f"{path}.data.{key} is no column's name",
                where=where,
                expected="the name of a column that holds a list",
                got=repr(value),
            )


def column_name(given: str) -> str | None:
    """The column that `name`, `{{ name }}` or `{{ row["name"] }}` names; None for any other
    template.
    """
    found = re.fullmatch(r"\s*(?:\{\{\s*(\w[\w -]*?)\s*\}\}|([^{}%]+?))\s*", given)
    return (found and (found[1] or found[2])) or referred_column(given)


def changes_the_base(init: str) -> bool:
    """Whether PEFT subtracts the start of the adapter from the base weights while it trains."""
    return init.startswith(("pissa", "olora"))


def check_forgetting(recipe: Recipe, *, where: str) -> None:
    """RecipeError where general ability shall be measured of something that predicts no text."""
    if recipe.forgetting is not None and recipe.task == "reward":
        expected = "a decoder that predicts text, or an encoder"
        raise RecipeError(
            "[forgetting] has no meaning for reward",
            where=where,
            expected=expected,
            fix="Remove [forgetting].",
        )


def check_confidence(recipe: Recipe, *, where: str) -> None:
    """RecipeError for a table that means nothing to the last stage."""
    asked, stage = recipe.confidence, recipe.stage[-1]
    if asked is None:
        return
    if stage.method == "sft" and not asked.has_threshold and asked.out_of_scope is None:
        return
    if not can_calibrate(stage.task, stage.problem):
        what = stage.method if stage.problem == "single-label" else f"problem = {stage.problem!r}"
        raise RecipeError(
            f"[confidence] has no meaning for {what}",
            where=where,
            expected="labels: sequence-classification or token-classification",
            fix="Remove it.",
        )
    single = stage.task == CLASSIFICATION and stage.problem == "single-label"
    for name in ("target", "answered", "out_of_scope"):
        if getattr(asked, name) is not None and not single:
            raise RecipeError(
                f"confidence.{name} has no meaning where a text has several labels or tags",
                where=where,
                expected="one label a row",
                fix=f"Remove {name}.",
            )
    held_out = stage.data.validation is not None or stage.data.hold_out != 0
    if asked.has_threshold and not held_out:
        raise RecipeError(
            "a threshold is chosen on validation rows, and there are none",
            where=where,
            expected=f"stage.{len(recipe.stage) - 1}.data.validation or data.hold_out",
            fix="Remove data.hold_out = 0.",
        )
    if asked.has_threshold and not asked.calibrate:
        raise RecipeError(
            "confidence.calibrate = false leaves scores that no threshold is chosen for",
            where=where,
            fix="Remove calibrate, or target and answered.",
        )


def _needs_the_base(grpo: Grpo) -> Iterator[tuple[str, str]]:
    """The settings of grpo that use the base beside the policy, and what to do without."""
    if grpo.kl and grpo.kl_to == "base":
        yield 'kl_to = "base"', 'Set kl_to = "start" or kl = 0'
    for name in grpo.rewards:
        if split_function(name) is None:
            yield f'reward = "{name}"', "Name reward functions, module:function"
    if grpo.rollout == "engine":
        yield 'rollout = "engine"', 'Set rollout = "torch"'


def _check_no_adapter_settings(parameters: Parameters, *, where: str) -> None:
    default = type(parameters)()
    for field in dataclasses.fields(parameters):
        fits_a_head = field.name in ("base_precision", "start") and parameters.train == "head"
        allowed = (getattr(default, field.name), SETTLED.get(field.name))
        if (
            field.name not in ("train", "base_precision", "shard")
            and not fits_a_head
            and getattr(parameters, field.name) not in allowed
        ):
            raise RecipeError(
                f'parameters.{field.name} has no meaning with train = "{parameters.train}"',
                where=where,
                expected='an adapter\'s setting only with train = "lora"',
                fix=f"Remove {field.name}.",
            )


def _check_stage(stage: Stage, previous: Stage | None, *, path: str, where: str) -> None:
    if previous is not None and not _may_follow(stage, previous):
        raise RecipeError(
            f'{path}.method = "{stage.method}" cannot follow "{previous.method}"',
            where=where,
            expected="stages of one task, on encoders after masked-lm or contrastive",
            fix="Split this into two recipes.",
        )
    if stage.data.validation is not None and stage.data.hold_out:
        what = f"{path}.data has both validation and hold_out"
        raise RecipeError(what, where=where, fix="Remove one of them.")
    used = METHODS[stage.method].columns
    for key in sorted({key for method in METHODS.values() for key in method.columns} - {*used}):
        if getattr(stage.data, key) != getattr(Data, key):
            raise RecipeError(
                f"{path}.data.{key} has no meaning for {stage.method}",
                where=where,
                expected="of these, " + ", ".join(used),
                fix=f"Remove {key}.",
            )
    _check_rewards(stage, path=path, where=where)
    check_problem(stage, path=path, where=where)


def check_own_settings(values: Mapping[str, Any], *, where: str) -> None:
    """RecipeError for a setting or a table that only another method than the stage's has."""
    for number, stage in stages_of(values):
        for name, method in METHODS.items():
            for key in method.settings:
                if stage.get("method") != name and stage.get(key) not in (
                    None,
                    getattr(Stage, key),
                ):
                    raise RecipeError(
                        f"stage.{number}.{key} has no meaning for {stage.get('method')}",
                        where=where,
                        expected=f"only with {name}",
                        fix=f"Remove {key if key != name else f'[stage.{key}]'}.",
                    )


def _check_rewards(stage: Stage, *, path: str, where: str) -> None:
    grpo = stage.grpo
    if grpo is None:
        return
    if not all(grpo.rewards or ("",)):
        raise RecipeError(
            f"{path}.grpo.reward is empty",
            where=where,
            expected='the run folder of a reward stage, or "module:function"',
            fix='For example reward = "rewards.py:score".',
        )
    if grpo.reward_weights is not None and len(grpo.reward_weights) != len(grpo.rewards):
        raise RecipeError(
            f"{path}.grpo.reward_weights must weigh each reward",
            where=where,
            expected=f"{len(grpo.rewards)} numbers",
            got=str(len(grpo.reward_weights)),
        )


def _may_follow(stage: Stage, previous: Stage) -> bool:
    """One adapter has one task; on an encoder, text and embeddings may come first, for they need no
    head that is the adapter's.
    """
    same = stage.task == previous.task and stage.problem == previous.problem
    on_encoders = "encoder" in METHODS[stage.method].kinds
    embeds_before = previous.method == "contrastive" and stage.method != "masked-lm"
    return same or (on_encoders and (previous.method == "masked-lm" or embeds_before))


KIND = "encoder-decoder"


def check_recipe(recipe: Recipe) -> None:
    """RecipeError for what an encoder-decoder has no place for, beyond the methods that do not fit
    it.
    """
    if recipe.forgetting is not None:
        raise RecipeError(
            "[forgetting] measures how a model goes on with a text, which an encoder-decoder"
            " does not",
            fix="Remove [forgetting].",
        )
    for number, stage in enumerate(recipe.stage):
        if stage.replay is not None:
            raise RecipeError(
                f"stage[{number}].replay is general text to go on with, which an encoder-decoder"
                " does not",
                fix="Remove replay.",
            )
