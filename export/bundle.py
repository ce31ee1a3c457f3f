"""Adapters → a bundle folder: graph, quantised weights, adapter files, tokenizer, proof, manifest. Whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgetune import __version__
from edgetune.adapters import load_adapter
from edgetune.bases import Base, load_body, load_tokenizer, resolve_base
from edgetune.errors import ExportError, OutputError
from edgetune.export import merging
from edgetune.export.companions import copy_adapter, copy_tokenizer, write_genai_config, write_onnx_adapter
from edgetune.export.decisions import decide_by
from edgetune.export.families import cache_sizes, fixed_length, known_family
from edgetune.export.graphfile import (
    DATA,
    ENGINE,
    STANDARD,
    standard_decoder,
    standard_encoder,
    write_data,
    write_graph,
)
from edgetune.export.layout import simplify
from edgetune.export.lower import Precision, add_head, lower
from edgetune.export.probe import decoder_outputs, encoder_outputs, probe_rows, token_outputs, torch_outputs
from edgetune.export.proof import (
    BOUNDS,
    Outputs,
    Proof,
    coarsest,
    demand,
    prove,
    prove_head,
    prove_parity,
)
from edgetune.export.reference import judged_by, reference_base, trained_base, warning
from edgetune.export.situations import ADAPTED, PLAIN, by_situation
from edgetune.export.sources import Source, base_of, check_sources, original_base, read_source
from edgetune.export.token_head import add_token_head
from edgetune.export.trace import trace_decoder, trace_encoder
from edgetune.files import sha256_file, whole_folder, write_json
from edgetune.heads import SequenceClassifier
from edgetune.runtime.adapters import pack_adapter
from edgetune.runtime.binding import SITUATIONS
from edgetune.runtime.engine import DecoderEngine, EncoderEngine
from edgetune.runtime.manifest import (
    MANIFEST,
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
from edgetune.token_classifier import TokenClassifier, build_classifier
from edgetune.weight_precision import INT4_DECODER

Say = Callable[[str], None]
ALONE = "(base)"  # the name of the proof of a bundle without adapters
LARGEST_CONTEXT = 8192  # rotary positions kept in the graph at most


def export_bundle(
    adapters: Sequence[tuple[str, Path]], out: Path, *, mode: str = "separate", precision: Precision | None = None,
    base_name: str | None = None, threads: int | None = None, say: Say = lambda line: None,
) -> Manifest:  # fmt: skip
    """Write a bundle of `adapters` (name, run folder or PEFT folder) to `out` and prove it.

    ProofError when the proof fails; then, as after any error, nothing is left at `out` that was not there before.
    """
    precision = precision or Precision()
    _check_place(out)
    sources = [read_source(name, Path(folder)) for name, folder in adapters]
    if len(sources) == 1 and sources[0].is_model and mode == "separate":
        say(f"{sources[0].name}: all its weights were trained, so it is the bundle's base and nothing swaps it")
        mode = "merged"
    check_sources(sources, mode, precision, base_name)
    base = base_of(sources, base_name)
    known_family(base.model_type, kind=base.kind)  # before anything is loaded
    if base.kind == "decoder" and precision.weights == "int4":
        precision = replace(precision, overrides=INT4_DECODER | dict(precision.overrides))
    with whole_folder(out) as folder:
        manifest, rows = _build(base, sources, folder, mode=mode, precision=precision, say=say)
        proofs = prove_bundle(folder, manifest, base, sources, rows, threads=threads)
        for name, proof in proofs.items():
            say(f"proof {name}: {'passed' if proof.passed else 'FAILED'}; {proof.line()}")
        demand(proofs, where=str(out), merged=manifest.mode == "merged" and precision.weights != "fp32")
        manifest = replace(manifest, proof=_proof_document(proofs, rows, precision), files=_digests(folder))
        write_json(folder / MANIFEST, manifest.to_dict())
    return manifest


def _check_place(out: Path) -> None:
    """A bundle may replace a bundle, never another folder of the user's."""
    if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(
            "there is something else at this place", where=str(out), expected=f"a new or empty folder, or a bundle (with {MANIFEST})",
            got="another folder" if out.is_dir() else "a file", fix="Choose another --out.",
        )  # fmt: skip


