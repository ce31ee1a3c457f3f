"""Adapters → a bundle folder: graph, quantised weights, adapter files, tokenizer, proof, manifest.
Whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from edgetune import __version__
from edgetune.core.errors import OutputError
from edgetune.core.exclusive import exclusive
from edgetune.core.files import sha256_file, whole_folder, write_json
from edgetune.core.format_version import FORMAT_VERSIONS, format_version
from edgetune.core.layout import ADAPTER_WEIGHTS, ADAPTERS, MANIFEST
from edgetune.core.precisions import FLOATS
from edgetune.core.progress import Say
from edgetune.core.tasks import CLASSIFICATION, EMBEDDING, MASKED, REWARD, TAGGING
from edgetune.export.bundle_files import (
    copy_adapter,
    write_genai_config,
    write_onnx_adapter,
    write_tokenizer,
)
from edgetune.export.graph.build import _graph, _trace, _write_graphs
from edgetune.export.graph.families import known_family
from edgetune.export.graph.heads import with_layers
from edgetune.export.graph.lower import settle
from edgetune.export.graph.seq2seq_files import check_seq2seq
from edgetune.export.graph.trace import Traced
from edgetune.export.inputs.calibration_text import (
    calibrate_base,
    check_activations,
    check_quantiser,
)
from edgetune.export.inputs.small_adapter import write_rounded
from edgetune.export.inputs.sources import (
    AdapterSource,
    base_of,
    check_adapter_precision,
    check_sources,
    read_source,
)
from edgetune.export.proof.confidence import fit_again, ship
from edgetune.export.proof.cost import CostPlan
from edgetune.export.proof.from_text import prove_from_text
from edgetune.export.proof.probe import probe_rows
from edgetune.export.proof.proof import demand
from edgetune.export.proof.prove import proof_document, proof_line, prove_bundle
from edgetune.export.proof.task_metric import ALONE, TaskPlan
from edgetune.export.proof.text_parity import check_vocabulary, prove_text
from edgetune.export.proof.torch_model import as_stored, torch_model, warning
from edgetune.export.proof.verdict import demand_verdicts, verdicts_of
from edgetune.export.proof_page import write_page
from edgetune.models.base import Base
from edgetune.models.load import load_tokenizer
from edgetune.quantisation.precision import INT4_DECODER, Precision
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.bundle.manifest import (
    AdapterEntry,
    BaseInfo,
    FileInfo,
    Manifest,
    PrecisionInfo,
)
from edgetune.runtime.tasks.choose_engine import ONNX_RUNTIME


def export_bundle(
    adapters: Sequence[tuple[str, Path]],
    out: Path,
    *,
    mode: str = "separate",
    precision: Precision | None = None,
    base_name: str | None = None,
    threads: int | None = None,
    calibration: Path | None = None,
    say: Say = lambda line: None,
    task: TaskPlan | None = None,
    traced: Traced | None = None,
    cost: CostPlan | None = None,
    context: int | None = None,
    replace_finished: bool = True,
    adapter_precision: str = "fp32",
) -> Manifest:
    """Write a bundle of `adapters` (name, run folder or PEFT folder) to `out` and prove it.

    `task` says on which rows each adapter's metric is taken, in torch and in the bundle, and what
    ships a bundle that lost more than a point and chance; not given: on some of its recipe's
    validation rows, and nothing does. `cost` says where WikiText-2 and STS-B are, on which
    the precision's cost is taken; not given: it is not. `calibration`: text for the quantiser gptq;
    not given: the training rows of the runs. `context`: positions, where the base has more than
    the 8,192 that a bundle has by itself. `adapter_precision`: how the adapters' own numbers are
    stored (`core.precisions.ADAPTER_PRECISIONS`); fp32: as they are. `traced` keeps the graph for
    further bundles of the same model. A bundle at `out` is replaced, which is said; with
    `replace_finished=False` it is an OutputError. ProofError when the proof fails or the verdict is
    a refusal; then, as after any error, nothing is left at `out` that was not there before.
    """
    precision = precision or Precision()
    check_place(out, finished=replace_finished, say=say)
    plan = task or TaskPlan()
    plan.check()
    sources = [read_source(name, Path(folder)) for name, folder in adapters]
    if len(sources) == 1 and sources[0].is_model and mode == "separate":
        say(
            f"{sources[0].name}: all its weights were trained, so it is the bundle's base and"
            " nothing swaps it"
        )
        mode = "merged"
    check_sources(sources, mode, precision, base_name)
    check_adapter_precision(adapter_precision, sources, mode)
    swaps = not any(source.is_model or source.config.get("use_dora") for source in sources)
    check_quantiser(precision, mode=mode, calibration=calibration, swaps=swaps)
    base = replace(base_of(sources, base_name), context=context)
    known_family(base.model_type, kind=base.kind)  # before anything is loaded
    check_activations(precision, kind=base.kind, mode=mode)
    if base.kind == "encoder-decoder":
        check_seq2seq(precision)
    if base.kind != "encoder" and precision.weights == "int4":
        precision = replace(precision, overrides=INT4_DECODER | dict(precision.overrides))
    with exclusive(out), whole_folder(out) as folder:
        manifest, rows = _build(
            base,
            sources,
            folder,
            mode=mode,
            precision=precision,
            calibration=calibration,
            say=say,
            traced=traced,
            adapter_precision=adapter_precision,
        )
        text = prove_text(folder, manifest, base, sources)
        say(f"proof of the text: passed; {text.line()}")
        proven = prove_bundle(folder, manifest, base, sources, rows, threads=threads)
        merged = manifest.mode == "merged" and precision.weights not in FLOATS
        for engine, found_by in proven.items():
            for name, proof in found_by.items():
                say(proof_line(name, engine, proof))
            where = str(out) if engine == ONNX_RUNTIME else f"{out}, {engine} engine"
            demand(found_by, where=where, merged=merged)
        sure = fit_again(
            folder, manifest, base, sources, keep=plan.confidence_kept_by, threads=threads, say=say
        )
        manifest = ship(folder, manifest, sure)
        answers = prove_from_text(folder, manifest, base, sources, threads=threads)
        for name, one in answers.items():
            say(f"answers {name}: {one.line()}")
        results = plan.measure(
            folder, manifest, base, sources, load=torch_model, threads=threads, say=say
        )
        verdicts = verdicts_of(proven, results, allowed_by=plan.allowed_by)
        demand_verdicts(verdicts, where=str(out), merged=merged)
        found = (
            None
            if cost is None
            else cost.measure(
                folder,
                manifest,
                base,
                lambda: as_stored(base, sources, mode),
                threads=threads,
                say=say,
            )
        )
        if found is not None:
            manifest = replace(manifest, quality={**manifest.quality, "cost": found.to_dict()})
        document = proof_document(proven, rows, precision) | {
            "task": {name: result.to_dict() for name, result in results.items()},
            "confidence": {name: one.to_dict() for name, one in sure.items()},
            "text": asdict(text),
            "answers": {name: one.to_dict() for name, one in answers.items()},
            "verdict": {name: verdict.to_dict() for name, verdict in verdicts.items()},
        }
        manifest = replace(manifest, proof=document, files=_digests(folder))
        manifest = replace(manifest, files=manifest.files | write_page(folder, manifest))
        write_json(folder / MANIFEST, manifest.to_dict())
    return manifest


def check_place(out: Path, *, finished: bool, say: Say) -> None:
    """A bundle may replace a bundle where `finished` says so, never another folder of the user's;
    inside another one it would go with it. What a killed export left is put right first.
    """
    if (
        around := next(
            (folder for folder in out.absolute().parents if (folder / MANIFEST).is_file()), None
        )
    ) is not None:
        raise OutputError(
            "this place is inside another bundle",
            where=str(out),
            got=str(around),
            fix="Choose another --out: exporting that one again would take this one away.",
        )
    if (
        out.exists()
        and not (out / MANIFEST).is_file()
        and not (out.is_dir() and not any(out.iterdir()))
    ):
        raise OutputError(
            "there is something else at this place",
            where=str(out),
            expected=f"a new or empty folder, or a bundle (with {MANIFEST})",
            got="another folder" if out.is_dir() else "a file",
            fix="Choose another --out.",
        )
    if out.resolve().parent.is_dir():
        with exclusive(out):
            exists = (out / MANIFEST).is_file()
        if exists and not finished:
            raise OutputError(
                "a bundle is there already",
                where=str(out),
                fix="Add --replace to put the new one in its place, or choose another --out.",
            )
        if exists:
            say(f"the bundle in {out} will be replaced")


def _build(
    base: Base,
    sources: Sequence[AdapterSource],
    folder: Path,
    *,
    mode: str,
    precision: Precision,
    say: Say,
    calibration: Path | None = None,
    traced: Traced | None = None,
    adapter_precision: str = "fp32",
) -> tuple[Manifest, dict[str, list[list[int]]]]:
    """Everything but the proof: files in `folder`, the manifest so far, and the probe rows of each
    adapter.
    """
    tokenizer = load_tokenizer(base)
    check_vocabulary(base, tokenizer)
    say(f"tracing {base.name} ({base.model_type})")
    model = as_stored(base, sources, mode)
    if precision.quantiser == "gptq":
        if set(precision.overrides) - set(
            INT4_DECODER
        ):  # whoever calibrates must know what layers of one product are stored in
            precision = settle(_trace(base, model), precision)
        calibrate_base(model, base, sources, tokenizer, precision, file=calibration, say=say)
        traced = None  # a graph kept from before has the weights as they were
    graph, info, sites, head, precision, floats = _graph(
        base, model, sources, mode=mode, precision=precision, say=say, traced=traced
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    del model
    if head is not None and base.kind == "encoder":
        head = with_layers(head, base, config, folder)
    info = _write_graphs(
        graph, folder, sites, info, base=base, precision=precision, mode=mode, say=say
    )
    files = write_tokenizer(base, tokenizer, folder)
    if base.kind == "decoder" and not (
        mode == "merged" and sources[0].task == REWARD
    ):  # a merged reward only scores
        write_genai_config(config, files, folder, max_length=info.max_length)
    manifest = Manifest(
        schema=FORMAT_VERSIONS[0],
        edgetune_version=__version__,
        task=_task(base, sources),
        base=BaseInfo(base.name, base.digest, base.model_type, parameters),
        mode=mode,
        precision=PrecisionInfo(
            precision.weights,
            (
                None
                if precision.weights in FLOATS or precision.activations == "int8"
                else precision.block_size
            ),
            dict(precision.overrides),
            precision.quantiser,
            precision.activations,
        ),
        graph=info,
        sites=tuple(sites),
        head=head,
        tokenizer=files,
        adapters=(),
        quality=({"kept_in_fp32": floats} if floats else {})
        | ({"adapter_precision": adapter_precision} if adapter_precision != "fp32" else {}),
    )
    for line in filter(
        None, (warning(source.name, source.metadata, manifest) for source in sources)
    ):
        say(line)
    entries = [_add_adapter(source, folder, manifest, say=say) for source in sources]
    merged = [one for one in entries if one.path is None]  # others say it in their own folders
    versions = [
        format_version({"prompt_format": one.prompt_format, "confidence": one.confidence})
        for one in merged
    ]
    manifest = replace(
        manifest, adapters=tuple(entries), schema=max(versions, default=manifest.schema)
    )
    rows = {source.name: probe_rows(source.folder, tokenizer, base) for source in sources}
    if not sources:
        rows = {ALONE: probe_rows(base.folder, tokenizer, base)}
    return manifest, rows


def _task(base: Base, sources: Sequence[AdapterSource]) -> str:
    """What the bundle is for: of an encoder, tagging only where none of its adapters does anything
    else.
    """
    if base.kind != "encoder":
        return "text-generation"
    return (
        TAGGING
        if sources and all(source.task == TAGGING for source in sources)
        else "sequence-classification"
    )


def _task_of(source: AdapterSource, manifest: Manifest) -> str:
    if source.task == MASKED:
        return EMBEDDING
    return source.task or (manifest.task if manifest.is_decoder else CLASSIFICATION)


def build_base(
    base: Base, folder: Path, *, precision: Precision, say: Say = lambda line: None
) -> Manifest:
    """A bundle of the base alone with inputs for any adapter, without proof and without
    `edgetune.json`: for this process to use, as the rollouts of grpo do. It is not for a device.
    """
    return _build(base, [], folder, mode="separate", precision=precision, say=say)[0]


def _add_adapter(
    source: AdapterSource, folder: Path, manifest: Manifest, *, say: Say
) -> AdapterEntry:
    """Copy the PEFT folder, write the same weights for other engines, describe both."""
    place = Path(ADAPTERS) / source.name
    own = manifest.quality.get("adapter_precision")
    if own is not None and source.coded:
        say(f"{source.name}: in codes already, so it ships as it is")
    if own is not None and not source.coded:
        write_rounded(source.folder, folder / place, own)
    elif not source.is_model:
        copy_adapter(source.folder, folder / place)
    stored = source.folder if source.is_model else folder / place
    entry = AdapterEntry(
        name=source.name,
        path=str(place),
        problem=source.problem,
        task=_task_of(source, manifest),
        labels=source.labels,
        prompt_format=source.metadata.get("prompt_format"),
        generation=source.metadata.get("generation"),
        rank=int(source.config.get("r", 0)),
        digest=(None if source.is_model else sha256_file(stored / ADAPTER_WEIGHTS)),
        onnx_adapter=None,
        metrics=dict(source.metadata.get("metrics") or {}),
        max_length=source.metadata.get("max_length"),
    )
    if manifest.mode == "merged":
        return replace(entry, path=None, confidence=source.metadata.get("confidence"))
    packed = pack_adapter(stored, manifest, name=source.name)
    for note in packed.notes:
        say(f"adapter {source.name}: {note}")
    if manifest.graph.standard is None:  # nor is there a graph that takes such a file
        return replace(entry, rank=packed.rank)
    if packed.has_layers:
        say(
            f"adapter {source.name}: its head has layers that model.onnx does not take, so other"
            " engines get no .onnx_adapter of it; --mode merged writes it into their graph"
        )
        return replace(entry, rank=packed.rank)
    onnx_adapter = place / f"{source.name}.onnx_adapter"
    write_onnx_adapter(packed, folder / onnx_adapter)
    return replace(entry, onnx_adapter=str(onnx_adapter), rank=packed.rank)


def _digests(folder: Path) -> dict[str, FileInfo]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): FileInfo(sha256_file(path), path.stat().st_size)
        for path in files
    }
