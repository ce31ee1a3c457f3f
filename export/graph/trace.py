"""A transformers model → an ONNX IR graph in which every linear layer, norm, embedding and
attention is one node.

The model's own Python code is traced by torch.export; only the leaves are swapped while tracing
(`leaves`) and attention is emitted whole (`attention`).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgetune.export.graph import attention
from edgetune.export.graph.attention import now
from edgetune.export.graph.deberta import Distances, is_disentangled
from edgetune.export.graph.decomposition import only_where_needed
from edgetune.export.graph.families import cache_sizes, decoder_family, encoder_family
from edgetune.export.graph.repeated_layers import Repeats, UnlikeError, tidy
from edgetune.export.graph.symbolic_layers import is_rotary, symbolic_leaves
from edgetune.models.heads import has_token_types
from edgetune.runtime.bundle.manifest import STATES

OPSET = 21
# Example sizes while tracing: all different and never 1, because torch.export freezes a dimension
# of 1.
BATCH, SEQ, PAST, KEEP = 2, 3, 5, 4


class _Traced(nn.Module):
    """A model with the rotary tables of its first `max_length` positions, each (positions,
    dimensions / 2).
    """

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        super().__init__()
        self.model = model
        self.tables: dict[tuple[int, str | None], str] = {}
        positions = torch.arange(max_length)[None]
        for module in model.modules():
            for kind in _table_kinds(module) if is_rotary(module) else ():
                arguments = {} if kind is None else {"layer_type": kind}
                tables = module(torch.zeros(1, 1, 1), position_ids=positions, **arguments)
                name = f"rotary_{len(self.tables)}"
                self.tables[id(module), kind] = name
                for part, table in zip(("cos", "sin"), tables, strict=True):
                    half = table[0, :, : table.shape[-1] // 2]
                    self.register_buffer(
                        f"{name}_{part}", half.detach().contiguous(), persistent=False
                    )

    def rotary(self, module: nn.Module, layer_type: str | None) -> tuple[Tensor, Tensor]:
        """The tables of a rotary module."""
        name = self.tables[id(module), layer_type]
        return getattr(self, f"{name}_cos"), getattr(self, f"{name}_sin")


def _table_kinds(module: Any) -> list[str | None]:
    """The layer types that a rotary module has a table for; [None] where there is one for all."""
    kinds = getattr(module, "layer_types", None)
    return [None] if kinds is None else list(module.rope_type)


class _Decoder(_Traced):
    """input_ids (B, S), seqlens_k (B,), total (), logits_index (B, K), past → logits (B, K, vocab),
    states (B, K, H), present.
    """

    index: Tensor

    def forward(
        self,
        input_ids: Tensor,
        seqlens_k: Tensor,
        total: Tensor,
        logits_index: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        now.past, now.present, now.rotary = past, [], None
        now.seqlens_k, now.total = seqlens_k, total
        _Decoder.index = logits_index
        seq = input_ids.shape[1]
        # for learned positions; rotation is mostly attention's own affair. A shorter row of a first
        # prompt starts at 0 too.
        start = (seqlens_k.to(torch.int64) + 1 - seq).clamp(min=0)
        now.positions = start[:, None] + torch.arange(seq)[None]
        logits = self.model(input_ids=input_ids, position_ids=now.positions, use_cache=False).logits
        return logits, now.rows, now.present


class _Encoder(_Traced):
    """input_ids, attention_mask and, where the body knows types of tokens, token_type_ids (B, S) →
    last_hidden_state (B, S, H), pooled (B, H)."""

    def __init__(self, body: PreTrainedModel, max_length: int, pooling: str) -> None:
        super().__init__(body, max_length)
        self.pooling = pooling
        self.distances = Distances(body, max_length) if is_disentangled(body) else None

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        now.mask, now.windows, now.rotary = attention_mask.to(torch.int32), {}, None
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, **types
        ).last_hidden_state
        if self.pooling == "cls":
            return hidden, hidden[:, 0]
        weights = attention_mask.to(hidden.dtype).unsqueeze(-1)  # (B, S, 1)
        return hidden, (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def trace_decoder(model: PreTrainedModel, *, max_length: int) -> ir.Model:
    """Trace a causal language model; `max_length` is the number of rotary positions kept in the
    graph.
    """
    decoder_family(model.config)
    sizes = cache_sizes(model.config)
    kv_heads, width, layers = sizes.kv_heads, sizes.head_dim, sizes.layers
    # never one tensor twice: the exporter would take them for one input
    past = [
        (torch.zeros(BATCH, kv_heads, PAST, width), torch.zeros(BATCH, kv_heads, PAST, width))
        for _ in range(layers)
    ]
    args = (
        torch.zeros(BATCH, SEQ, dtype=torch.int64),
        torch.full((BATCH,), SEQ - 1, dtype=torch.int32),
        torch.tensor(SEQ, dtype=torch.int32),
        torch.zeros(BATCH, KEEP, dtype=torch.int64),
        past,
    )
    batch, seq, keep, capacity = (
        torch.export.Dim(name) for name in ("batch", "sequence", "kept", "capacity")
    )
    dynamic: Any = (
        {0: batch, 1: seq},
        {0: batch},
        {},
        {0: batch, 1: keep},
        [({0: batch, 2: capacity},) * 2 for _ in past],
    )
    pairs = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return _trace(
        _Decoder(model, max_length),
        args,
        dynamic,
        attention.DECODER,
        [
            "input_ids",
            "seqlens_k",
            "total_sequence_length",
            "logits_index",
            *(f"past_key_values.{p}" for p in pairs),
        ],
        ["logits", STATES, *(f"present.{p}" for p in pairs)],
        logits_index=lambda: _Decoder.index,
    )


def trace_encoder(body: PreTrainedModel, *, pooling: str, max_length: int) -> ir.Model:
    """Trace an encoder without its task head; the head is added to the graph later, as input or
    constant.
    """
    encoder_family(body.config)
    names = [
        "input_ids",
        "attention_mask",
        *(["token_type_ids"] if has_token_types(body.config) else []),
    ]
    args = (
        torch.zeros(BATCH, SEQ, dtype=torch.int64),
        torch.ones(BATCH, SEQ, dtype=torch.int64),
        torch.zeros(BATCH, SEQ, dtype=torch.int64),
    )
    batch, seq = torch.export.Dim("batch"), torch.export.Dim("sequence")
    return _trace(
        _Encoder(body, max_length, pooling),
        args[: len(names)],
        ({0: batch, 1: seq},) * len(names),
        attention.ENCODER,
        names,
        [STATES, "pooled"],
    )


def _trace(
    module: _Traced,
    args: tuple[Any, ...],
    dynamic: Any,
    implementation: str,
    inputs: list[str],
    outputs: list[str],
    *,
    logits_index: Callable[[], Tensor] | None = None,
) -> ir.Model:
    repeats = Repeats(module.model) if isinstance(module, (_Decoder, _Encoder)) else None

    def export() -> ir.Model:
        return _exported(
            module,
            args,
            dynamic,
            implementation,
            inputs,
            outputs,
            logits_index=logits_index,
            repeats=repeats,
        )

    try:
        return export()
    except UnlikeError:
        repeats = None
        return export()


def _exported(
    module: _Traced,
    args: tuple[Any, ...],
    dynamic: Any,
    implementation: str,
    inputs: list[str],
    outputs: list[str],
    *,
    logits_index: Callable[[], Tensor] | None,
    repeats: Repeats | None,
) -> ir.Model:
    """The graph after the exporter's own passes; `repeats` saves tracing layers that are alike."""
    model = module.model
    was, distances = model.config._attn_implementation, getattr(module, "distances", None)
    if distances is None:  # else attention is swapped with the leaves
        model.set_attn_implementation(implementation)
    swapped = contextlib.nullcontext() if distances is None else distances.swapped(model)
    abridged = contextlib.nullcontext() if repeats is None else repeats.abridged()
    try:
        with (
            torch.no_grad(),
            silent(),
            symbolic_leaves(model, module.rotary, logits_index=logits_index),
            swapped,
            abridged,
            only_where_needed(),
        ):
            weights = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
            program = torch.onnx.export(
                module.eval(),
                args,
                dynamic_shapes=dynamic,
                dynamo=True,
                opset_version=OPSET,
                optimize=repeats is None,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
    finally:
        if distances is None:
            model.set_attn_implementation(was)
    assert program is not None
    if repeats is not None:
        repeats.check(program.model)
        with repeats.held_apart(program.model.graph):
            program.optimize()
            repeats.write_out(program.model)
        tidy(program.model, weights)
    return program.model


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without the tracer's own remarks (packages it does not find, axes it renames): they are about
    its insides.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class Traced:
    """Keeps the graph of the first caller; everybody gets a copy that shares its weights."""

    def __init__(self) -> None:
        self._model: ir.Model | None = None

    def copy(self, trace: Callable[[], ir.Model]) -> ir.Model:
        """A graph of one's own; `trace` makes it the first time, and is not called again."""
        if self._model is None:
            self._model = trace()
        return self._model.clone()
