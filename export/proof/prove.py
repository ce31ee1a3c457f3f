"""A bundle's proof: torch and the bundle's own engine on the same probe rows, adapter by adapter;
and once more from a finished bundle alone and the base it names (`edgetune verify --parity`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgetune.core.errors import ExportError
from edgetune.core.layout import ADAPTERS
from edgetune.core.progress import Say
from edgetune.core.tasks import CLASSIFICATION, EMBEDDING, MASKED, REWARD, TAGGING
from edgetune.core.text import second_of, typed_at
from edgetune.export.inputs.sources import AdapterSource, original_base, read_source
from edgetune.export.proof.from_text import prove_from_text
from edgetune.export.proof.probe import (
    Decide,
    class_outputs,
    decide_by,
    decoder_outputs,
    embedding_outputs,
    encoder_outputs,
    reward_outputs,
    seq2seq_outputs,
    token_outputs,
    torch_outputs,
)
from edgetune.export.proof.proof import BOUNDS, Outputs, Proof, prove, prove_head, prove_parity
from edgetune.export.proof.task_metric import ALONE, TaskPlan, TaskResult
from edgetune.export.proof.text_parity import prove_text
from edgetune.export.proof.torch_model import judged_by, prove_merged, reference_base, torch_model
from edgetune.models.base import Base
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision, coarsest
from edgetune.runtime.adapters.packing import merged_head, pack_adapter
from edgetune.runtime.bundle.manifest import AdapterEntry, Manifest
from edgetune.runtime.engine.encoder import EncoderEngine
from edgetune.runtime.engine.seq2seq import Seq2SeqEngine
from edgetune.runtime.tasks.choose_engine import ONNX_RUNTIME, open_decoder


def prove_bundle(
    folder: Path,
    manifest: Manifest,
    base: Base,
    sources: Sequence[AdapterSource],
    rows: Mapping[str, list[list[int]]],
    *,
    threads: int | None = None,
) -> dict[str, dict[str, Proof]]:
    """Run torch and each of the bundle's engines on the probe: the proofs of every adapter, by the
    engine's name. The native engine is among them where it can run the bundle here.
    """
    engines = _engines(folder, manifest, threads)
    if not sources and manifest.is_decoder:
        trained = torch_outputs(torch_model(base), rows[ALONE], adapter=True)
        judged = coarsest([manifest.precision.weights, *manifest.precision.overrides.values()])
        return {
            name: {
                ALONE: prove_parity(
                    trained=trained,
                    shipped=_generator_outputs(engine, rows[ALONE], None),
                    precision=_bounds(judged, name),
                )
            }
            for name, engine in engines.items()
        }
    found = {
        source.name: _prove_one(engines, folder, manifest, base, source, rows[source.name])
        for source in sources
    }
    return {engine: {name: proofs[engine] for name, proofs in found.items()} for engine in engines}


def _engines(folder: Path, manifest: Manifest, threads: int | None) -> dict[str, Any]:
    """The graph in ONNX Runtime, and the native engine where it can run this bundle here."""
    if not manifest.is_decoder:
        return {ONNX_RUNTIME: EncoderEngine(folder, manifest, threads=threads)}
    graph, _ = open_decoder(folder, manifest, engine=ONNX_RUNTIME, threads=threads)
    best, which = open_decoder(folder, manifest, threads=threads)
    return {ONNX_RUNTIME: graph} | ({which.name: best} if which.name != ONNX_RUNTIME else {})


def _prove_one(
    engines: Mapping[str, Any],
    folder: Path,
    manifest: Manifest,
    base: Base,
    source: AdapterSource,
    rows: list[list[int]],
) -> dict[str, Proof]:
    """One adapter's proof, by the engine's name."""
    reference = reference_base(base, source.metadata, manifest)
    model = torch_model(reference, source)
    trained, trained_off = (
        torch_outputs(model, rows, adapter=True),
        torch_outputs(model, rows, adapter=False),
    )
    decide = decide_by(REWARD if source.task == REWARD else source.problem, trained)
    trained, trained_off = decide(trained), decide(trained_off)
    original = torch_model(original_base(source)) if source.is_model else None
    if original is not None:
        trained_off = torch_outputs(original, rows, adapter=True)

    def ship(engine: Any, tensors: Any) -> Outputs:
        return _shipped_outputs(
            engine, source.task, rows, tensors, decide, decoder=manifest.is_decoder
        )

    judged = judged_by(manifest, reference)
    if not source.modules and not source.is_model:
        tensors = (
            merged_head(source.folder, source.task or "", manifest) or None
            if manifest.mode == "merged"
            else pack_adapter(folder / ADAPTERS / source.name, manifest, name=source.name).tensors
        )
        return {
            name: prove_head(
                trained=trained, shipped=ship(engine, tensors), precision=_bounds(judged, name)
            )
            for name, engine in engines.items()
        }
    if manifest.mode == "merged":
        head = merged_head(source.folder, source.task or "", manifest)
        return {
            name: prove_merged(
                model,
                original,
                rows,
                trained=trained,
                trained_off=trained_off,
                shipped=ship(engine, head or None),
                stored=manifest.precision,
                judged=_bounds(judged, name),
                decide=decide,
            )
            for name, engine in engines.items()
        }
    del model  # the engine needs the memory
    tensors = pack_adapter(folder / ADAPTERS / source.name, manifest, name=source.name).tensors
    only_head = {
        name: tensor
        for name, tensor in tensors.items()
        if manifest.head and name in (manifest.head.weight, manifest.head.bias)
    }
    return {
        name: prove(
            trained=trained,
            trained_off=trained_off,
            shipped=ship(engine, tensors),
            shipped_off=ship(engine, only_head or None),
            precision=_bounds(judged, name),
        )
        for name, engine in engines.items()
    }


def _shipped_outputs(
    engine: Any,
    task: str | None,
    rows: list[list[int]],
    tensors: Any,
    decide: Decide,
    *,
    decoder: bool,
) -> Outputs:
    """What an engine gives on the probe with an adapter's tensors, compared as its task is."""
    if decoder:
        bound = engine.bind(tensors) if tensors else None
        if task == REWARD:
            return decide(reward_outputs(engine, rows, bound))
        if task == CLASSIFICATION:
            return decide(class_outputs(engine, rows, tensors))
        return _generator_outputs(engine, rows, bound)
    if task in (MASKED, EMBEDDING):
        return embedding_outputs(engine, rows, tensors)
    return decide(
        token_outputs(engine, rows, tensors)
        if task == TAGGING
        else encoder_outputs(engine, rows, tensors)
    )


