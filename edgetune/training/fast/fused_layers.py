"""The parts of a layer that are many small operations in eager torch, each as one differentiable
function.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from edgetune.training.fast.shared_prefix import ATTENTION, shared_now

# tokens up to which attention with stored probabilities is faster than torch's, which recomputes
# them
SHORT = 192
# where transformers' configuration keeps the attention's name
IMPLEMENTATION = "_attn_implementation_internal"
TOLERANCE = 1e-5


class RMSNorm(torch.autograd.Function):
    """y = w · x / rms(x) with w frozen: x (…, hidden) float32 → float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """One pass for the length, two for the product."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()  # (…, 1)
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """dx = s · (w g) - x · s³ · mean(x · w g)."""
        x, scale, weight = ctx.saved_tensors
        weighted = grads[0] * weight
        dot = (weighted * x).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        return weighted.mul_(scale).addcmul_(x, dot), None, None


class Rotation(torch.autograd.Function):
    """Rotary embedding: the halves of x (…, width) turned by the angles in cos and sin, which
    broadcast over x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x1 cos - x2 sin beside x2 cos + x1 sin."""
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The rotation back."""
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1.0).to(ctx.dtype), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return turned


class GatedSiLU(torch.autograd.Function):
    """silu(gate) · up, keeping only gate and up (…, width)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Two passes."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """silu is computed again: cheaper than keeping it."""
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


class Attention(torch.autograd.Function):
    """softmax(scaling · q kᵀ + mask) v with the probabilities kept: q (B, heads, T, D), k and v (B,
    kv_heads, T, D).

    Scores and softmax are float32, the other products are in v's format, and so is what is
    returned, (B, T, heads, D). `hidden` is true where a position must not look, and broadcasts over
    (B, 1, 1, T, T).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scaling: float
    ) -> Tensor:
        """The heads that share a key are rows of one product."""
        batch, heads, tokens, width = query.shape
        kv_heads, narrow = key.shape[1], value.dtype
        groups = heads // kv_heads
        q = query.float().reshape(batch * kv_heads, groups * tokens, width)
        k = key.float().reshape(batch * kv_heads, tokens, width)
        v = value.reshape(batch * kv_heads, tokens, width)
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scaling)
        if hidden is not None:
            scores.view(batch, kv_heads, groups, tokens, tokens).masked_fill_(
                hidden, torch.finfo(torch.float32).min
            )
        weights = torch.softmax(scores, -1, out=scores).to(narrow)
        ctx.save_for_backward(q.to(narrow), k.to(narrow), v, weights)
        ctx.scaling, ctx.shape, ctx.dtypes = scaling, query.shape, (query.dtype, key.dtype)
        return _rows_last(torch.bmm(weights, v), query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The softmax's own backward, and four products."""
        q, k, v, weights = ctx.saved_tensors
        batch, heads, tokens, width = ctx.shape
        grad = grads[0].transpose(1, 2).reshape(q.shape)
        d_value = torch.bmm(weights.transpose(1, 2), grad)
        d_weights = torch.bmm(grad, v.transpose(1, 2))
        d_scores = torch.ops.aten._softmax_backward_data(
            d_weights, weights, -1, weights.dtype
        ).mul_(ctx.scaling)
        d_query = torch.bmm(d_scores, k).view(batch, heads, tokens, width)
        d_key = torch.bmm(d_scores.transpose(1, 2), q)
        d_key, d_value = (d.view(batch, -1, tokens, width) for d in (d_key, d_value))
        return d_query.to(ctx.dtypes[0]), d_key.to(ctx.dtypes[1]), d_value, None, None


def _rows_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    batch, heads, tokens, width = shape
    return x.view(batch, heads, tokens, width).transpose(1, 2).contiguous()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: short rows here, all others by torch's
    scaled_dot_product_attention.

    Where a batch's rows share their beginnings they are laid out again as the rows that they are.
    """
    given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    shared = shared_now()
    if shared is None:
        return _attention(module, query, key, value, attention_mask, **given)
    query, key, value = (
        shared.spread(x[0].transpose(0, 1)).transpose(1, 2) for x in (query, key, value)
    )
    rows, _ = _attention(module, query, key, value, None, **given)
    return shared.gathered(rows)[None], None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same for rows (batch, heads, seq, width)."""
    tokens, extra = query.shape[2], {name for name, value in kwargs.items() if value is not None}
    plain = not extra & {"softcap", "position_bias", "s_aux", "cache"} and query.shape == (
        *key.shape[:1],
        query.shape[1],
        *key.shape[2:],
    )
    boolean = attention_mask is None or attention_mask.dtype == torch.bool
    if tokens > SHORT or dropout or not plain or not boolean or value.shape != key.shape:
        given = {**kwargs, "dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)  # type: ignore[no-any-return]
    if attention_mask is not None:
        hidden = ~attention_mask[:, :, None]
    elif (
        is_causal if is_causal is not None else getattr(module, "is_causal", True)
    ) and tokens > 1:
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu_(1)
    else:
        hidden = None
    factor = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
    with torch.autocast(query.device.type, enabled=False):
        return Attention.apply(query, key, value, hidden, factor), None


AttentionInterface.register(ATTENTION, attention)


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask interface: torch's mask; none where rows share their beginnings, which are
    causal and that is all.
    """
    return None if shared_now() is not None else sdpa_mask(*args, **kwargs)  # type: ignore[no-any-return]


AttentionMaskInterface.register(ATTENTION, attention_mask)


@contextlib.contextmanager
def fused_ops(model: Any) -> Iterator[dict[str, int]]:
    """Let norms, rotations, gated activations and attention compute as above, relative positions as
    in `relative_window`; yields how many of the first three there are.

    Only on a processor: a GPU's own kernels are better.
    """
    if next(model.parameters()).device.type != "cpu":
        yield {}
        return
    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    swaps: list[tuple[Any, str, Any]] = []
    counts = {"norm": 0, "gate": 0, "rotation": 0}

    def swap(owner: Any, name: str, value: Any) -> None:
        swaps.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    for module in body.modules():
        kind = type(module)
        if kind.__name__.endswith("RMSNorm") and _is_rms_norm(module):
            swap(module, "forward", _norm_of(module))
            counts["norm"] += 1
        elif hasattr(module, "gate_proj") and _is_gated_silu(module):
            swap(module, "forward", _gate_of(module))
            counts["gate"] += 1
        elif hasattr(module, METHOD):
            swap(module, METHOD, relative_window(module))
    for code in {
        sys.modules[type(module).__module__]
        for module in body.modules()
        if hasattr(module, "config")
    }:
        if _is_rotation(getattr(code, "apply_rotary_pos_emb", None)):
            swap(code, "apply_rotary_pos_emb", rotate)
            counts["rotation"] += 1
    if vars(body.config).get(IMPLEMENTATION) == "sdpa":
        swap(body.config, IMPLEMENTATION, ATTENTION)
    try:
        yield counts
    finally:
        for owner, name, value in reversed(swaps):
            delattr(owner, name) if value is None else setattr(owner, name, value)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb`: q and k (B, heads, T, D), cos and sin (B, T, turned),
    turned at most D.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    turned = cos.shape[-1]
    if turned == q.shape[-1]:
        return Rotation.apply(q, cos, sin), Rotation.apply(k, cos, sin)
    q, k = (
        torch.cat((Rotation.apply(x[..., :turned], cos, sin), x[..., turned:]), dim=-1)
        for x in (q, k)
    )
    return q, k


def _norm_of(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or module.weight.requires_grad:
            return type(module).forward(module, x)  # type: ignore[no-any-return]
        return RMSNorm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-any-return]

    return forward


def _gate_of(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return module.down_proj(GatedSiLU.apply(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-any-return]

    return forward


_verified: dict[Any, bool] = {}


def _same(key: Any, theirs: Callable[[], Tensor], ours: Callable[[], Tensor]) -> bool:
    """Whether both give the same, found out once for each kind; anything that raises is not the
    same.
    """
    if key not in _verified:
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                _verified[key] = torch.allclose(theirs(), ours(), atol=TOLERANCE, rtol=TOLERANCE)
        except (RuntimeError, TypeError, AttributeError, ValueError):
            _verified[key] = False
    return _verified[key]


def _random(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers that leave the training's seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _is_rms_norm(module: Any) -> bool:
    if not hasattr(module, "variance_epsilon") or not hasattr(module, "weight"):
        return False
    x = _random(2, module.weight.shape[0]).to(module.weight.device)
    ours: Callable[[], Tensor] = lambda: RMSNorm.apply(x, module.weight, module.variance_epsilon)  # noqa: E731
    return _same(type(module), lambda: type(module).forward(module, x), ours)


class _Scaled(nn.Module):
    """Stands in for a linear layer when a gated block is compared."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _is_gated_silu(module: Any) -> bool:
    """Whether the block's own code is down(silu(gate(x)) · up(x)), tried with stand-ins for its
    linear layers.
    """
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    key = (type(module), type(module.act_fn))
    if key in _verified:
        return _verified[key]
    x = _random(2, 8)
    stand_in: Any = nn.Module.__new__(type(module))
    nn.Module.__init__(stand_in)
    stand_in.act_fn = module.act_fn
    for name, factor in (("gate_proj", 1.5), ("up_proj", -0.5), ("down_proj", 2.0)):
        setattr(stand_in, name, _Scaled(factor))
    return _same(
        key,
        lambda: type(module).forward(stand_in, x),
        lambda: 2.0 * GatedSiLU.apply(1.5 * x, -0.5 * x),
    )


def _is_rotation(function: Any) -> bool:
    if function is None or function is rotate:
        return False
    if function not in _verified:
        q, angles = _random(2, 3, 5, 8), _random(2, 5, 4, seed=1)
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
        _same(
            function,
            lambda: torch.cat(function(q, 2 * q, cos, sin)),
            lambda: torch.cat(rotate(q, 2 * q, cos, sin)),
        )
    return _verified[function]


METHOD = "disentangled_attention_bias"


def relative_window(module: Any) -> Callable[..., Tensor]:
    """What stands for the module's `disentangled_attention_bias`: its own code, on the window of
    relative positions that the tokens have.
    """

    def bias(
        query: Tensor, key: Tensor, relative_pos: Tensor, rel_embeddings: Tensor, scale_factor: int
    ) -> Tensor:
        span = module.pos_ebd_size
        window = min(span, int(relative_pos.abs().max()) + 1)
        module.pos_ebd_size = window
        try:
            return getattr(type(module), METHOD)(
                module,
                query,
                key,
                relative_pos,
                rel_embeddings[span - window : span + window],
                scale_factor,
            )  # type: ignore[no-any-return]
        finally:
            module.pos_ebd_size = span

    return bias
