"""Attention while a model is traced: transformers' attention interface → one node of the engine.

- decoders: `com.microsoft::GroupQueryAttention` with rotary embedding, window, soft cap and
  key-value cache inside;
- encoders: `com.microsoft::MultiHeadAttention` on `com.microsoft::RotaryEmbedding` where the family
  has one.

Rotary tables reach attention through the model's own code: while tracing, a rotary module returns
its whole tables instead of the rows of some positions, the model hands them to each layer as it
always does, and the rotation, which comes right before attention, only notes them. So whatever
chooses a layer's table, it is the model that chooses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.onnx.ops as onnx_ops
from torch import Tensor, nn
from transformers import AttentionInterface

from edgetune.core.errors import ExportError

DECODER, ENCODER = "edgetune_decoder", "edgetune_encoder"
# Hides a key completely (exp(-1e4) is 0 in fp32), and stays finite when the padding's own is added.
HIDDEN = -1e4
# GroupQueryAttention takes rotary tables of a width that is a multiple of this; others are applied
# before it
TABLE_STEP = 8
HEAD_STEP = 8  # and keys and values of such a width alone


def refuse_head_size(config: Any) -> None:
    """ExportError for a decoder whose heads are of a width that the operator does not take."""
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)
    if width and width % HEAD_STEP:
        raise ExportError(
            "the size of the model's attention heads is not supported",
            expected=f"a multiple of {HEAD_STEP}",
            got=f"head_dim {width}",
            fix="Take a base with other heads; this one cannot run in a bundle.",
        )


class AttentionInputs:
    """What attention needs beyond its arguments; filled by the wrapper's forward while tracing."""

    past: list[tuple[Tensor, Tensor]]
    present: list[tuple[Tensor, Tensor]]
    seqlens_k: Tensor
    total: Tensor
    positions: Tensor
    mask: Tensor
    windows: dict[int, Tensor]
    rows: Tensor
    """what the output projection reads, (B, K, hidden)"""
    rotary: tuple[Tensor, Tensor] | None = None
    """cos and sin (positions, rotary dimensions / 2) of the next attention"""


now = AttentionInputs()


def note_rotation(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """Stands in for a model's `apply_rotary_pos_emb`: the attention that follows rotates."""
    now.rotary = cos, sin
    return q, k


def _grouped_query_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query (B, heads, S, head_dim), key and value (B, kv_heads, S, head_dim) → (B, S, heads,
    head_dim).
    """
    _refuse(options)
    batch, heads, seq, width = query.shape
    kv_heads = key.shape[1]
    past_k, past_v = now.past[len(now.present)]
    capacity = past_k.shape[2]
    q, k, v = (x.transpose(1, 2).reshape(batch, seq, -1) for x in (query, key, value))
    tables, now.rotary = now.rotary, None
    if tables is not None and tables[0].shape[-1] % TABLE_STEP:
        q, k = (
            _rotated(x, now.positions, *tables, heads=n, width=width)
            for x, n in ((q, heads), (k, kv_heads))
        )
        tables = None
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "do_rotary": int(tables is not None),
        "rotary_interleaved": 0,
        "scale": float(scaling if scaling is not None else width**-0.5),
    }
    if sliding_window:
        attributes["local_window_size"] = int(sliding_window)
    if softcap:
        attributes["softcap"] = float(softcap)
    out, present_k, present_v = onnx_ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [q, k, v, past_k, past_v, now.seqlens_k, now.total, *(tables or ())],
        attrs=attributes,
        dtypes=(q.dtype,) * 3,
        shapes=(
            (batch, seq, heads * width),
            (batch, kv_heads, capacity, width),
            (batch, kv_heads, capacity, width),
        ),
        version=1,
    )
    now.present.append((present_k, present_v))
    return out.view(batch, seq, heads, width), None


def _multi_head_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Bidirectional attention with the 0/1 padding mask (B, S) → (B, S, heads, head_dim)."""
    _refuse(options)
    batch, heads, seq, width = query.shape
    q, k, v = (x.transpose(1, 2).reshape(batch, seq, -1) for x in (query, key, value))
    if now.rotary is not None:
        start = torch.zeros(1, dtype=torch.int64)
        q, k = (_rotated(x, start, *now.rotary, heads=heads, width=width) for x in (q, k))
        now.rotary = None
    window = [] if not sliding_window else [_window(int(sliding_window), seq)]
    out = onnx_ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [q, k, v, None, now.mask, *window],
        attrs={"num_heads": heads, "scale": float(scaling if scaling is not None else width**-0.5)},
        dtype=q.dtype,
        shape=(batch, seq, heads * width),
        version=1,
    )
    return out.view(batch, seq, heads, width), None


def _rotated(
    x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *, heads: int, width: int
) -> Tensor:
    """x (B, S, heads · width) with the first dimensions of every head turned; positions (B, S), or
    the first one (1,).
    """
    turned = 2 * cos.shape[-1]
    partial = {"rotary_embedding_dim": turned} if turned < width else {}
    return onnx_ops.symbolic(
        "com.microsoft::RotaryEmbedding",
        [x, positions, cos, sin],
        attrs={"interleaved": 0, "num_heads": heads, **partial},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )


def _window(size: int, seq: Any) -> Tensor:
    """(1, 1, S, S): 0 where two positions are less than `size` apart, else what hides them; one for
    all its layers.
    """
    if size not in now.windows:
        place = torch.arange(seq)
        far = (place[:, None] - place[None, :]).abs() >= size
        now.windows[size] = torch.where(far, HIDDEN, 0.0)[None, None]
    return now.windows[size]


def _refuse(options: dict[str, Any]) -> None:
    """Anything else that an attention adds to its scores: left out, the answers would be other
    ones.
    """
    for name in ("s_aux", "position_bias", "softcap"):
        if options.get(name) is not None:
            raise ExportError(f"the model's attention uses {name}, which this graph cannot express")


AttentionInterface.register(DECODER, _grouped_query_attention)
AttentionInterface.register(ENCODER, _multi_head_attention)
