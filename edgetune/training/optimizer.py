"""AdamW with its parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from edgetune.errors import TrainingError
from edgetune.heads import HEADS, unwrapped
from edgetune.masked_lm import head_parameters


def build_optimizer(
    model: nn.Module, *, learning_rate: float, head_learning_rate: float | None, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the weights that learn; no decay on vectors (biases, norms, DoRA magnitudes) nor on the head.

    Each group remembers its peak rate as `peak`, which the schedule scales.
    """
    heads = _head_ids(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_head = not set(HEADS).isdisjoint(name.split(".")) or id(parameter) in heads
        peak = head_learning_rate if in_head and head_learning_rate is not None else learning_rate
        decay = weight_decay if parameter.ndim >= 2 and not in_head else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    if not groups:
        raise TrainingError("no weight of this model learns", fix="Choose other target_modules.")
    return torch.optim.AdamW(
        [
            {"params": params, "lr": peak, "peak": peak, "weight_decay": decay}
            for (peak, decay), params in groups.items()
        ],
        fused=True,
    )


def _head_ids(model: nn.Module) -> set[int]:
    """The weights of a masked-lm head, which every architecture names differently."""
    inner = unwrapped(model)
    return {id(p) for p in head_parameters(inner)} if type(inner).__name__.endswith("ForMaskedLM") else set()


def warmup_cosine(step: int, total: int, *, warmup_ratio: float) -> float:
    """Factor on the peak learning rate at `step` = 0 … total - 1: linear up to 1, then half a cosine towards 0."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group to `factor` of its peak; returns the first group's rate, for the log."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
    return float(optimizer.param_groups[0]["lr"])
