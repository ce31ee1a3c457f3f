"""The leaves of a model while it is traced: each linear layer, embedding, norm and activation is
one symbolic node.

Linear layers and embeddings stay in edgetune's own domain with their weight (out, in) and their
module path as attribute `module`, so that packing, quantisation and adapter inputs are decided
later, on the graph. What a norm or an activation computes is not guessed from its name: its own
forward and the node's formula are compared on random numbers, and where none fits, its own
operations are traced.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.onnx.ops as onnx_ops
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgetune.export.graph.attention import note_rotation, now

DOMAIN = "edgetune"
# the weight as the node takes it, where the module holds it in another form
TRACED = "traced_weight"
TOLERANCE = 1e-5
# the names of what may be one by the root of the mean square; T5 calls it T5LayerNorm
NORMS = ("RMSNorm", "LayerNorm")


@contextlib.contextmanager
def symbolic_leaves(
    model: nn.Module,
    rotary: Callable[..., tuple[Tensor, Tensor]],
    *,
    logits_index: Callable[[], Tensor] | None = None,
) -> Iterator[None]:
    """Swap the forwards of the model's leaves for one-node versions, and put them back.

    `rotary(module, layer_type)` gives the tables of a rotary module; `logits_index()` (B, K) the
    positions that the output projection reads.
    """
    swaps: list[tuple[Any, str, Any]] = []
    added: list[nn.Module] = []

    def swap(owner: Any, name: str, value: Any) -> None:
        swaps.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    def hold(module: nn.Module, weight: Tensor) -> None:
        module.register_buffer(TRACED, weight.detach().contiguous(), persistent=False)
        added.append(module)

    names = {id(child): path for path, child in model.named_modules()}
    head = model.get_output_embeddings() if logits_index is not None else None  # type: ignore[operator]

    def linear(self: nn.Module, x: Tensor) -> Tensor:
        if self is head and logits_index is not None:
            x = now.rows = _rows(x, logits_index())
        return _linear(self, x, names[id(self)])

    def embedding(self: nn.Module, ids: Tensor) -> Tensor:
        return _embedding(self, ids, names[id(self)])

    code = sys.modules[type(model).__module__]
    if hasattr(code, "apply_rotary_pos_emb"):
        swap(code, "apply_rotary_pos_emb", note_rotation)
    swap(nn.Linear, "forward", linear)
    swap(nn.Embedding, "forward", embedding)
    swap(nn.LayerNorm, "forward", _layer_norm)
    for module in list(model.modules()):
        kind = type(module)
        if isinstance(module, Conv1D):
            hold(module, module.weight.t())
            swap(module, "forward", linear.__get__(module))
        elif is_rotary(module):
            swap(
                module,
                "forward",
                lambda x, position_ids=None, layer_type=None, module=module: rotary(
                    module, layer_type
                ),
            )
        elif (
            kind.__name__.endswith(NORMS)
            and not isinstance(module, nn.LayerNorm)
            and (found := rms_weight(module)) is not None
        ):
            hold(module, found)
            swap(module, "forward", _rms_norm.__get__(module))
        elif is_tanh_gelu(module):
            swap(module, "forward", _tanh_gelu)
    try:
        yield
    finally:
        for owner, name, value in reversed(swaps):
            delattr(owner, name) if value is None else setattr(owner, name, value)
        for module in added:
            delattr(module, TRACED)


def is_rotary(module: nn.Module) -> bool:
    """Whether a module makes the tables of a rotary embedding."""
    return type(module).__name__.endswith("RotaryEmbedding")


def rms_weight(module: Any) -> Tensor | None:
    """The weight w (width,) with which this norm is w · x / rms(x): its own, or 1 + its own; None
    when it is neither.
    """
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 1:
        return None
    x = _random(3, weight.shape[0])
    with torch.no_grad():
        expected = module(x)
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon_of(module))
        candidates: Sequence[Tensor] = (weight.detach().float(), 1.0 + weight.detach().float())
        return next(
            (
                w
                for w in candidates
                if torch.allclose(scaled * w, expected, atol=TOLERANCE, rtol=TOLERANCE)
            ),
            None,
        )


def epsilon_of(module: Any) -> float:
    """What a norm adds to the mean square."""
    epsilon: Any = getattr(module, "variance_epsilon", None) or getattr(module, "eps", 0.0)
    return float(epsilon)


def is_tanh_gelu(module: nn.Module) -> bool:
    """Whether an activation is GELU by tanh, written out in one of several ways."""
    if "gelu" not in type(module).__name__.lower() or any(True for _ in module.parameters()):
        return False
    x = torch.linspace(-5.0, 5.0, 101)
    exact, fast = F.gelu(x), F.gelu(x, approximate="tanh")
    with torch.no_grad():
        got = module(x)
    return torch.allclose(got, fast, atol=1e-6) and not torch.allclose(got, exact, atol=1e-6)


def _random(*shape: int) -> Tensor:
    """Random numbers that leave torch's seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _rows(hidden: Tensor, index: Tensor) -> Tensor:
    """hidden (B, S, H) at index (B, K) → (B, K, H)."""
    return onnx_ops.symbolic(
        "GatherND",
        [hidden, index.unsqueeze(-1)],
        attrs={"batch_dims": 1},
        dtype=hidden.dtype,
        shape=(*index.shape, hidden.shape[-1]),
        version=13,
    )


def _linear(self: Any, x: Tensor, module: str) -> Tensor:
    """One node `edgetune::Linear`(x, weight (out, in)[, bias (out,)])."""
    weight, bias = getattr(self, TRACED, self.weight), self.bias
    operands = [x, weight] if bias is None else [x, weight, bias]
    shape = (*x.shape[:-1], weight.shape[0])
    return onnx_ops.symbolic(
        f"{DOMAIN}::Linear",
        operands,
        attrs={"module": module},
        dtype=x.dtype,
        shape=shape,
        version=1,
    )


def _embedding(self: Any, ids: Tensor, module: str) -> Tensor:
    """One node `edgetune::Embedding`(ids, weight (vocabulary, width))."""
    weight = self.weight
    shape = (*ids.shape, weight.shape[1])
    return onnx_ops.symbolic(
        f"{DOMAIN}::Embedding",
        [ids, weight],
        attrs={"module": module},
        dtype=weight.dtype,
        shape=shape,
        version=1,
    )


def _layer_norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
    operands = [x, self.weight] if self.bias is None else [x, self.weight, self.bias]
    return onnx_ops.symbolic(
        "LayerNormalization",
        operands,
        attrs={"axis": -1, "epsilon": float(self.eps), "stash_type": 1},
        dtype=x.dtype,
        shape=x.shape,
        version=17,
    )


def _rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    return onnx_ops.symbolic(
        "SimplifiedLayerNormalization",
        [x, getattr(self, TRACED)],
        attrs={"axis": -1, "epsilon": epsilon_of(self), "stash_type": 1},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