def _bounds(judged: str, engine: str) -> str:
    """The precision whose bounds hold for an engine: the native one keeps keys, values and adapters
    in half precision whatever the weights are.
    """
    return judged if engine == ONNX_RUNTIME else coarsest([judged, "fp16"])


def _generator_outputs(engine: Any, rows: list[list[int]], tensors: Any) -> Outputs:
    if isinstance(engine, Seq2SeqEngine):
        return seq2seq_outputs(engine, rows, tensors)
    return decoder_outputs(engine, rows, tensors)


def proof_document(
    proven: Mapping[str, Mapping[str, Proof]],
    rows: Mapping[str, list[list[int]]],
    precision: Precision,
) -> dict[str, Any]:
    return {
        "bounds": asdict(BOUNDS[coarsest([precision.weights, *precision.overrides.values()])]),
        "adapters": {name: proof.to_dict() for name, proof in proven[ONNX_RUNTIME].items()},
        "engines": {
            engine: {name: proof.to_dict() for name, proof in proofs.items()}
            for engine, proofs in proven.items()
            if engine != ONNX_RUNTIME
        },
        "probe": dict(rows),
        **(
            {"second": second}
            if (
                second := {
                    name: kept
                    for name, found in rows.items()
                    if any(kept := [second_of(row) for row in found])
                }
            )
            else {}
        ),
    }


def proof_line(name: str, engine: str, proof: Proof) -> str:
    """One adapter's proof for a person; the engine is named where it is not the usual one."""
    by = "" if engine == ONNX_RUNTIME else f" ({engine})"
    passed = "passed" if proof.passed else f"FAILED: {'; '.join(proof.failures)}"
    return f"proof {name}{by}: {passed}; {proof.line()}"


def probe_of(manifest: Manifest) -> dict[str, list[list[int]]]:
    """The manifest's probe rows; two texts know again where the second begins."""
    rows, second = manifest.proof["probe"], manifest.proof.get("second", {})
    return {
        name: [
            typed_at(row, at)
            for row, at in zip(found, second.get(name) or [None] * len(found), strict=True)
        ]
        for name, found in rows.items()
    }


def reprove(
    folder: Path, manifest: Manifest, *, threads: int | None = None
) -> dict[str, dict[str, Proof]]:
    """The proof again, from the bundle alone and the base it names, by every engine; ProofError
    where the text or an answer from text differs.
    """
    base, sources = _shipped(folder, manifest)
    prove_text(folder, manifest, base, sources)
    if missing := sorted(
        {source.name for source in sources} - set(manifest.proof.get("probe", {}))
    ):
        raise ExportError(
            f"the manifest holds no probe for {missing[0]}",
            where=str(folder),
            fix="Export the bundle again.",
        )
    prove_from_text(folder, manifest, base, sources, threads=threads)
    return prove_bundle(folder, manifest, base, sources, probe_of(manifest), threads=threads)


def remeasure(
    folder: Path,
    manifest: Manifest,
    task: TaskPlan,
    *,
    threads: int | None = None,
    say: Say = lambda line: None,
) -> dict[str, TaskResult]:
    """The task metric again, of rows that `task.data` names: a bundle does not carry its
    recipe's.
    """
    base, sources = _shipped(folder, manifest)
    return task.measure(folder, manifest, base, sources, load=torch_model, threads=threads, say=say)


def _shipped(folder: Path, manifest: Manifest) -> tuple[Base, list[AdapterSource]]:
    """The base that a bundle names, and its adapters as they lie in it; ExportError for another
    base.
    """
    base = resolve_base(manifest.base.name)
    if base.digest != manifest.base.digest:
        raise ExportError(
            "the base model here is another one", expected=manifest.base.digest, got=base.digest
        )
    places = (
        (
            entry.name,
            base.folder if _is_the_base(entry, folder) else folder / ADAPTERS / entry.name,
        )
        for entry in manifest.adapters
    )
    return base, [_as_trained(read_source(name, place), manifest) for name, place in places]


def _as_trained(source: AdapterSource, manifest: Manifest) -> AdapterSource:
    """What torch is compared with knows how sure it is as the run did, not as the bundle."""
    known = manifest.proof.get("confidence", {}).get(source.name)
    if known is None:
        return source
    return replace(source, metadata={**source.metadata, "confidence": known["trained"]})


def _is_the_base(entry: AdapterEntry, folder: Path) -> bool:
    return entry.path is None and not (folder / ADAPTERS / entry.name).is_dir()
