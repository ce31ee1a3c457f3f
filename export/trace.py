"""A transformers model → an ONNX IR graph in which every linear layer, norm, embedding and attention is one node.

The model's own Python code is traced by torch.export; only the leaves are swapped while tracing:

- attention, through transformers' `AttentionInterface`: `com.microsoft::GroupQueryAttention` (rotary embedding and
  key/value cache inside) for decoders, `com.microsoft::MultiHeadAttention` for encoders;
- RMS norms, layer norms, linear layers and embeddings: one symbolic node each. Linear layers and embeddings stay in
  edgetune's own domain with their weight as torch holds it (out, in) and their module path as attribute `module`,
  so that packing, quantisation and adapter inputs are decided later, on the graph (`layout`, `lower`).
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
import torch.onnx.ops as onnx_ops
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from edgetune.errors import ExportError

DOMAIN = "edgetune"
OPSET = 21
DECODERS = ("llama",)
ENCODERS = ("bert",)
# Example sizes while tracing: all different and never 1, because torch.export freezes a dimension of 1.
BATCH, SEQ, PAST, KEEP = 2, 3, 5, 4


class _Situation:
    """What the attention function needs beyond its arguments; filled by the wrapper's forward while tracing."""

    past: list[tuple[Tensor, Tensor]]
    present: list[tuple[Tensor, Tensor]]
    seqlens_k: Tensor
    total: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor


_now = _Situation()


def _grouped_query_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query (B, heads, S, head_dim), key and value (B, kv_heads, S, head_dim) → (B, S, heads, head_dim)."""
    batch, heads, seq, width = query.shape
    kv_heads = key.shape[1]
    past_k, past_v = _now.past[module.layer_idx]  # type: ignore[index]
    capacity = past_k.shape[2]
    q, k, v = (x.transpose(1, 2).reshape(batch, seq, -1) for x in (query, key, value))
    out, present_k, present_v = onnx_ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [q, k, v, past_k, past_v, _now.seqlens_k, _now.total, _now.cos, _now.sin],
        attrs={
            "num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1, "rotary_interleaved": 0,
            "scale": float(scaling if scaling is not None else width**-0.5),
        },
        dtypes=(q.dtype,) * 3,
        shapes=((batch, seq, heads * width), (batch, kv_heads, capacity, width), (batch, kv_heads, capacity, width)),
        version=1,
    )  # fmt: skip
    _now.present.append((present_k, present_v))
    return out.view(batch, seq, heads, width), None


def _multi_head_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Bidirectional attention with the 0/1 padding mask (B, S) → (B, S, heads, head_dim)."""
    batch, heads, seq, width = query.shape
    q, k, v = (x.transpose(1, 2).reshape(batch, seq, -1) for x in (query, key, value))
    out = onnx_ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [q, k, v, None, _now.mask],
        attrs={"num_heads": heads, "scale": float(scaling if scaling is not None else width**-0.5)},
        dtype=q.dtype,
        shape=(batch, seq, heads * width),
        version=1,
    )
    return out.view(batch, seq, heads, width), None


AttentionInterface.register("edgetune_decoder", _grouped_query_attention)
AttentionInterface.register("edgetune_encoder", _multi_head_attention)