def _build(
    base: Base, sources: Sequence[Source], folder: Path, *, mode: str, precision: Precision, say: Say
) -> tuple[Manifest, dict[str, list[list[int]]]]:
    """Everything but the proof: files in `folder`, the manifest so far, and the probe rows of each adapter."""
    tokenizer = load_tokenizer(base)
    say(f"tracing {base.name} ({base.model_type})")
    model = _torch_model(trained_base(base, sources[0].metadata), sources[0], merge=True) if mode == "merged" else _torch_model(base)
    graph, info, sites, head = _graph(base, model, sources, mode=mode, precision=precision, say=say)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    del model
    _write_graphs(graph, folder, sites, base=base, precision=precision, mode=mode)
    files = copy_tokenizer(base, tokenizer, folder)
    if base.kind == "decoder":
        write_genai_config(config, files, folder, max_length=info.max_length)
    manifest = Manifest(
        schema=SCHEMA, edgetune_version=__version__, task=_task(base, sources),
        base=BaseInfo(base.name, base.digest, base.model_type, parameters), mode=mode,
        precision=PrecisionInfo(precision.weights, precision.block_size if precision.weights != "fp32" else None, dict(precision.overrides)),
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
    if base.kind == "decoder":
        return "text-generation"
    return TAGGING if sources and all(source.task == TAGGING for source in sources) else "sequence-classification"


def build_base(base: Base, folder: Path, *, precision: Precision, say: Say = lambda line: None) -> Manifest:
    """A bundle of the base alone with inputs for any adapter, without proof and without `edgetune.json`: for this
    process to use, as the rollouts of grpo do. It is not for a device.
    """
    return _build(base, [], folder, mode="separate", precision=precision, say=say)[0]


def _torch_model(base: Base, source: Source | None = None, *, merge: bool = False) -> Any:
    """The base in torch fp32, with a source's adapter on it (or merged into it)."""
    body = load_body(base).float().eval()
    if source is None or source.is_model:
        return body
    model = body
    if base.kind == "encoder":
        if source.labels is None:
            raise ExportError(
                "an adapter for an encoder needs its labels", where=str(source.folder), expected="edgetune_adapter.json with labels", got="none",
                fix="Adapters of other tools load into a finished bundle with Runtime.load_adapter.",
            )  # fmt: skip
        pooling = source.metadata.get("pooling") or base.pooling
        model = build_classifier(body, task=source.task or "", labels=len(source.labels), pooling=pooling)
    adapted = load_adapter(model, source.folder).eval()
    return merging.merge(adapted, where=str(source.folder)) if merge else adapted


def _graph(
    base: Base, model: Any, sources: Sequence[Source], *, mode: str, precision: Precision, say: Say
) -> tuple[ir.Model, GraphInfo, list[Site], HeadInfo | None]:
    """Trace, simplify, quantise; what the runtime must know of the result."""
    config, body = model.config, model.body if isinstance(model, SequenceClassifier) else model
    max_length = fixed_length(config, min(base.max_length, LARGEST_CONTEXT))
    shape: dict[str, Any]
    if base.kind == "decoder":
        graph, shape = trace_decoder(body, max_length=max_length), asdict(cache_sizes(config))
    else:
        graph = trace_encoder(body, pooling=base.pooling or "mean", max_length=max_length)
        shape = {"cache_dtype": None, "pooling": base.pooling}
    simplify(graph)
    say(f"writing weights as {precision.weights}")
    sites = lower(graph, precision, adapter_inputs=mode == "separate", skip=_untouched(sources))
    head = None
    if base.kind == "encoder":
        classifier = model.classifier if isinstance(model, SequenceClassifier) else None
        weights = (classifier.weight.detach(), classifier.bias.detach()) if classifier is not None else (None, None)
        if isinstance(model, TokenClassifier):
            add_token_head(graph, model.classifier.weight.detach(), model.classifier.bias.detach())
        else:
            head = add_head(graph, *weights, hidden=config.hidden_size)
    info = GraphInfo(
        engine=ENGINE, standard=STANDARD, data=DATA, max_length=max_length, vocab_size=config.vocab_size, hidden_size=config.hidden_size, **shape
    )
    return graph, info, sites, head


def _untouched(sources: Sequence[Source]) -> frozenset[str]:
    """The output projection gets adapter inputs only when an adapter of this bundle was trained there."""
    return frozenset({"lm_head"}) - frozenset[str]().union(*(source.modules for source in sources))


def _write_graphs(graph: ir.Model, folder: Path, sites: Sequence[Site], *, base: Base, precision: Precision, mode: str) -> None:
    note = {"base": base.name, "base_digest": base.digest, "precision": precision.weights, "mode": mode, "edgetune": __version__}
    write_data(graph, folder)
    if sites and base.kind == "decoder" and precision.weights != "fp16":  # fp16 is for providers that take one plain graph
        write_graph(by_situation(graph, sites), folder / ENGINE, metadata=note | {SITUATIONS: f"{ADAPTED}, {PLAIN}"})
    else:
        write_graph(graph, folder / ENGINE, metadata=note)
    standard = standard_decoder(graph) if base.kind == "decoder" else standard_encoder(graph)
    write_graph(standard, folder / STANDARD, metadata=note)


def _add_adapter(source: Source, folder: Path, manifest: Manifest, *, say: Say) -> AdapterEntry:
    """Copy the PEFT folder, write the same weights for other engines, describe both."""
    place = Path("adapters") / source.name
    if not source.is_model:
        copy_adapter(source.folder, folder / place)
    entry = AdapterEntry(
        name=source.name, path=str(place), problem=source.problem,
        task=manifest.task if manifest.is_decoder else source.task or "sequence-classification", labels=source.labels, prompt_format=source.metadata.get("prompt_format"),
        generation=source.metadata.get("generation"), rank=int(source.config.get("r", 0)),
        digest=None if source.is_model else sha256_file(source.folder / "adapter_model.safetensors"), onnx_adapter=None, metrics=dict(source.metadata.get("metrics") or {}),
    )  # fmt: skip
    if manifest.mode == "merged":
        return replace(entry, path=None)
    packed = pack_adapter(source.folder, manifest, name=source.name)
    for note in packed.notes:
        say(f"adapter {source.name}: {note}")
    onnx_adapter = place / f"{source.name}.onnx_adapter"
    write_onnx_adapter(packed, folder / onnx_adapter)
    return replace(entry, onnx_adapter=str(onnx_adapter), rank=packed.rank)


def prove_bundle(
    folder: Path, manifest: Manifest, base: Base, sources: Sequence[Source], rows: Mapping[str, list[list[int]]], *, threads: int | None = None
) -> dict[str, Proof]:
    """Run torch and the bundle's real engine on the probe, adapter by adapter."""
    engine = (DecoderEngine if manifest.is_decoder else EncoderEngine)(folder, manifest, threads=threads)
    if not sources and isinstance(engine, DecoderEngine):
        trained, shipped = torch_outputs(_torch_model(base), rows[ALONE], adapter=True), decoder_outputs(engine, rows[ALONE], None)
        judged = coarsest([manifest.precision.weights, *manifest.precision.overrides.values()])
        return {ALONE: prove_parity(trained=trained, shipped=shipped, precision=judged)}
    return {source.name: _prove_one(engine, manifest, base, source, rows[source.name]) for source in sources}


def _prove_one(engine: DecoderEngine | EncoderEngine, manifest: Manifest, base: Base, source: Source, rows: list[list[int]]) -> Proof:
    reference = reference_base(base, source.metadata, manifest)
    model = _torch_model(reference, source)
    trained, trained_off = torch_outputs(model, rows, adapter=True), torch_outputs(model, rows, adapter=False)
    decide = decide_by(source.problem, trained)
    trained, trained_off = decide(trained), decide(trained_off)
    original = _torch_model(original_base(source)) if source.is_model else None
    if original is not None:
        trained_off = torch_outputs(original, rows, adapter=True)

    def ship(tensors: Any) -> Outputs:
        if isinstance(engine, DecoderEngine):
            return decoder_outputs(engine, rows, tensors)
        return decide(token_outputs(engine, rows, tensors) if source.task == TAGGING else encoder_outputs(engine, rows, tensors))

    judged = judged_by(manifest, reference)
    if not source.modules and not source.is_model:
        tensors = None if manifest.mode == "merged" else pack_adapter(source.folder, manifest, name=source.name).tensors
        return prove_head(trained=trained, shipped=ship(tensors), precision=judged)
    if manifest.mode == "merged":
        return merging.prove_merged(
            model, original, rows, trained=trained, trained_off=trained_off, shipped=ship(None), stored=manifest.precision, judged=judged,
            decide=decide,
        )  # fmt: skip
    del model  # the engine needs the memory
    tensors = pack_adapter(source.folder, manifest, name=source.name).tensors
    only_head = {name: tensor for name, tensor in tensors.items() if manifest.head and name in (manifest.head.weight, manifest.head.bias)}
    shipped, shipped_off = ship(tensors), ship(only_head or None)
    return prove(trained=trained, trained_off=trained_off, shipped=shipped, shipped_off=shipped_off, precision=judged)


def _is_the_base(entry: AdapterEntry, folder: Path) -> bool:
    return entry.path is None and not (folder / "adapters" / entry.name).is_dir()


def _proof_document(proofs: Mapping[str, Proof], rows: Mapping[str, list[list[int]]], precision: Precision) -> dict[str, Any]:
    return {
        "bounds": asdict(BOUNDS[coarsest([precision.weights, *precision.overrides.values()])]),
        "adapters": {name: proof.to_dict() for name, proof in proofs.items()},
        "probe": dict(rows),
    }


def _digests(folder: Path) -> dict[str, FileInfo]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): FileInfo(sha256_file(path), path.stat().st_size) for path in files}


def reprove(folder: Path, manifest: Manifest, *, threads: int | None = None) -> dict[str, Proof]:
    """The proof again, from the bundle alone and the base it names."""
    base = resolve_base(manifest.base.name)
    if base.digest != manifest.base.digest:
        raise ExportError("the base model here is another one", expected=manifest.base.digest, got=base.digest)
    sources = [
        read_source(entry.name, base.folder if _is_the_base(entry, folder) else folder / "adapters" / entry.name) for entry in manifest.adapters
    ]
    if missing := sorted({source.name for source in sources} - set(manifest.proof.get("probe", {}))):
        raise ExportError(f"the manifest holds no probe for {missing[0]}", where=str(folder), fix="Export the bundle again.")
    return prove_bundle(folder, manifest, base, sources, manifest.proof["probe"], threads=threads)


__all__ = ["build_base", "export_bundle", "prove_bundle", "reprove"]
