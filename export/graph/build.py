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
from edgetune.export.graph.adapter_branch import ADAPTED, PLAIN, by_situation
from edgetune.export.graph.attention import refuse_head_size
from edgetune.export.graph.families import cache_sizes, fixed_length
from edgetune.export.graph.fp16 import to_half
from edgetune.export.graph.fuse import simplify
from edgetune.export.graph.heads import (
    add_fixed_score,
    add_head,
    add_token_head,
    causal_model,
    decoder_head,
    drop_states,
)
from edgetune.export.graph.lower import lower, settle
from edgetune.export.graph.names import name_for_people
from edgetune.export.graph.native_nodes import NotExpressibleError
from edgetune.export.graph.native_plan import native_plan
from edgetune.export.graph.onnx_file import (
    BY_SITUATION,
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
from edgetune.export.graph.trace import Traced, trace_decoder, trace_encoder
from edgetune.export.inputs.sources import AdapterSource
from edgetune.models.base import UNLIMITED, Base
from edgetune.models.heads import RewardModel, SequenceClassifier, TokenClassifier, has_token_types
from edgetune.quantisation.precision import Precision
from edgetune.runtime.bundle.manifest import GraphInfo, HeadInfo, Site
from edgetune.runtime.engine.session import ADAPTER_BRANCH

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
) -> tuple[ir.Model, GraphInfo, list[Site], HeadInfo | None, Precision]:
    """Trace, simplify, quantise; what the runtime must know of the result, and the precision layer
    by layer.
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
    sites = lower(graph, precision, adapter_inputs=mode == "separate", skip=_untouched(sources))
    if base.kind == "encoder-decoder":
        sites = placed(graph, sites)
    head = (
        decoder_head(config.hidden_size) if base.kind == "decoder" and mode == "separate" else None
    )
    if isinstance(model, RewardModel):
        add_fixed_score(graph, model.score.weight)
    elif base.kind == "decoder" and head is None:
        drop_states(graph)
    if base.kind == "encoder":
        classifier = model.classifier if isinstance(model, SequenceClassifier) else None
        weights = (
            (classifier.weight.detach(), classifier.bias.detach())
            if classifier is not None
            else (None, None)
        )
        if isinstance(model, TokenClassifier):
            add_token_head(graph, model.classifier.weight.detach(), model.classifier.bias.detach())
        else:
            head = add_head(graph, *weights, hidden=config.hidden_size)
    if precision.weights == "fp16":
        to_half(graph)
        shape |= {"cache_dtype": "float16"} if base.kind == "decoder" else {}
    name_for_people(graph.graph)
    situations = (
        BY_SITUATION if sites and base.kind == "decoder" and precision.weights != "fp16" else None
    )  # fp16 is not for the CPU
    info = GraphInfo(
        engine=ENGINE,
        data=DATA,
        situations=situations,
        max_length=max_length,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        **{"standard": STANDARD, **shape},
    )
    return graph, info, sites, head, precision


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
    body = model.body if isinstance(model, SequenceClassifier) else causal_model(model, base)
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
    if info.situations is not None:
        write_graph(
            by_situation(graph, sites),
            folder / info.situations,
            metadata=note | {ADAPTER_BRANCH: f"{ADAPTED}, {PLAIN}"},
        )
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
