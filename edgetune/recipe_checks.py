"""Which weights learn: what of `[parameters]` goes together, and with which method."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from edgetune.errors import RecipeError

if TYPE_CHECKING:
    from edgetune.recipe import Parameters

INIT = re.compile(r"default|gaussian|orthogonal|olora|pissa(_niter_[1-9]\d*)?")
UNUSABLE_INITS = {
    "loftq": "it starts from a quantised base whose rounding error has full rank, so no adapter for the base that ships "
    "equals what was trained",
    "corda": "it needs calibration data that a recipe has no place for",
    "eva": "it needs calibration data that a recipe has no place for",
    "lora_ga": "it needs gradients of calibration data that a recipe has no place for",
}
HEADED = ("sequence-classification",)  # methods whose task head can be trained alone


def check_parameters(parameters: Parameters, *, where: str) -> None:
    """RecipeError for settings of an adapter where there is none, an unknown `init`, layers that are no range."""
    if parameters.train != "lora":
        _check_no_adapter_settings(parameters, where=where)
    layers = parameters.layers
    if layers is not None and not (len(layers) == 2 and 0 <= layers[0] <= layers[1]):
        raise RecipeError(
            "parameters.layers is no range", where=where, expected="[first, last], counted from 0", got=str(list(layers))
        )
    if INIT.fullmatch(parameters.init):
        return
    reason = UNUSABLE_INITS.get(parameters.init)
    raise RecipeError(
        f'parameters.init = "{parameters.init}" ' + ("cannot be used: " + reason if reason else "is not known"),
        where=where,
        expected="default, gaussian, orthogonal, olora, pissa or pissa_niter_N",
    )


def check_trained(parameters: Parameters, method: str, *, path: str, where: str) -> None:
    """RecipeError when a head alone shall learn, and the method has none that could."""
    if parameters.train == "head" and method not in HEADED:
        raise RecipeError(
            f'parameters.train = "head" does not fit {path}.method = "{method}"',
            where=where,
            expected="a method with a task head: " + ", ".join(HEADED),
            fix='Use parameters.train = "lora".',
        )


def _check_no_adapter_settings(parameters: Parameters, *, where: str) -> None:
    default = type(parameters)()
    for field in dataclasses.fields(parameters):
        if field.name != "train" and getattr(parameters, field.name) != getattr(default, field.name):
            raise RecipeError(
                f'parameters.{field.name} has no meaning with train = "{parameters.train}"',
                where=where,
                expected="an adapter's setting only with train = \"lora\"",
                fix=f"Remove {field.name}.",
            )
