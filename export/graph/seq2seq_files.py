"""An encoder-decoder's one graph → the two graph files of a bundle over one file of weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgetune.core.errors import ExportError
from edgetune.export.graph.adapter_branch import ADAPTED, PLAIN, by_situation
from edgetune.export.graph.families import cache_sizes
from edgetune.export.graph.fuse import drop_dead
from edgetune.export.graph.onnx_file import ENGINE, write_data, write_graph
from edgetune.export.graph.seq2seq import DECODER_IDS, ENCODER, POSITIONS, PRESENT
from edgetune.quantisation.precision import Precision
from edgetune.runtime.bundle.manifest import Site
from edgetune.runtime.engine.session import ADAPTER_BRANCH


def placed(graph: ir.Model, sites: Sequence[Site]) -> list[Site]:
    """The sites, each with the file whose input it is."""
    own = {value.name for value in encoder_of(graph).graph.inputs}
    return [replace(site, graph=ENCODER) if site.A in own else site for site in sites]


def write_graphs(
    graph: ir.Model, folder: Path, sites: Sequence[Site], *, note: dict[str, str]
) -> None:
    """Write `encoder.onnx`, `engine.onnx` (the decoder) and the weights of both."""
    write_data(graph, folder)
    for half, name in ((encoder_of(graph), ENCODER), (decoder_of(graph), ENGINE)):
        own = [site for site in sites if (site.graph or ENGINE) == name]
        if own:
            write_graph(
                by_situation(half, own),
                folder / name,
                metadata=note | {ADAPTER_BRANCH: f"{ADAPTED}, {PLAIN}"},
            )
        else:
            write_graph(half, folder / name, metadata=note)


def encoder_of(model: ir.Model) -> ir.Model:
    """input_ids and attention_mask (B, T) → keys and values (B, heads, T, head_dim) for each layer
    of the decoder.
    """
    return _half(model, [value.name or "" for value in model.graph.outputs if _is_encoders(value)])


def decoder_of(model: ir.Model) -> ir.Model:
    """A decoder as its engine takes it, with what the encoder gave beside its own cache."""
    half = _half(
        model, [value.name or "" for value in model.graph.outputs if not _is_encoders(value)]
    )
    graph = half.graph
    inputs = {value.name: value for value in graph.inputs}
    inputs[DECODER_IDS].name = "input_ids"
    total = ir.node(
        "Cast", [inputs["total_sequence_length"]], attributes={"to": int(ir.DataType.INT64)}
    )
    ends = [ir.node("Constant", [], attributes={"value": ir.tensor(number)}) for number in (0, 1)]
    places = ir.node("Range", [ends[0].outputs[0], total.outputs[0], ends[1].outputs[0]])
    for node in (total, *ends, places):
        graph.insert_before(next(iter(graph)), node)
    ir.convenience.replace_all_uses_with(inputs[POSITIONS], places.outputs[0])
    graph.inputs.remove(inputs[POSITIONS])
    graph.sort()
    return half


def _is_encoders(value: ir.Value) -> bool:
    return (value.name or "").startswith(f"{PRESENT}.")


def _half(model: ir.Model, outputs: Collection[str]) -> ir.Model:
    """What these outputs are computed from."""
    half = model.clone()
    graph = half.graph
    for value in [value for value in graph.outputs if value.name not in outputs]:
        graph.outputs.remove(value)
    drop_dead(half)
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    return half


def check_seq2seq(precision: Precision) -> None:
    """ExportError for what an encoder-decoder cannot be stored as."""
    if precision.weights == "fp16":
        raise ExportError(
            "an encoder-decoder's activations overflow in fp16, and its graph is for the CPU",
            where="--precision fp16",
            expected="fp32, int8 or int4",
        )
    if precision.quantiser == "gptq":
        raise ExportError(
            "gptq does not read prompts and answers apart yet",
            where="--quantiser gptq",
            fix="Use --quantiser hqq, which needs no text.",
        )


def seq2seq_shape(config: Any) -> dict[str, Any]:
    """What the manifest says of the graphs beyond what it says of all."""
    return {
        **asdict(cache_sizes(config)),
        "standard": None,
        "encoder": ENCODER,
        "start_token_id": int(config.decoder_start_token_id),
    }
