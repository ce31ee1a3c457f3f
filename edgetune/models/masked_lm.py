"""An encoder with its masked-language-model head: the checkpoint's own where it has one, else a new
one.

A new head is the architecture's: a transform layer, and a projection tied to the input embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgetune.models.base import Base
from edgetune.models.fake_quantise import round_weights
from edgetune.models.heads import unwrapped
from edgetune.models.load import load_for, refuse_missing


def load_masked_lm(base: Base, *, seed: int) -> tuple[Any, bool]:
    """transformers' …ForMaskedLM in float32 and evaluation mode, and whether its head is new (drawn
    with the seed).
    """
    model, missing = load_for(base, "fill-mask")
    refuse_missing(
        [name for name in missing if name.startswith(f"{model.base_model_prefix}.")], base
    )
    _draw(model, missing, seed=seed)
    if base.precision is not None:
        round_weights(model.base_model, base.precision)
    return model.eval(), bool(missing)


@torch.no_grad()
def _draw(model: Any, missing: set[str], *, seed: int) -> None:
    """BERT's own start for the head's missing weights, in the order of the model: transformers
    takes them in the order of a set of names, which is another one in every process."""
    generator = torch.Generator().manual_seed(seed)
    heads = {id(parameter) for parameter in head_parameters(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in heads or name not in missing:
            continue
        if parameter.ndim >= 2:
            parameter.normal_(
                std=getattr(model.config, "initializer_range", 0.02), generator=generator
            )
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def exchange_body(model: Any, body: nn.Module) -> None:
    """Let the head read `body` instead of the body it came with; a tied projection follows."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    setattr(model, model.base_model_prefix, body)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


def head_parameters(model: Any) -> list[nn.Parameter]:
    """The weights of the head: those that are not the body's; a tied projection is the body's."""
    inner = unwrapped(model)
    in_body = {id(parameter) for parameter in inner.base_model.parameters()}
    return [parameter for parameter in inner.parameters() if id(parameter) not in in_body]
