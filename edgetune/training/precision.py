"""Which number format the training computes in: fp32, or bf16 where this processor is faster with it."""

from __future__ import annotations

import contextlib
import time
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from edgetune.heads import HEADS

Precision = Literal["fp32", "bf16"]
FASTER = 1.4  # bf16 must win by this factor; where processors have it, it wins by 2 or more
TOKENS, ROUNDS = 512, 5
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def choose_precision(setting: str, *, hidden: int) -> Precision:
    """Resolve "auto" by timing the matrix product of a layer of this width in both formats."""
    if setting == "auto":
        return "bf16" if has_bf16() and _bf16_speedup(hidden) >= FASTER else "fp32"
    return "bf16" if setting == "bf16" else "fp32"


def has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself; True where torch cannot tell, the measurement then decides."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return not capabilities or any(capabilities.get(flag, False) for flag in BF16_FLAGS)


def _bf16_speedup(hidden: int) -> float:
    """Best fp32 time over best bf16 time of (tokens, hidden) x (hidden, 4 hidden), taken in turns."""
    generator = torch.Generator().manual_seed(0)  # its own, so that measuring does not move the training's seed
    fp32 = torch.randn(TOKENS, hidden, generator=generator), torch.randn(4 * hidden, hidden, generator=generator)
    bf16 = fp32[0].bfloat16(), fp32[1].bfloat16()
    seconds: dict[Precision, list[float]] = {"fp32": [], "bf16": []}
    F.linear(*fp32), F.linear(*bf16)  # warm-up
    for _ in range(ROUNDS):
        seconds["fp32"].append(_time(*fp32))
        seconds["bf16"].append(_time(*bf16))
    return min(seconds["fp32"]) / min(seconds["bf16"])


def _time(x: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    F.linear(x, weight)
    return time.perf_counter() - start


def autocast(precision: Precision) -> contextlib.AbstractContextManager[object]:
    """Matrix products in bf16, or nothing."""
    if precision == "bf16":
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def hold_frozen_linears_in_bf16(model: nn.Module) -> None:
    """Autocast would convert a frozen weight at every step; converted once it also takes half the memory.

    Embeddings, norms and a head as it was before training stay fp32, and so does the residual stream.
    """
    for name, module in model.named_modules():
        in_head = not set(HEADS).isdisjoint(name.split("."))
        frozen = isinstance(module, nn.Linear) and not module.weight.requires_grad and not in_head
        if frozen and not _is_tied(model, module):
            module.to(torch.bfloat16)


def _is_tied(model: nn.Module, linear: nn.Module) -> bool:
    return any(isinstance(m, nn.Embedding) and m.weight is linear.weight for m in model.modules())
