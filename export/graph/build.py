"""From a base to the graph files of a bundle: traced, lowered, written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgetune import __version__
from edgetune.core.files import write_json
from edgetune.core.progress import Say
from edgetune.export.graph.attention import refuse_head_size
from edgetune.export.graph.deberta import LINEAR_ROWS
from edgetune.export.graph.families import cache_sizes, fixed_length
from edgetune.export.graph.fp16 import to_half
from edgetune.export.graph.fuse import simplify
from edgetune.export.graph.heads import (
    add_fixed_head,
    add_fixed_score,
    add_input_head,
    causal_model,
    decoder_head,
    drop_states,
)
from edgetune.export.graph.lower import input_embedding, lower, modules_and_widths, settle
from edgetune.export.graph.names import name_for_people
from edgetune.export.graph.native_nodes import NotExpressibleError
from edgetune.export.graph.native_plan import native_plan
from edgetune.export.graph.onnx_file import (
    DATA,
    ENGINE,
    NATIVE,
    STANDARD,
    write_data,
    write_graph,
)
from edgetune.export.graph.seq2seq import trace_seq2seq
from edgetune.export.graph.seq2seq_files import placed, seq2seq_shape, write_graphs
from edgetune.export.graph.standard import standard_decoder, standard_encoder
from edgetune.export.graph.symbolic_layers import DOMAIN
from edgetune.export.graph.trace import Traced, trace_decoder, trace_encoder
from edgetune.export.inputs.sources import AdapterSource
from edgetune.models.base import UNLIMITED, Base
from edgetune.models.heads import (
    DecoderClassifier,
    Embedder,
    RewardModel,
    SequenceClassifier,
    has_token_types,
)
from edgetune.quantisation.precision import Precision
from edgetune.runtime.bundle.manifest import GraphInfo, HeadInfo, Site

LARGEST_CONTEXT = 8192  # rotary positions kept in the graph at most


def _graph(
    base: Base,
    model: Any,
    sources: Sequence[AdapterSource],
    *,
    mode: str,
    precision: Precision,
    say: Say,
    traced: Traced | None = None,
) -> tuple[ir.Model, GraphInfo, list[Site], HeadInfo | None, Precision, dict[str, int]]:
    """Trace, simplify, quantise; what the runtime must know of the result, the precision layer by
    layer, and what stays in fp32 all the same (see `float_tables`).
    """
    config, max_length = model.config, _context(base, model)
    if max_length < base.max_length:
        say(_context_line(base, max_length))
    shape: dict[str, Any]
    if base.kind == "decoder":
        shape = asdict(cache_sizes(config))
    elif base.kind == "encoder-decoder":
        shape = seq2seq_shape(config)
    else:
        shape = {
            "cache_dtype": None,
            "pooling": base.pooling,
            "token_type_ids": has_token_types(config),
        }

    graph = _trace(base, model) if traced is None else traced.copy(lambda: _trace(base, model))
    say(f"writing weights as {precision.weights}")
    precision = settle(graph, precision)
    floats = float_tables(graph, precision)
    for module, more in floats.items():
        say(_float_line(module, more, precision.block_size))
    sites = lower(graph, precision, adapter_inputs=mode == "separate", skip=_untouched(sources))
    if base.kind == "encoder-decoder":
        sites = placed(graph, sites)
    head = (
        decoder_head(config.hidden_size)
        if base.kind == "decoder" and (mode == "separate" or isinstance(model, DecoderClassifier))
        else None
    )
    if isinstance(model, RewardModel):
        add_fixed_score(graph, model.score.weight)
    elif base.kind == "decoder" and head is None:
        drop_states(graph)
    if base.kind == "encoder":
        if isinstance(model, SequenceClassifier):
            add_fixed_head(graph, model, pooling=base.pooling or "mean")
        else:
            head = add_input_head(graph, hidden=config.hidden_size)
    if precision.weights == "fp16":
        to_half(graph)
        shape |= {"cache_dtype": "float16"} if base.kind == "decoder" else {}
    name_for_people(graph.graph)
    info = GraphInfo(
        engine=ENGINE,
        data=DATA,
        max_length=max_length,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        **{"standard": STANDARD, **shape},
    )
    return graph, info, sites, head, precision, floats


def float_tables(model: ir.Model, precision: Precision) -> dict[str, int]:
    """Tables that a quantised bundle keeps in fp32, because whole blocks do not fill their width:
    module → the bytes that costs. For a model before `lower`.
    """
    bits_of = {
        table.name: precision.bits(modules_and_widths(node)[0])
        for node in model.graph
        if node.domain == DOMAIN and node.op_type == "Linear"
        if (table := node.inputs[1]) is not None
    }
    found = {}
    for node in model.graph:
        if node.domain != DOMAIN or node.op_type not in ("Embedding", LINEAR_ROWS):
            continue
        module = node.attributes["module"].as_string()
        if node.op_type == "Embedding":
            rows, columns = _sizes(node.inputs[1])
            wanted = precision.embedding_bits(
                module,
                tied=bits_of.get(node.inputs[1].name, 0),  # type: ignore[union-attr]
                is_input=module == input_embedding(model.graph),
                columns=0,
            )
        else:
            rows, columns = _sizes(node.inputs[1])[0], _sizes(node.inputs[2])[0]
            wanted = 8 if precision.bits([module]) else 0
        if wanted and columns % precision.block_size:
            found[module] = rows * columns * (32 - wanted) // 8
    return found


def _sizes(value: ir.Value | None) -> tuple[int, int]:
    assert value is not None and value.shape is not None
    rows, columns = value.shape
    return int(rows), int(columns)  # type: ignore[arg-type]


def _float_line(module: str, more: int, block: int) -> str:
    """For a person, where a table is not rounded as asked."""
    return (
        f"{module} stays in fp32 ({more / 1e6:.1f} MB more): its width is no multiple of"
        f" --block-size {block}; a smaller one may round it"
    )


def _context(base: Base, model: Any) -> int:
    return fixed_length(model.config, min(base.max_length, base.context or LARGEST_CONTEXT))


def _context_line(base: Base, kept: int) -> str:
    """For a person, where a bundle has fewer positions than its base."""
    has = "no limit" if base.max_length >= UNLIMITED else f"{base.max_length:,} positions"
    more = (
        "no more: its rotary positions change after that"
        if kept < (base.context or LARGEST_CONTEXT)
        else f"--context N keeps more (now {kept:,})"
    )
    return f"context: the base has {has}, the bundle {kept:,}; {more}"


def _trace(base: Base, model: Any) -> ir.Model:
    """The base's graph in float, simplified: linear layers that read one input are one product."""
    inside = base.kind == "encoder" and isinstance(model, (Embedder, SequenceClassifier))
    body = model.body if inside else model
    body = causal_model(body, base)
    if base.kind == "decoder":
        refuse_head_size(model.config)
        graph = trace_decoder(body, max_length=_context(base, model))
    elif base.kind == "encoder-decoder":
        graph = trace_seq2seq(body)
    else:
        graph = trace_encoder(
            body, pooling=base.pooling or "mean", max_length=_context(base, model)
        )
    simplify(graph)
    return graph


