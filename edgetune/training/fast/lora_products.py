"""LoRA's linear layer as one differentiable function: PEFT's result with less memory and fewer
passes.

PEFT computes `base(x) + scaling · B(A(dropout(x)))` as separate operations; under autocast each of
them keeps its own copy of x for the backward pass. Here x is kept once, in the format of the
products, and shared by the layers that read the same x (q, k, v; gate, up); the delta is added in
place, and their low-rank products are one. Layers with dropout, DoRA or several active adapters
keep PEFT's own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from edgetune.models.torch_device import Precision

ADAPTER = "default"
TOGETHER = ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LoraProducts(torch.autograd.Function):
    """y = x Wᵀ + b + scaling · (x Aᵀ) Bᵀ for every layer that reads x, with W (out, in) and b
    frozen, A (r, in), B (out, r).

    The layers' A stand on one another, so that x is multiplied with all of them at once, forward
    and backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_cast: Tensor, scalings: Sequence[float], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """`x_cast` (…, in) is x in the format of the products; x only receives the gradient.
        `tensors` are W, b, A, B of the first layer, then of the next."""
        rows = x_cast.reshape(-1, x_cast.shape[-1])
        weights, biases, down, up = (list[Any](tensors[at::4]) for at in range(4))
        ctx.adapter_dtypes = [(a.dtype, b.dtype) for a, b in zip(down, up, strict=True)]
        stacked = torch.cat(down).to(rows.dtype)  # (all r, in)
        scaled = [(b * scaling).to(rows.dtype) for b, scaling in zip(up, scalings, strict=True)]
        low = rows @ stacked.T  # (rows, all r)
        outputs = []
        for weight, bias, b, part in zip(weights, biases, scaled, _parts(low, scaled), strict=True):
            y = torch.nn.functional.linear(rows, weight, bias)
            outputs.append(y.addmm_(part, b.T).view(*x.shape[:-1], -1))
        ctx.save_for_backward(rows, low, stacked, *weights, *scaled)
        ctx.scalings, ctx.shape, ctx.dtype = scalings, x.shape, x.dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, and of every A and B."""
        rows, low, stacked, *frozen_and_scaled = ctx.saved_tensors
        weights, scaled = frozen_and_scaled[: len(grads)], frozen_and_scaled[len(grads) :]
        dys = [grad.reshape(-1, grad.shape[-1]).to(rows.dtype) for grad in grads]
        d_low = torch.empty_like(low)
        for dy, b, part in zip(dys, scaled, _parts(d_low, scaled), strict=True):
            torch.mm(dy, b, out=part)
        d_down = (d_low.T @ rows).split([b.shape[1] for b in scaled])
        d_layers: list[Tensor | None] = []
        for dy, part, d_a, scaling, (a_dtype, b_dtype) in zip(
            dys, _parts(low, scaled), d_down, ctx.scalings, ctx.adapter_dtypes, strict=True
        ):
            d_layers += None, None, d_a.to(a_dtype), (dy.T @ part).to(b_dtype).mul_(scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dys[0] @ weights[0]
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight)
            dx = dx.addmm_(d_low, stacked).to(ctx.dtype).view(ctx.shape)
        return dx, None, None, *d_layers


def _parts(low: Tensor, scaled: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The columns (rows, r) of each layer."""
    return low.split([b.shape[1] for b in scaled], dim=1)


@contextlib.contextmanager
def fused_lora(model: nn.Module, precision: Precision) -> Iterator[int]:
    """Let the plain LoRA layers of `model` compute as one function each; yields how many
    there are.
    """
    cast = _Cast(DTYPES[precision])
    layers = [
        module for module in model.modules() if isinstance(module, Linear) and _is_plain(module)
    ]
    for group in _groups(model, layers):
        for at, layer in enumerate(group.layers):
            layer.forward = _forward_of(group, at, cast)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward


class _Cast:
    """x in another format, converted once for the layers that read the same x one after the
    other.
    """

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


class _Group:
    """Layers that read the same x: the first that is called computes for all, the others take
    theirs.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self._x: tuple[Tensor, int, bool] | None = None
        self._waiting: dict[int, Tensor] = {}
        self._together = True

    def __call__(self, at: int, x: Tensor, cast: _Cast) -> Tensor:
        """What layer `at` gives for x. Layers that turn out to read different x are on their own
        from then on.
        """
        state = (x, x._version, torch.is_grad_enabled())
        if (
            at in self._waiting
            and self._x is not None
            and self._x[0] is x
            and self._x[1:] == state[1:]
        ):
            return self._taken(at)
        self._together = self._together and not self._waiting
        if not self._together:
            self._waiting = {}
            return self._product([self.layers[at]], x, cast)[0]
        self._x, self._waiting = state, dict(enumerate(self._product(self.layers, x, cast)))
        return self._taken(at)

    def _taken(self, at: int) -> Tensor:
        y = self._waiting.pop(at)
        if not self._waiting:
            self._x = None
        return y

    @staticmethod
    def _product(layers: Sequence[Any], x: Tensor, cast: _Cast) -> tuple[Tensor, ...]:
        tensors: list[Tensor | None] = []
        for layer in layers:
            base = layer.base_layer
            tensors += (
                base.weight.to(cast.dtype),
                None if base.bias is None else base.bias.to(cast.dtype),
            )
            tensors += layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        scalings = [layer.scaling[ADAPTER] for layer in layers]
        products: tuple[Tensor, ...] = LoraProducts.apply(x, cast(x), scalings, *tensors)
        return products


def _groups(model: nn.Module, layers: Sequence[Any]) -> list[_Group]:
    """The layers that stand beside each other under the names of TOGETHER; every other one
    alone.
    """
    left = {id(layer): layer for layer in layers}
    groups = []
    for module in model.modules():
        for names in TOGETHER:
            beside: list[Any] = [getattr(module, name, None) for name in names]
            if (
                all(id(layer) in left for layer in beside)
                and len({layer.in_features for layer in beside}) == 1
            ):
                groups.append(_Group([left.pop(id(layer)) for layer in beside]))
    return groups + [_Group([layer]) for layer in left.values()]


def _forward_of(group: _Group, at: int, cast: _Cast) -> Callable[..., Tensor]:
    layer = group.layers[at]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layer.disable_adapters or layer.merged or args or kwargs:
            result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
            return result
        return group(at, x, cast)

    return forward
