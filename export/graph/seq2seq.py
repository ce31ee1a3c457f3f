"""An encoder-decoder of the T5 family → one ONNX IR graph of both halves, traced together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
import torch.onnx.ops as onnx_ops
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from edgetune.core.errors import ExportError
from edgetune.export.graph.attention import now
from edgetune.export.graph.families import cache_sizes, seq2seq_family
from edgetune.export.graph.symbolic_layers import DOMAIN, symbolic_leaves
from edgetune.export.graph.trace import BATCH, KEEP, OPSET, PAST, SEQ, silent

IMPLEMENTATION = "edgetune_seq2seq"
EMBEDDING = "shared"
# example sizes: the halves share none, so that neither takes its own from the other
TEXTS, SOURCE, ATTENDED, KEYS = 9, 7, 8, 6
# the encoder's keys and values for each decoder layer, as it gives and as the decoder takes them
PRESENT, CROSS = "cross_present", "cross_past"
DECODER_IDS, DECODER_MASK, POSITIONS = (
    "decoder_input_ids",
    "encoder_attention_mask",
    "key_positions",
)


class _Given(DynamicCache):
    """Stands in for a cache of the decoder's own tokens, which the engine's attention keeps: new
    keys stay as they are.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values alone."""
        return key_states, value_states


class _Seq2Seq(nn.Module):
    """Both halves, each from its own inputs; see `trace_seq2seq` for their names."""

    index: Tensor

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model
        self.names: dict[int, str] = {}
        for module in list(model.modules()):
            if getattr(module, "has_relative_attention_bias", False):
                name = f"distances_{len(self.names)}"
                self.names[id(module)] = name
                self.register_buffer(name, bias_table(module), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        encoder_attention_mask: Tensor,
        seqlens_k: Tensor,
        total: Tensor,
        key_positions: Tensor,
        logits_index: Tensor,
        past: list[tuple[Tensor, Tensor]],
        cross: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """logits (B, K, vocab), the decoder's cache, and the encoder's keys and values, each (B,
        heads, T, D).
        """
        encoded, states = self.encode(input_ids, attention_mask)
        now.mask, now.past, now.present = encoder_attention_mask.to(torch.int32), past, []
        now.seqlens_k, now.total = seqlens_k, total
        _Seq2Seq.index = logits_index
        seq = decoder_input_ids.shape[1]
        start = (seqlens_k.to(torch.int64) + 1 - seq).clamp(min=0)
        places = start[:, None] + torch.arange(seq)[None]  # (B, S)
        self.apart = places[:, :, None] - key_positions  # (B, S, keys)
        logits = self.model(
            encoder_outputs=(states,),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=decoder_input_ids,
            past_key_values=_cache(cross),
            use_cache=False,
        ).logits
        return logits, now.present, encoded

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """What the decoder's layers attend to, computed once for a text, and the states (B, T,
        hidden) it is made of.
        """
        now.mask = attention_mask.to(torch.int32)
        place = torch.arange(input_ids.shape[1])
        self.apart = place[None, :] - place[:, None]  # (T, T)
        states = self.model.encoder(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        pairs = []
        for block in self.model.decoder.block:
            attention = block.layer[1].EncDecAttention
            shape = (*states.shape[:2], attention.n_heads, attention.key_value_proj_dim)
            pairs.append(
                (
                    attention.k(states).view(shape).transpose(1, 2),
                    attention.v(states).view(shape).transpose(1, 2),
                )
            )
        return pairs, states

    def bias_of(self, module: nn.Module) -> Tensor:
        """What a module adds to its scores for the distances of now: (1, heads, T, T) or (B, heads,
        S, keys).
        """
        table = getattr(self, self.names[id(module)])  # (heads, distances)
        two_sided, furthest = not module.is_decoder, int(module.relative_attention_max_distance)  # type: ignore[arg-type]
        apart = self.apart.clamp(min=-furthest if two_sided else 0, max=furthest) + (
            furthest if two_sided else 0
        )
        found = onnx_ops.symbolic(
            "Gather",
            [table, apart],
            attrs={"axis": 1},
            dtype=table.dtype,
            shape=(table.shape[0], *apart.shape),
            version=13,
        )
        return found.unsqueeze(0) if two_sided else found.transpose(0, 1)


def bias_table(module: Any) -> Tensor:
    """(heads, distances) by the module's own code: a decoder's distance is how far back a key
    stands, 0 … furthest; an encoder's where it stands, -furthest … furthest. Further apart all are
    alike (Raffel et al. 2020, arXiv 1910.10683, 2.1).
    """
    furthest = int(module.relative_attention_max_distance)
    with torch.no_grad():
        if module.is_decoder:
            return (
                module.compute_bias(1, furthest + 1, past_seen_tokens=furthest)[0, :, 0]
                .flip(-1)
                .contiguous()
            )
        return module.compute_bias(2 * furthest + 1, 2 * furthest + 1)[0, :, furthest].contiguous()


def _cache(cross: list[tuple[Tensor, Tensor]]) -> EncoderDecoderCache:
    """A cache by which the model takes keys and values of the encoder as they are given."""
    there = DynamicCache()
    for layer, (key, value) in enumerate(cross):
        there.update(key, value, layer)
    both = EncoderDecoderCache(_Given(), there)
    both.is_updated = dict.fromkeys(range(len(cross)), True)
    return both


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query (B, heads, S, D) → (B, S, heads, D), as the place of the module asks."""
    batch, heads, seq, width = query.shape
    scale = float(scaling if scaling is not None else width**-0.5)
    if module.is_decoder and module.is_causal:
        return _own_tokens(query, key, value, position_bias, scale=scale), None
    rows = [query.transpose(1, 2).reshape(batch, seq, -1)]
    # keys and values of the encoder lie as attention wants them; they have no relative positions
    if module.is_decoder:
        rows, bias = [*rows, key, value], []
    else:
        rows, bias = (
            [*rows, *(x.transpose(1, 2).reshape(batch, seq, -1) for x in (key, value))],
            [position_bias],
        )
    out = onnx_ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [*rows, None, now.mask, *bias],
        attrs={"num_heads": heads, "scale": scale},
        dtype=query.dtype,
        shape=(batch, seq, heads * width),
        version=1,
    )
    return out.view(batch, seq, heads, width), None