def _untouched(sources: Sequence[AdapterSource]) -> frozenset[str]:
    """The output projection gets adapter inputs only when an adapter of this bundle was trained
    there.
    """
    return frozenset({"lm_head"}) - frozenset[str]().union(*(source.modules for source in sources))


def _write_graphs(
    graph: ir.Model,
    folder: Path,
    sites: Sequence[Site],
    info: GraphInfo,
    *,
    base: Base,
    precision: Precision,
    mode: str,
    say: Say,
) -> GraphInfo:
    """Write the graph files and the native plan; the description of them all."""
    note = {
        "base": base.name,
        "base_digest": base.digest,
        "precision": precision.weights,
        "mode": mode,
        "edgetune": __version__,
    }
    if base.kind == "encoder-decoder":
        write_graphs(graph, folder, sites, note=note)
        return info
    write_data(graph, folder)
    if base.kind == "decoder":
        info = _write_native_plan(graph, folder, sites, info, say=say)
    write_graph(graph, folder / ENGINE, metadata=note)
    standard = standard_decoder(graph) if base.kind == "decoder" else standard_encoder(graph)
    name_for_people(standard.graph)
    write_graph(standard, folder / STANDARD, metadata=note)
    return info


def _write_native_plan(
    graph: ir.Model, folder: Path, sites: Sequence[Site], info: GraphInfo, *, say: Say
) -> GraphInfo:
    """Write what the native engine must know of a decoder, where it takes it; else say why not."""
    try:
        plan = native_plan(graph.graph, info, sites, data_bytes=(folder / DATA).stat().st_size)
    except NotExpressibleError as reason:
        say(f"native engine: not for this bundle: {reason}")
        return info
    write_json(folder / NATIVE, plan.to_dict())
    return replace(info, native=NATIVE)
