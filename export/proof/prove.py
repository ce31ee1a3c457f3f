"""A bundle's proof: torch and the bundle's own engine on the same probe rows, adapter by adapter;
and once more from a finished bundle alone and the base it names (`edgetune verify --parity`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgetune.core.errors import ExportError
from edgetune.core.layout import ADAPTERS
from edgetune.core.progress import Say
from edgetune.core.tasks import REWARD, TAGGING
from edgetune.core.text import second_of, typed_at
from edgetune.export.inputs.sources import AdapterSource, original_base, read_source
from edgetune.export.proof.from_text import prove_from_text
from edgetune.export.proof.probe import (
    decide_by,
    decoder_outputs,
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
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.bundle.manifest import AdapterEntry, Manifest
from edgetune.runtime.engine.decoder import DecoderEngine
from edgetune.runtime.engine.encoder import EncoderEngine
from edgetune.runtime.engine.seq2seq import Seq2SeqEngine, decoder_engine


def prove_bundle(
    folder: Path,
    manifest: Manifest,
    base: Base,
    sources: Sequence[AdapterSource],
    rows: Mapping[str, list[list[int]]],
    *,
    threads: int | None = None,
) -> dict[str, Proof]:
    """Run torch and the bundle's real engine on the probe, adapter by adapter."""
    engine = (decoder_engine if manifest.is_decoder else EncoderEngine)(
        folder, manifest, threads=threads
    )
    if not sources and isinstance(engine, DecoderEngine):
        trained, shipped = (
            torch_outputs(torch_model(base), rows[ALONE], adapter=True),
            _generator_outputs(engine, rows[ALONE], None),
        )
        judged = coarsest([manifest.precision.weights, *manifest.precision.overrides.values()])
        return {ALONE: prove_parity(trained=trained, shipped=shipped, precision=judged)}
    return {
        source.name: _prove_one(engine, manifest, base, source, rows[source.name])
        for source in sources
    }


def _prove_one(
    engine: DecoderEngine | EncoderEngine,
    manifest: Manifest,
    base: Base,
    source: AdapterSource,
    rows: list[list[int]],
) -> Proof:
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

    def ship(tensors: Any) -> Outputs:
        if isinstance(engine, DecoderEngine):
            return (
                decide(reward_outputs(engine, rows, tensors))
                if source.task == REWARD
                else _generator_outputs(engine, rows, tensors)
            )
        return decide(
            token_outputs(engine, rows, tensors)
            if source.task == TAGGING
            else encoder_outputs(engine, rows, tensors)
        )

    judged = judged_by(manifest, reference)
    if not source.modules and not source.is_model:
        tensors = (
            None
            if manifest.mode == "merged"
            else pack_adapter(source.folder, manifest, name=source.name).tensors
        )
        return prove_head(trained=trained, shipped=ship(tensors), precision=judged)
    if manifest.mode == "merged":
        return prove_merged(
            model,
            original,
            rows,
            trained=trained,
            trained_off=trained_off,
            shipped=ship(None),
            stored=manifest.precision,
            judged=judged,
            decide=decide,
        )
    del model  # the engine needs the memory
    tensors = pack_adapter(source.folder, manifest, name=source.name).tensors
    only_head = {
        name: tensor
        for name, tensor in tensors.items()
        if manifest.head and name in (manifest.head.weight, manifest.head.bias)
    }
    shipped, shipped_off = ship(tensors), ship(only_head or None)
    return prove(
        trained=trained,
        trained_off=trained_off,
        shipped=shipped,
        shipped_off=shipped_off,
        precision=judged,
    )


def _generator_outputs(engine: DecoderEngine, rows: list[list[int]], tensors: Any) -> Outputs:
    if isinstance(engine, Seq2SeqEngine):
        return seq2seq_outputs(engine, rows, tensors)
    return decoder_outputs(engine, rows, tensors)


def proof_document(
    proofs: Mapping[str, Proof], rows: Mapping[str, list[list[int]]], precision: Precision
) -> dict[str, Any]:
    return {
        "bounds": asdict(BOUNDS[coarsest([precision.weights, *precision.overrides.values()])]),
        "adapters": {name: proof.to_dict() for name, proof in proofs.items()},
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


def reprove(folder: Path, manifest: Manifest, *, threads: int | None = None) -> dict[str, Proof]:
    """The proof again, from the bundle alone and the base it names; ProofError where the text or
    an answer from text differs.
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
    return base, [read_source(name, place) for name, place in places]


def _is_the_base(entry: AdapterEntry, folder: Path) -> bool:
    return entry.path is None and not (folder / ADAPTERS / entry.name).is_dir()
