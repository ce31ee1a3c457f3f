"""How the training computes a batch: format of the products, fused functions, beginnings that rows share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from edgetune.batching import Batch
from edgetune.training.device import device_of
from edgetune.training.fused_lora import fused_lora
from edgetune.training.fused_ops import fused_ops
from edgetune.training.precision import Precision, autocast
from edgetune.training.prefix_sharing import prefixes_shared


@contextlib.contextmanager
def computing(model: Any, batch: Batch, precision: Precision) -> Iterator[None]:
    """For forward passes over `batch`, which is on the model's device."""
    with autocast(precision, device_of(model)), fused_lora(model, precision), fused_ops(model), prefixes_shared(model, batch):
        yield
