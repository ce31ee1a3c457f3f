"""Adapters → a bundle folder: graph, quantised weights, adapter files, tokenizer, proof, manifest. Whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgetune import __version__
from edgetune.bases import Base, load_tokenizer
from edgetune.errors import OutputError
from edgetune.export.calibrating import calibrate_base, check_activations, check_quantiser, check_symmetry
from edgetune.export.companions import copy_adapter, copy_tokenizer, write_genai_config, write_onnx_adapter
from edgetune.export.cost import CostPlan
from edgetune.export.families import cache_sizes, fixed_length, known_family
from edgetune.export.graphfile import (
    BY_SITUATION,
    DATA,
    ENGINE,
    STANDARD,
    standard_decoder,
    standard_encoder,
    write_data,
    write_graph,
)
from edgetune.export.half import to_half
from edgetune.export.layout import simplify
from edgetune.export.lower import Precision, add_head, lower, settle
from edgetune.export.names import name_for_people
from edgetune.export.page import write_page
from edgetune.export.probe import probe_rows
from edgetune.export.proof import demand
from edgetune.export.proving import proof_document, prove_bundle
from edgetune.export.reference import warning
from edgetune.export.score_head import add_fixed_score, causal_model, decoder_head, drop_states
from edgetune.export.seq2seq import check_seq2seq, seq2seq_shape
from edgetune.export.seq2seq_graphs import placed, write_graphs
from edgetune.export.seq2seq_trace import trace_seq2seq
from edgetune.export.situations import ADAPTED, PLAIN, by_situation
from edgetune.export.sources import Source, base_of, check_sources, read_source
from edgetune.export.task import ALONE, TaskPlan
from edgetune.export.token_head import add_token_head
from edgetune.export.torch_side import as_stored, torch_model
from edgetune.export.trace import trace_decoder, trace_encoder
from edgetune.export.traced import Traced
from edgetune.files import sha256_file, whole_folder, write_json
from edgetune.heads import RewardModel, SequenceClassifier, has_token_types
from edgetune.runtime.adapters import pack_adapter
from edgetune.runtime.binding import SITUATIONS
from edgetune.runtime.manifest import (
    MANIFEST,
    REWARD,
    SCHEMA,
    TAGGING,
    AdapterEntry,
    BaseInfo,
    FileInfo,
    GraphInfo,
    HeadInfo,
    Manifest,
    Site,
)
from edgetune.runtime.manifest import Precision as PrecisionInfo
from edgetune.token_classifier import TokenClassifier
from edgetune.weight_precision import FLOATS, INT4_DECODER

Say = Callable[[str], None]
LARGEST_CONTEXT = 8192  # rotary positions kept in the graph at most


def export_bundle(
    adapters: Sequence[tuple[str, Path]], out: Path, *, mode: str = "separate", precision: Precision | None = None,
    base_name: str | None = None, threads: int | None = None, calibration: Path | None = None, say: Say = lambda line: None,
    task: TaskPlan | None = None, traced: Traced | None = None, cost: CostPlan | None = None,
) -> Manifest:  # fmt: skip
    """Write a bundle of `adapters` (name, run folder or PEFT folder) to `out` and prove it.

    `task` says on which rows each adapter's metric is taken, in torch and in the bundle; not given: on a few of its recipe's
    validation rows. `cost` says where WikiText-2 and STS-B are, on which the precision's cost is taken; not given: it is not.
    `calibration`: text for the quantiser gptq; not given: the training rows of the runs. `traced` keeps the
    graph for further bundles of the same model. ProofError when the proof fails; then, as after any error, nothing is left at
    `out` that was not there before.
    """
    precision = precision or Precision()
    check_place(out)
    (task or TaskPlan()).check()
    sources = [read_source(name, Path(folder)) for name, folder in adapters]
    if len(sources) == 1 and sources[0].is_model and mode == "separate":
        say(f"{sources[0].name}: all its weights were trained, so it is the bundle's base and nothing swaps it")
        mode = "merged"
    check_sources(sources, mode, precision, base_name)
    swaps = not any(source.is_model or source.config.get("use_dora") for source in sources)
    check_symmetry(precision)
    check_quantiser(precision, mode=mode, calibration=calibration, swaps=swaps)
    base = base_of(sources, base_name)
    known_family(base.model_type, kind=base.kind)  # before anything is loaded
    check_activations(precision, kind=base.kind, mode=mode)
    if base.kind == "encoder-decoder":
        check_seq2seq(precision)
    if base.kind != "encoder" and precision.weights == "int4":
        precision = replace(precision, overrides=INT4_DECODER | dict(precision.overrides))
    with whole_folder(out) as folder:
        manifest, rows = _build(base, sources, folder, mode=mode, precision=precision, calibration=calibration, say=say, traced=traced)
        proofs = prove_bundle(folder, manifest, base, sources, rows, threads=threads)
        for name, proof in proofs.items():
            say(f"proof {name}: {'passed' if proof.passed else 'FAILED'}; {proof.line()}")
        demand(proofs, where=str(out), merged=manifest.mode == "merged" and precision.weights not in FLOATS)
        results = (task or TaskPlan()).measure(folder, manifest, base, sources, load=torch_model, threads=threads, say=say)
        found = None if cost is None else cost.measure(folder, manifest, base, lambda: as_stored(base, sources, mode), threads=threads, say=say)
        if found is not None:
            manifest = replace(manifest, quality={**manifest.quality, "cost": found.to_dict()})
        document = proof_document(proofs, rows, precision) | {"task": {name: result.to_dict() for name, result in results.items()}}
        manifest = replace(manifest, proof=document, files=_digests(folder))
        manifest = replace(manifest, files=manifest.files | write_page(folder, manifest))
        write_json(folder / MANIFEST, manifest.to_dict())
    return manifest


def check_place(out: Path) -> None:
    """A bundle may replace a bundle, never another folder of the user's; inside another one it would go with it."""
    if (around := next((folder for folder in out.absolute().parents if (folder / MANIFEST).is_file()), None)) is not None:
        raise OutputError("this place is inside another bundle", where=str(out), got=str(around), fix="Choose another --out: exporting that one again would take this one away.")
    if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(
            "there is something else at this place", where=str(out), expected=f"a new or empty folder, or a bundle (with {MANIFEST})",
            got="another folder" if out.is_dir() else "a file", fix="Choose another --out.",
        )  # fmt: skip


