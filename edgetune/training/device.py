"""Where training computes: the processor, a CUDA GPU or Apple's; batches follow the model."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from edgetune.errors import TrainingError

CPU = torch.device("cpu")
T = TypeVar("T")


def choose_device(setting: str, *, local_rank: int = 0) -> torch.device:
    """The recipe's `device` on this machine; of several GPUs each process takes its own. TrainingError when it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(name for name, there in available.items() if there) if setting == "auto" else setting
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
    """Peak memory of tensors on a CUDA GPU since `choose_device`, in MB (10^6 bytes); None elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def to_device(value: T, device: torch.device) -> T:
    """A batch (a dataclass, or any nest of tuples, lists and dicts) with every tensor on `device`; itself on the CPU."""
    return value if device.type == "cpu" else _moved(value, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _moved(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_moved(item, device) for item in value])
    return value


def rng_state(device: torch.device) -> dict[str, Any]:
    """Every generator that training may draw from: Python's, numpy's, torch's, and the device's own."""
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
