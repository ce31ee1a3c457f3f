"""LoRA's linear layer as one differentiable function: PEFT's result with less memory and fewer passes.

PEFT computes `base(x) + scaling · B(A(dropout(x)))` as separate operations; under autocast each of them keeps its own
copy of x for the backward pass. Here x is kept once, in the format of the products, and shared by the layers that
read the same x (q, k, v; gate, up); the delta is added in place. Layers with dropout, DoRA or several active
adapters keep PEFT's own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from edgetune.training.precision import Precision

ADAPTER = "default"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LoraProduct(torch.autograd.Function):
    """y = x Wᵀ + b + scaling · (x Aᵀ) Bᵀ with W (out, in) and b frozen, A (r, in), B (out, r)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_cast: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        """`x_cast` (…, in) is x in the format of the products; x only receives the gradient."""
        rows = x_cast.reshape(-1, x_cast.shape[-1])
        ctx.adapter_dtype = a.dtype
        a, b = a.to(rows.dtype), b.to(rows.dtype)
        low = rows @ a.T  # (rows, r)
        y = torch.nn.functional.linear(rows, weight, bias)
        y.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling, ctx.shape, ctx.dtype = scaling, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B."""
        rows, low, weight, a, b = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1]).to(rows.dtype)
        d_low = (dy @ b).mul_(ctx.scaling)  # (rows, r)
        d_a = (d_low.T @ rows).to(ctx.adapter_dtype)
        d_b = (dy.T @ low).to(ctx.adapter_dtype).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(d_low, a).to(ctx.dtype).view(ctx.shape)
        return dx, None, None, None, d_a, d_b, None


@contextlib.contextmanager
def fused_lora(model: nn.Module, precision: Precision) -> Iterator[int]:
    """Let the plain LoRA layers of `model` compute as one function each; yields how many there are."""
    cast = _Cast(DTYPES[precision])
    layers = [module for module in model.modules() if isinstance(module, Linear) and _is_plain(module)]
    for layer in layers:
        layer.forward = _forward_of(layer, cast)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward


class _Cast:
    """x in another format, converted once for the layers that read the same x one after the other."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._last: tuple[Tensor, int, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == self.dtype:
            return x.detach()
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            self._last = (x, x._version, x.detach().to(self.dtype))
        return self._last[2]


def _is_plain(layer: Any) -> bool:
    """Whether the layer is nothing but frozen W (and b) with one active LoRA pair."""
    return (
        layer.active_adapters == [ADAPTER]
        and ADAPTER in layer.lora_A
        and ADAPTER not in layer.lora_variant
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and not layer.lora_bias[ADAPTER]
        and type(layer.base_layer) is nn.Linear
        and not layer.base_layer.weight.requires_grad
    )


def _forward_of(layer: Any, cast: _Cast) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layer.disable_adapters or layer.merged or args or kwargs:
            result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
            return result
        base = layer.base_layer
        weight = base.weight.to(cast.dtype)
        bias = base.bias.to(cast.dtype) if base.bias is not None else None
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        product: Tensor = LoraProduct.apply(x, cast(x), weight, bias, a, b, layer.scaling[ADAPTER])
        return product

    return forward