def _build(
    base: Base, sources: Sequence[Source], folder: Path, *, mode: str, precision: Precision, say: Say, calibration: Path | None = None,
    traced: Traced | None = None,
) -> tuple[Manifest, dict[str, list[list[int]]]]:
    """Everything but the proof: files in `folder`, the manifest so far, and the probe rows of each adapter."""
    tokenizer = load_tokenizer(base)
    say(f"tracing {base.name} ({base.model_type})")
    model = as_stored(base, sources, mode)
    if precision.quantiser == "gptq":
        if set(precision.overrides) - set(INT4_DECODER):  # whoever calibrates must know what layers of one product are stored in
            precision = settle(_trace(base, model), precision)
        calibrate_base(model, base, sources, tokenizer, precision, file=calibration, say=say)
        traced = None  # a graph kept from before has the weights as they were
    graph, info, sites, head, precision = _graph(base, model, sources, mode=mode, precision=precision, say=say, traced=traced)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    del model
    _write_graphs(graph, folder, sites, info, base=base, precision=precision, mode=mode)
    files = copy_tokenizer(base, tokenizer, folder)
    if base.kind == "decoder" and not (mode == "merged" and sources[0].task == REWARD):  # a merged reward only scores
        write_genai_config(config, files, folder, max_length=info.max_length)
    manifest = Manifest(
        schema=SCHEMA, edgetune_version=__version__, task=_task(base, sources),
        base=BaseInfo(base.name, base.digest, base.model_type, parameters), mode=mode,
        precision=PrecisionInfo(
            precision.weights, None if precision.weights in FLOATS or precision.activations == "int8" else precision.block_size,
            dict(precision.overrides), precision.quantiser, precision.activations, precision.symmetric,
        ),
        graph=info, sites=tuple(sites), head=head, tokenizer=files, adapters=(),
    )  # fmt: skip
    for line in filter(None, (warning(source.name, source.metadata, manifest) for source in sources)):
        say(line)
    entries = [_add_adapter(source, folder, manifest, say=say) for source in sources]
    manifest = replace(manifest, adapters=tuple(entries))
    rows = {source.name: probe_rows(source.folder, tokenizer, base) for source in sources}
    if not sources:
        rows = {ALONE: probe_rows(base.folder, tokenizer, base)}
    return manifest, rows


def _task(base: Base, sources: Sequence[Source]) -> str:
    """What the bundle is for: of an encoder, tagging only where none of its adapters does anything else."""
    if base.kind != "encoder":
        return "text-generation"
    return TAGGING if sources and all(source.task == TAGGING for source in sources) else "sequence-classification"


def build_base(base: Base, folder: Path, *, precision: Precision, say: Say = lambda line: None) -> Manifest:
    """A bundle of the base alone with inputs for any adapter, without proof and without `edgetune.json`: for this
    process to use, as the rollouts of grpo do. It is not for a device.
    """
    return _build(base, [], folder, mode="separate", precision=precision, say=say)[0]


