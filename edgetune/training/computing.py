"""A batch's loss as the loop computes it: the number format, and the fused functions where all weights are in one process."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from edgetune.batching import Batch
from edgetune.objectives import Objective
from edgetune.training.device import device_of
from edgetune.training.fused_lora import fused_lora
from edgetune.training.fused_ops import fused_ops
from edgetune.training.precision import Precision, autocast
from edgetune.training.shares import Shares


def loss_of(objective: Objective, model: Any, batch: Batch, *, precision: Precision, shares: Shares | None = None) -> Tensor:
    """The mean loss of a batch. A model in shares computes without fused functions: they look at a layer's weights while
    these are spread."""
    if shares is not None:
        with autocast(precision, device_of(model)):
            return shares.loss(objective, batch)[0]
    with autocast(precision, device_of(model)), fused_lora(model, precision), fused_ops(model):
        return objective(model, batch)[0]