class _Decoder(nn.Module):
    """input_ids (B, S), seqlens_k (B,), total (), logits_index (B, K), past → logits (B, K, vocab), present."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        super().__init__()
        self.model = model
        body = model.base_model
        cos, sin = body.rotary_emb(torch.zeros(1, 1, 1), position_ids=torch.arange(max_length)[None])
        half = cos.shape[-1] // 2
        self.register_buffer("cos", cos[0, :, :half].contiguous())
        self.register_buffer("sin", sin[0, :, :half].contiguous())

    def forward(
        self, input_ids: Tensor, seqlens_k: Tensor, total: Tensor, logits_index: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        _now.past, _now.present, _now.cos, _now.sin = past, [], self.cos, self.sin
        _now.seqlens_k, _now.total = seqlens_k, total
        zeros = torch.zeros_like(input_ids)  # positions are GroupQueryAttention's own affair
        hidden = self.model.base_model(input_ids=input_ids, position_ids=zeros, use_cache=False).last_hidden_state
        kept = onnx_ops.symbolic(
            "GatherND", [hidden, logits_index.unsqueeze(-1)], attrs={"batch_dims": 1}, dtype=hidden.dtype,
            shape=(*logits_index.shape, hidden.shape[-1]), version=13,
        )  # fmt: skip
        head = self.model.get_output_embeddings()
        return head(kept), _now.present


class _Encoder(nn.Module):
    """input_ids, attention_mask (B, S) → last_hidden_state (B, S, H), pooled (B, H)."""

    def __init__(self, body: PreTrainedModel, pooling: str) -> None:
        super().__init__()
        self.body, self.pooling = body, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        _now.mask = attention_mask.to(torch.int32)
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            return hidden, hidden[:, 0]
        weights = attention_mask.to(hidden.dtype).unsqueeze(-1)  # (B, S, 1)
        return hidden, (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def trace_decoder(model: PreTrainedModel, *, max_length: int) -> ir.Model:
    """Trace a causal language model; `max_length` is the number of rotary positions kept in the graph."""
    config = model.config
    _supported(config.model_type, DECODERS, "decoder")
    kv_heads, width, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    # never one tensor twice: the exporter would take them for one input
    past = [(torch.zeros(BATCH, kv_heads, PAST, width), torch.zeros(BATCH, kv_heads, PAST, width)) for _ in range(layers)]
    args = (
        torch.zeros(BATCH, SEQ, dtype=torch.int64), torch.full((BATCH,), SEQ - 1, dtype=torch.int32),
        torch.tensor(SEQ, dtype=torch.int32), torch.zeros(BATCH, KEEP, dtype=torch.int64), past,
    )  # fmt: skip
    batch, seq, keep, capacity = (torch.export.Dim(name) for name in ("batch", "sequence", "kept", "capacity"))
    dynamic: Any = ({0: batch, 1: seq}, {0: batch}, {}, {0: batch, 1: keep}, [({0: batch, 2: capacity},) * 2 for _ in past])
    pairs = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return _trace(
        _Decoder(model, max_length), args, dynamic, "edgetune_decoder", model,
        ["input_ids", "seqlens_k", "total_sequence_length", "logits_index", *(f"past_key_values.{p}" for p in pairs)],
        ["logits", *(f"present.{p}" for p in pairs)],
    )  # fmt: skip


def trace_encoder(body: PreTrainedModel, *, pooling: str) -> ir.Model:
    """Trace an encoder without its task head; the head is added to the graph later, as input or constant."""
    _supported(body.config.model_type, ENCODERS, "encoder")
    args = (torch.zeros(BATCH, SEQ, dtype=torch.int64), torch.ones(BATCH, SEQ, dtype=torch.int64))
    batch, seq = torch.export.Dim("batch"), torch.export.Dim("sequence")
    dynamic = ({0: batch, 1: seq}, {0: batch, 1: seq})
    return _trace(
        _Encoder(body, pooling), args, dynamic, "edgetune_encoder", body,
        ["input_ids", "attention_mask"], ["last_hidden_state", "pooled"],
    )  # fmt: skip


def _trace(
    module: nn.Module, args: tuple[Any, ...], dynamic: Any, attention: str, model: PreTrainedModel,
    inputs: list[str], outputs: list[str],
) -> ir.Model:  # fmt: skip
    was = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        with torch.no_grad(), _silent(), _leaves(model):
            program = torch.onnx.export(
                module.eval(), args, dynamic_shapes=dynamic, dynamo=True, opset_version=OPSET, optimize=True,
                input_names=inputs, output_names=outputs, verbose=False,
            )  # fmt: skip
    finally:
        model.set_attn_implementation(was)
    assert program is not None
    return program.model


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the tracer's own remarks (packages it does not find, axes it renames): they are about its insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _supported(model_type: str, families: tuple[str, ...], kind: str) -> None:
    if model_type not in families:
        raise ExportError(f"the {kind} family {model_type!r} cannot be exported", expected=f"one of {', '.join(families)}")


@contextlib.contextmanager
def _leaves(model: PreTrainedModel) -> Iterator[None]:
    """Swap the forwards of the model's leaves for one-node versions, and put them back."""
    swaps: list[tuple[Any, str, Any]] = []

    def swap(owner: Any, name: str, value: Any) -> None:
        swaps.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    names = {id(child): path for path, child in model.named_modules()}
    code = sys.modules[type(model).__module__]
    if hasattr(code, "apply_rotary_pos_emb"):  # GroupQueryAttention rotates
        swap(code, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k))
    swap(nn.Linear, "forward", _named(names, _linear))
    swap(nn.Embedding, "forward", _named(names, _embedding))
    swap(nn.LayerNorm, "forward", _layer_norm)
    for kind in {type(child) for child in model.modules() if _is_rms_norm(child)}:
        swap(kind, "forward", _rms_norm)
    try:
        yield
    finally:
        for owner, name, value in reversed(swaps):
            setattr(owner, name, value)


def _named(names: dict[int, str], leaf: Callable[[nn.Module, Tensor, str], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda self, x: leaf(self, x, names[id(self)])


def _linear(self: nn.Module, x: Tensor, module: str) -> Tensor:
    """One node `edgetune::Linear`(x, weight (out, in)[, bias (out,)])."""
    weight, bias = self.weight, self.bias
    operands = [x, weight] if bias is None else [x, weight, bias]
    shape = (*x.shape[:-1], weight.shape[0])  # type: ignore[index]
    return onnx_ops.symbolic(f"{DOMAIN}::Linear", operands, attrs={"module": module}, dtype=x.dtype, shape=shape, version=1)  # type: ignore[arg-type]


def _embedding(self: nn.Module, ids: Tensor, module: str) -> Tensor:
    """One node `edgetune::Embedding`(ids, weight (vocabulary, width))."""
    weight = self.weight
    shape = (*ids.shape, weight.shape[1])  # type: ignore[index]
    return onnx_ops.symbolic(
        f"{DOMAIN}::Embedding", [ids, weight], attrs={"module": module}, dtype=weight.dtype, shape=shape, version=1  # type: ignore[list-item, arg-type]
    )  # fmt: skip


def _layer_norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
    return onnx_ops.symbolic(
        "LayerNormalization", [x, self.weight, self.bias], attrs={"axis": -1, "epsilon": float(self.eps), "stash_type": 1},
        dtype=x.dtype, shape=x.shape, version=17,
    )  # fmt: skip


def _is_rms_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    return onnx_ops.symbolic(
        "SimplifiedLayerNormalization", [x, self.weight],  # type: ignore[list-item]
        attrs={"axis": -1, "epsilon": float(self.variance_epsilon), "stash_type": 1},  # type: ignore[arg-type]
        dtype=x.dtype, shape=x.shape, version=1,
    )  # fmt: skip