def _graph(
    base: Base, model: Any, sources: Sequence[Source], *, mode: str, precision: Precision, say: Say, traced: Traced | None = None
) -> tuple[ir.Model, GraphInfo, list[Site], HeadInfo | None, Precision]:
    """Trace, simplify, quantise; what the runtime must know of the result, and the precision layer by layer."""
    config, max_length = model.config, _context(base, model)
    shape: dict[str, Any]
    if base.kind == "decoder":
        shape = asdict(cache_sizes(config))
    elif base.kind == "encoder-decoder":
        shape = seq2seq_shape(config)
    else:
        shape = {"cache_dtype": None, "pooling": base.pooling, "token_type_ids": has_token_types(config)}

    graph = _trace(base, model) if traced is None else traced.copy(lambda: _trace(base, model))
    say(f"writing weights as {precision.weights}")
    precision = settle(graph, precision)
    sites = lower(graph, precision, adapter_inputs=mode == "separate", skip=_untouched(sources))
    if base.kind == "encoder-decoder":
        sites = placed(graph, sites)
    head = decoder_head(config.hidden_size) if base.kind == "decoder" and mode == "separate" else None
    if isinstance(model, RewardModel):
        add_fixed_score(graph, model.score.weight)
    elif base.kind == "decoder" and head is None:
        drop_states(graph)
    if base.kind == "encoder":
        classifier = model.classifier if isinstance(model, SequenceClassifier) else None
        weights = (classifier.weight.detach(), classifier.bias.detach()) if classifier is not None else (None, None)
        if isinstance(model, TokenClassifier):
            add_token_head(graph, model.classifier.weight.detach(), model.classifier.bias.detach())
        else:
            head = add_head(graph, *weights, hidden=config.hidden_size)
    if precision.weights == "fp16":
        to_half(graph)
        shape |= {"cache_dtype": "float16"} if base.kind == "decoder" else {}
    name_for_people(graph.graph)
    situations = BY_SITUATION if sites and base.kind == "decoder" and precision.weights != "fp16" else None  # fp16 is not for the CPU
    info = GraphInfo(
        engine=ENGINE, data=DATA, situations=situations, max_length=max_length, vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        **{"standard": STANDARD, **shape},
    )
    return graph, info, sites, head, precision


def _context(base: Base, model: Any) -> int:
    return fixed_length(model.config, min(base.max_length, LARGEST_CONTEXT))


def _trace(base: Base, model: Any) -> ir.Model:
    """The base's graph in float, simplified: linear layers that read one input are one product."""
    body = model.body if isinstance(model, SequenceClassifier) else causal_model(model, base)
    if base.kind == "decoder":
        graph = trace_decoder(body, max_length=_context(base, model))
    elif base.kind == "encoder-decoder":
        graph = trace_seq2seq(body)
    else:
        graph = trace_encoder(body, pooling=base.pooling or "mean", max_length=_context(base, model))
    simplify(graph)
    return graph


def _untouched(sources: Sequence[Source]) -> frozenset[str]:
    """The output projection gets adapter inputs only when an adapter of this bundle was trained there."""
    return frozenset({"lm_head"}) - frozenset[str]().union(*(source.modules for source in sources))


def _write_graphs(graph: ir.Model, folder: Path, sites: Sequence[Site], info: GraphInfo, *, base: Base, precision: Precision, mode: str) -> None:
    note = {"base": base.name, "base_digest": base.digest, "precision": precision.weights, "mode": mode, "edgetune": __version__}
    if base.kind == "encoder-decoder":
        write_graphs(graph, folder, sites, note=note)
        return
    write_data(graph, folder)
    write_graph(graph, folder / ENGINE, metadata=note)
    if info.situations is not None:
        write_graph(by_situation(graph, sites), folder / info.situations, metadata=note | {SITUATIONS: f"{ADAPTED}, {PLAIN}"})
    standard = standard_decoder(graph) if base.kind == "decoder" else standard_encoder(graph)
    name_for_people(standard.graph)
    write_graph(standard, folder / STANDARD, metadata=note)


def _add_adapter(source: Source, folder: Path, manifest: Manifest, *, say: Say) -> AdapterEntry:
    """Copy the PEFT folder, write the same weights for other engines, describe both."""
    place = Path("adapters") / source.name
    if not source.is_model:
        copy_adapter(source.folder, folder / place)
    entry = AdapterEntry(
        name=source.name, path=str(place), problem=source.problem,
        task=source.task or (manifest.task if manifest.is_decoder else "sequence-classification"), labels=source.labels, prompt_format=source.metadata.get("prompt_format"),
        generation=source.metadata.get("generation"), rank=int(source.config.get("r", 0)),
        digest=None if source.is_model else sha256_file(source.folder / "adapter_model.safetensors"), onnx_adapter=None, metrics=dict(source.metadata.get("metrics") or {}),
    )  # fmt: skip
    if manifest.mode == "merged":
        return replace(entry, path=None)
    packed = pack_adapter(source.folder, manifest, name=source.name)
    for note in packed.notes:
        say(f"adapter {source.name}: {note}")
    if manifest.graph.standard is None:  # nor is there a graph that takes such a file
        return replace(entry, rank=packed.rank)
    onnx_adapter = place / f"{source.name}.onnx_adapter"
    write_onnx_adapter(packed, folder / onnx_adapter)
    return replace(entry, onnx_adapter=str(onnx_adapter), rank=packed.rank)


def _digests(folder: Path) -> dict[str, FileInfo]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): FileInfo(sha256_file(path), path.stat().st_size) for path in files}


__all__ = ["build_base", "check_place", "export_bundle"]
