"""Where training computes, and in which number format: processor, CUDA or Apple's GPU; fp32 or
bf16.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Iterator
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.core.errors import TrainingError
from edgetune.models.heads import HEADS, UNUSED

CPU_DEVICE = torch.device("cpu")
T = TypeVar("T")


def choose_device(setting: str, *, local_rank: int = 0) -> torch.device:
    """The recipe's `device` on this machine; of several GPUs each process takes its own.
    TrainingError when it is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = (
        next(name for name, there in available.items() if there) if setting == "auto" else setting
    )
    if not available[kind]:
        raise TrainingError(
            f'device = "{kind}" is not on this machine',
            expected="one of " + ", ".join(name for name, there in available.items() if there),
            got=f"torch {torch.__version__}",
            fix='Set device = "auto", or install a torch that is built for it.',
        )
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device(kind, local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.cuda.reset_peak_memory_stats(device)
    return device


def peak_device_mb(device: torch.device) -> float | None:
    """Peak memory of tensors on a CUDA GPU since `choose_device`, in MB (10^6 bytes); None
    elsewhere.
    """
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def to_device(value: T, device: torch.device) -> T:
    """A batch (a dataclass, or any nest of tuples, lists and dicts) with every tensor on `device`;
    itself on the CPU.
    """
    return value if device.type == "cpu" else _moved(value, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: _moved(getattr(value, field.name), device)
            for field in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_moved(item, device) for item in value])
    return value


def rng_state(device: torch.device) -> dict[str, Any]:
    """Every generator that training may draw from: Python's, numpy's, torch's, and the device's
    own.
    """
    name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state(legacy=True))
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


@contextlib.contextmanager
def generators_untouched(device: torch.device) -> Iterator[None]:
    """What is drawn inside does not move any generator that training may draw from."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` read; a device's own state only on a device of that kind."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


Precision = Literal["fp32", "bf16"]
FASTER = 1.4  # bf16 must win by this factor; where processors have it, it wins by 2 or more
TOKENS, ROUNDS = 512, 5
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def choose_precision(setting: str, *, hidden: int, device: torch.device = CPU_DEVICE) -> Precision:
    """Resolve "auto" by timing the matrix product of a layer of this width in both formats."""
    if setting == "auto":
        return "bf16" if has_bf16(device) and _bf16_speedup(hidden, device) >= FASTER else "fp32"
    return "bf16" if setting == "bf16" else "fp32"


def has_bf16(device: torch.device = CPU_DEVICE) -> bool:
    """Whether the device multiplies bf16 itself; True where torch cannot tell, the measurement then
    decides.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return not capabilities or any(capabilities.get(flag, False) for flag in BF16_FLAGS)


def _bf16_speedup(hidden: int, device: torch.device) -> float:
    """Best fp32 time over best bf16 time of (tokens, hidden) x (hidden, 4 hidden), taken in
    turns.
    """
    generator = torch.Generator().manual_seed(
        0
    )  # its own, so that measuring does not move the training's seed
    x, weight = (
        torch.randn(rows, hidden, generator=generator).to(device) for rows in (TOKENS, 4 * hidden)
    )
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


def autocast(
    precision: Precision, device: torch.device = CPU_DEVICE
) -> contextlib.AbstractContextManager[object]:
    """Matrix products in bf16, or nothing."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def hold_frozen_linears_in_bf16(model: nn.Module) -> None:
    """Autocast would convert a frozen weight at every step; converted once it also takes half the
    memory.

    Embeddings, norms and a head as it was before training stay fp32, and so does the residual
    stream.
    """
    for name, module in model.named_modules():
        in_head = not {*HEADS, *UNUSED}.isdisjoint(name.split("."))
        frozen = isinstance(module, nn.Linear) and not module.weight.requires_grad and not in_head
        if frozen and not _is_tied(model, module):
            module.to(torch.bfloat16)


def _is_tied(model: nn.Module, linear: nn.Module) -> bool:
    return any(isinstance(m, nn.Embedding) and m.weight is linear.weight for m in model.modules())
