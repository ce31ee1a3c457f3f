"""Training against rounded weights: products see the codes, the optimizer moves what they round
(the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from edgetune.core.layout import PEFT_PREFIX
from edgetune.export.inputs.small_adapter import Factors, round_factors

ADAPTER = "default"


@dataclass
class Masters:
    """Unrounded A (r, in) and B (out, r) of every module."""

    parameters: Mapping[str, tuple[nn.Parameter, nn.Parameter]]
    values: dict[str, tuple[Tensor, Tensor]]


def factors_on(model: Any) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Module → A and B of a PEFT model's adapter."""
    return {
        name.removeprefix(PEFT_PREFIX): (
            module.lora_A[ADAPTER].weight,
            module.lora_B[ADAPTER].weight,
        )
        for name, module in model.named_modules()
        if ADAPTER in getattr(module, "lora_A", {})
    }


@contextlib.contextmanager
def rounded_weights(model: Any, bits: int) -> Iterator[Masters]:
    """Inside the block every optimizer step moves the unrounded weights, and leaves the model with
    what their codes stand for; gradients are taken there. Yields the unrounded ones.
    """
    parameters = factors_on(model)
    masters = Masters(parameters, {})
    _keep_and_round(masters, bits)

    def before(*_: Any) -> None:
        _put(masters.parameters, masters.values)

    def after(*_: Any) -> None:
        _keep_and_round(masters, bits)

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield masters
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _put(
    parameters: Mapping[str, tuple[nn.Parameter, nn.Parameter]],
    values: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    for module, pair in parameters.items():
        for parameter, value in zip(pair, values[module], strict=True):
            parameter.copy_(value)


@torch.no_grad()
def _keep_and_round(masters: Masters, bits: int) -> None:
    """Keep the weights as they are now, and round the model's."""
    for module, (a, b) in masters.parameters.items():
        masters.values[module] = a.detach().clone(), b.detach().clone()
    rounded = round_factors(
        {module: Factors(a, b) for module, (a, b) in masters.values.items()}, bits
    )
    _put(masters.parameters, {module: (own.a, own.b) for module, own in rounded.items()})
