"""A model's 4-bit weights rounded to the inputs that they really get (`gptq`): layer by layer, in
place.

The texts go through the model once, and what each layer is called with is remembered, but for the
hidden states: these are computed again layer by layer from the layers already rounded. So only one
layer's Gram matrices and the hidden states of all texts are in memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import ExportError
from edgetune.core.progress import Say
from edgetune.models.fake_quantise import is_transposed, stored_bits
from edgetune.quantisation.gptq import on_grid, round_to_inputs
from edgetune.quantisation.precision import Precision

TOKENS = 16384  # of all texts together, at most
LENGTH = 512  # of one text
ROWS = 8  # that go through the model together


@dataclass
class _Call:
    """A layer's arguments in one forward pass, but for the hidden states, which `with_states` puts
    back.
    """

    positional: tuple[Any, ...]
    named: dict[str, Any]

    def with_states(self, states: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.positional:
            return (states, *self.positional[1:]), self.named
        return (), {**self.named, "hidden_states": states}


@dataclass
class _Inputs:
    """Σ x xᵀ of the inputs of a layer's modules; modules that read the same tensor share one
    sum.
    """

    grams: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)  # module → the one whose sum is its own
    last: tuple[Tensor, str] | None = None

    def add(self, name: str, x: Tensor) -> None:
        """A module `name` is called with x (…, in)."""
        if name not in self.shared:
            self.shared[name] = (
                self.last[1] if self.last is not None and self.last[0] is x else name
            )
        if self.shared[name] == name:
            flat = x.detach().flatten(0, -2).float()
            gram = flat.t() @ flat
            self.grams[name] = self.grams[name] + gram if name in self.grams else gram
            self.last = (x, name)

    def of(self, name: str) -> Tensor | None:
        """(in, in), or None for a module that was never called."""
        return self.grams.get(self.shared.get(name, ""))


@torch.no_grad()
def calibrate(
    model: Any,
    rows: Sequence[Sequence[int]],
    precision: Precision,
    *,
    say: Say = lambda line: None,
) -> None:
    """Round every weight that `precision` stores in 4 bits inside the layers of a transformers
    model to the inputs it gets from `rows` of token ids, in place. Weights outside the layers
    (output projection, embedding) are left to `quantise`.
    """
    bits = {name: wanted for name, wanted in stored_bits(model, precision).items() if wanted == 4}
    prefix, layers = _layers(model)
    if not any(name.startswith(f"{prefix}.") for name in bits):
        raise ExportError(
            "no weight of the layers is stored in 4 bits, so there is nothing to calibrate",
            where="--quantiser gptq",
            fix="Use --precision int4.",
        )
    if all(
        on_grid(_matrix(model.get_submodule(name)), bits=4, block_size=precision.block_size)
        for name in bits
        if name.startswith(f"{prefix}.")
    ):
        say(
            "every 4-bit weight of the layers lies on a grid of its own, which is kept: nothing to"
            " calibrate"
        )
        return
    batches = list(_batches(rows))
    states, calls = _record(model, layers, batches)
    say(f"calibrating on {sum(batch.numel() for batch in batches)} tokens of {len(rows)} rows")
    for at, layer in enumerate(layers):
        inner = {
            name: module
            for name, module in layer.named_modules()
            if f"{prefix}.{at}.{name}" in bits
        }
        inputs = _Inputs()
        hooks = [
            module.register_forward_pre_hook(_hook(inputs, name)) for name, module in inner.items()
        ]
        for batch, call in zip(states, calls[at], strict=True):
            _run(layer, call, batch)
        for hook in hooks:
            hook.remove()
        _round(inner, inputs, precision)
        states = [_run(layer, call, batch) for batch, call in zip(states, calls[at], strict=True)]


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of the model's layers, and its path."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    if not lists:
        raise ExportError(
            "this model's layers are in no list, so they cannot be calibrated one by one",
            fix="Use --quantiser hqq.",
        )
    return max(lists, key=lambda pair: sum(parameter.numel() for parameter in pair[1].parameters()))


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """(rows, length) without padding: rows of similar length together, each cut to the shortest of
    them.
    """
    chosen, left = [], TOKENS
    for row in rows:
        if left > 0 and len(row) > 1:
            chosen.append(list(row[: min(LENGTH, left)]))
            left -= len(chosen[-1])
    if not chosen:
        raise ExportError(
            "there is no text to calibrate on",
            where="--quantiser gptq",
            expected="rows of at least two tokens",
        )
    chosen.sort(key=len)
    for start in range(0, len(chosen), ROWS):
        part = chosen[start : start + ROWS]
        yield torch.tensor([row[: len(part[0])] for row in part])


def _record(
    model: Any, layers: nn.ModuleList, batches: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[_Call]]]:
    """The first layer's hidden states a batch, and the other arguments of every layer, layer by
    layer, batch by batch.
    """
    first: list[Tensor] = []
    calls: list[list[_Call]] = [[] for _ in layers]

    def keep(at: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            if at == 0:
                first.append(positional[0] if positional else named["hidden_states"])
            rest = {name: value for name, value in named.items() if name != "hidden_states"}
            calls[at].append(_Call((None, *positional[1:]) if positional else (), rest))

        return hook

    hooks = [
        layer.register_forward_pre_hook(keep(at), with_kwargs=True)
        for at, layer in enumerate(layers)
    ]
    body = model.base_model  # without the output projection
    settings = (
        {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    )
    for batch in batches:
        body(input_ids=batch, **settings)
    for one in hooks:
        one.remove()
    return first, calls


def _hook(inputs: _Inputs, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _, positional: inputs.add(name, positional[0])


def _run(layer: nn.Module, call: _Call, states: Tensor) -> Tensor:
    positional, named = call.with_states(states)
    output = layer(*positional, **named)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _round(modules: Mapping[str, Any], inputs: _Inputs, precision: Precision) -> None:
    """Modules that read the same input go through together: their rows are independent of each
    other.
    """
    leaders = dict.fromkeys(inputs.shared.get(name, name) for name in modules)
    for leader in leaders:
        group = [
            module for name, module in modules.items() if inputs.shared.get(name, name) == leader
        ]
        gram = inputs.of(leader)
        if gram is None:
            continue  # never called: `quantise` rounds it to nearest
        weights = [_matrix(module) for module in group]
        rounded = round_to_inputs(
            torch.cat(weights),
            gram,
            bits=4,
            block_size=precision.block_size,
        )
        for module, weight in zip(
            group, rounded.split([len(weight) for weight in weights]), strict=True
        ):
            module.weight.copy_(weight.t() if is_transposed(module) else weight)


def _matrix(module: Any) -> Tensor:
    """A module's weight (out, in)."""
    weight: Tensor = module.weight
    return weight.t() if is_transposed(module) else weight
