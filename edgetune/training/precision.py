"""Which number format the training computes in: fp32, or bf16 where this processor is faster with it."""

from __future__ import annotations

import contextlib
import time
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from edgetune.training.device import CPU

Precision = Literal["fp32", "bf16"]
FASTER = 1.4  # bf16 must win by this factor; where processors have it, it wins by 2 or more
TOKENS, ROUNDS = 512, 5
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def choose_precision(setting: str, *, hidden: int, device: torch.device = CPU) -> Precision:
    """Resolve "auto" by timing the matrix product of a layer of this width in both formats."""
    if setting == "auto":
        return "bf16" if has_bf16(device) and _bf16_speedup(hidden, device) >= FASTER else "fp32"
    return "bf16" if setting == "bf16" else "fp32"


def has_bf16(device: torch.device = CPU) -> bool:
    """Whether the device multiplies bf16 itself; True where torch cannot tell, the measurement then decides."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return not capabilities or any(capabilities.get(flag, False) for flag in BF16_FLAGS)


def _bf16_speedup(hidden: int, device: torch.device) -> float:
    """Best fp32 time over best bf16 time of (tokens, hidden) x (hidden, 4 hidden), taken in turns."""
    generator = torch.Generator().manual_seed(0)  # its own, so that measuring does not move the training's seed
    x, weight = (torch.randn(rows, hidden, generator=generator).to(device) for rows in (TOKENS, 4 * hidden))
    fp32 = x, weight
    bf16 = x.bfloat16(), weight.bfloat16()
    seconds: dict[Precision, list[float]] = {"fp32": [], "bf16": []}
    F.linear(*fp32), F.linear(*bf16)  # warm-up
    for _ in range(ROUNDS):
        seconds["fp32"].append(_time(*fp32))
        seconds["bf16"].append(_time(*bf16))
    return min(seconds["fp32"]) / min(seconds["bf16"])


def _time(x: torch.Tensor, weight: torch.Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    F.linear(x, weight)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def autocast(precision: Precision, device: torch.device = CPU) -> contextlib.AbstractContextManager[object]:
    """Matrix products in bf16, or nothing."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def hold_frozen_linears_in_bf16(model: nn.Module) -> None:
    """Autocast would convert a frozen weight at every step; converted once it also takes half the memory.

    Embeddings and norms stay fp32, and so does the residual stream.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and not _is_tied(model, module):
            module.to(torch.bfloat16)


def _is_tied(model: nn.Module, linear: nn.Linear) -> bool:
    return any(isinstance(m, nn.Embedding) and m.weight is linear.weight for m in model.modules())