def _own_tokens(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, scale: float
) -> Tensor:
    batch, heads, seq, width = query.shape
    past_k, past_v = now.past[len(now.present)]
    shape = (batch, heads, past_k.shape[2], width)
    out, present_k, present_v = onnx_ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [
            *(x.transpose(1, 2).reshape(batch, seq, -1) for x in (query, key, value)),
            past_k,
            past_v,
            now.seqlens_k,
            now.total,
            None,
            None,
            None,
            bias,
        ],
        attrs={"num_heads": heads, "kv_num_heads": heads, "do_rotary": 0, "scale": scale},
        dtypes=(query.dtype,) * 3,
        shapes=((batch, seq, heads * width), shape, shape),
        version=1,
    )
    now.present.append((present_k, present_v))
    return out.view(batch, seq, heads, width)


def trace_seq2seq(model: PreTrainedModel) -> ir.Model:
    """Trace both halves into one graph; `seq2seq_files` parts it again."""
    seq2seq_family(model.config)
    _one_embedding(model)
    sizes = cache_sizes(model.config)

    def pairs(length: int) -> list[tuple[Tensor, Tensor]]:
        shape = (BATCH, sizes.kv_heads, length, sizes.head_dim)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(sizes.layers)]

    names = ("texts", "tokens", "batch", "source", "sequence", "keys", "kept", "capacity")
    texts, tokens, batch, source, seq, keys, keep, capacity = (
        torch.export.Dim(name) for name in names
    )
    args = (
        torch.zeros(TEXTS, SOURCE, dtype=torch.int64),
        torch.ones(TEXTS, SOURCE, dtype=torch.int64),
        torch.zeros(BATCH, SEQ, dtype=torch.int64),
        torch.ones(BATCH, ATTENDED, dtype=torch.int64),
        torch.full((BATCH,), SEQ - 1, dtype=torch.int32),
        torch.tensor(SEQ, dtype=torch.int32),
        torch.arange(KEYS),
        torch.zeros(BATCH, KEEP, dtype=torch.int64),
        pairs(PAST),
        pairs(ATTENDED),
    )
    text, cache, given = {0: texts, 1: tokens}, {0: batch, 2: capacity}, {0: batch, 2: source}
    dynamic: Any = (
        text,
        text,
        {0: batch, 1: seq},
        {0: batch, 1: source},
        {0: batch},
        {},
        {0: keys},
        {0: batch, 1: keep},
        [(cache,) * 2] * sizes.layers,
        [(given,) * 2] * sizes.layers,
    )
    named = [f"{layer}.{side}" for layer in range(sizes.layers) for side in ("key", "value")]
    inputs = [
        "input_ids",
        "attention_mask",
        DECODER_IDS,
        DECODER_MASK,
        "seqlens_k",
        "total_sequence_length",
        POSITIONS,
        "logits_index",
    ]
    inputs += [*(f"past_key_values.{one}" for one in named), *(f"{CROSS}.{one}" for one in named)]
    outputs = [
        "logits",
        *(f"present.{one}" for one in named),
        *(f"{PRESENT}.{one}" for one in named),
    ]
    wrapped = _Seq2Seq(model).eval()
    with (
        torch.no_grad(),
        silent(),
        symbolic_leaves(model, _no_rotation, logits_index=lambda: _Seq2Seq.index),
        _swapped(model, wrapped),
    ):
        program = torch.onnx.export(
            wrapped,
            args,
            dynamic_shapes=dynamic,
            dynamo=True,
            opset_version=OPSET,
            optimize=True,
            input_names=inputs,
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    _named_alike(program.model.graph)
    return program.model


def _one_embedding(model: Any) -> None:
    """ExportError where encoder and decoder have a table of tokens each."""
    if any(
        half.embed_tokens.weight is not model.shared.weight
        for half in (model.encoder, model.decoder)
    ):
        raise ExportError(
            "encoder and decoder read different embeddings",
            expected="one, as T5 has it",
            got=type(model).__name__,
        )


def _named_alike(graph: ir.Graph) -> None:
    """Both halves' embeddings under the name of the one table that they read."""
    for node in graph:
        if node.domain == DOMAIN and node.op_type == "Embedding":
            node.attributes["module"] = ir.AttrString("module", EMBEDDING)


def _no_rotation(module: nn.Module, layer_type: str | None) -> tuple[Tensor, Tensor]:
    raise ExportError("this family has no rotary embedding", got=type(module).__name__)


@contextlib.contextmanager
def _swapped(model: Any, wrapped: _Seq2Seq) -> Iterator[None]:
    """Attention and position biases as one node each."""
    owners: list[Any] = [module for module in model.modules() if id(module) in wrapped.names]
    was = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    for module in owners:
        module.compute_bias = lambda *_, module=module, **__: wrapped.bias_of(module)
    try:
        yield
    finally:
        for module in owners:
            del module.compute_bias
        model.set_attn_implementation(was)


AttentionInterface.register(IMPLEMENTATION, _attention)
ENCODER = "encoder.onnx"
