"""A bundle's proof: torch and the bundle's own engine on the same probe rows, adapter by adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgetune.bases import Base
from edgetune.export import merging
from edgetune.export.decisions import decide_by
from edgetune.export.lower import Precision
from edgetune.export.probe import (
    decoder_outputs,
    encoder_outputs,
    reward_outputs,
    token_outputs,
    torch_outputs,
)
from edgetune.export.proof import BOUNDS, Outputs, Proof, coarsest, prove, prove_head, prove_parity
from edgetune.export.reference import judged_by, reference_base
from edgetune.export.seq2seq import seq2seq_outputs
from edgetune.export.sources import Source, original_base
from edgetune.export.task import ALONE
from edgetune.export.torch_side import torch_model
from edgetune.runtime.adapters import pack_adapter
from edgetune.runtime.engine import DecoderEngine, EncoderEngine
from edgetune.runtime.manifest import REWARD, TAGGING, Manifest
from edgetune.runtime.seq2seq import Seq2SeqEngine, decoder_engine
from edgetune.text_pairs import second_of, typed_at


def prove_bundle(
    folder: Path, manifest: Manifest, base: Base, sources: Sequence[Source], rows: Mapping[str, list[list[int]]], *, threads: int | None = None
) -> dict[str, Proof]:
    """Run torch and the bundle's real engine on the probe, adapter by adapter."""
    engine = (decoder_engine if manifest.is_decoder else EncoderEngine)(folder, manifest, threads=threads)
    if not sources and isinstance(engine, DecoderEngine):
        trained, shipped = torch_outputs(torch_model(base), rows[ALONE], adapter=True), _generator_outputs(engine, rows[ALONE], None)
        judged = coarsest([manifest.precision.weights, *manifest.precision.overrides.values()])
        return {ALONE: prove_parity(trained=trained, shipped=shipped, precision=judged)}
    return {source.name: _prove_one(engine, manifest, base, source, rows[source.name]) for source in sources}


def _prove_one(engine: DecoderEngine | EncoderEngine, manifest: Manifest, base: Base, source: Source, rows: list[list[int]]) -> Proof:
    reference = reference_base(base, source.metadata, manifest)
    model = torch_model(reference, source)
    trained, trained_off = torch_outputs(model, rows, adapter=True), torch_outputs(model, rows, adapter=False)
    decide = decide_by(REWARD if source.task == REWARD else source.problem, trained)
    trained, trained_off = decide(trained), decide(trained_off)
    original = torch_model(original_base(source)) if source.is_model else None
    if original is not None:
        trained_off = torch_outputs(original, rows, adapter=True)

    def ship(tensors: Any) -> Outputs:
        if isinstance(engine, DecoderEngine):
            return decide(reward_outputs(engine, rows, tensors)) if source.task == REWARD else _generator_outputs(engine, rows, tensors)
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


def _generator_outputs(engine: DecoderEngine, rows: list[list[int]], tensors: Any) -> Outputs:
    return (seq2seq_outputs if isinstance(engine, Seq2SeqEngine) else decoder_outputs)(engine, rows, tensors)  # type: ignore[arg-type]


def proof_document(proofs: Mapping[str, Proof], rows: Mapping[str, list[list[int]]], precision: Precision) -> dict[str, Any]:
    return {
        "bounds": asdict(BOUNDS[coarsest([precision.weights, *precision.overrides.values()])]),
        "adapters": {name: proof.to_dict() for name, proof in proofs.items()},
        "probe": dict(rows),
        **({"second": second} if (second := {name: kept for name, found in rows.items() if any(kept := [second_of(row) for row in found])}) else {}),
    }


def probe_of(manifest: Manifest) -> dict[str, list[list[int]]]:
    """The manifest's probe rows; two texts know again where the second begins."""
    rows, second = manifest.proof["probe"], manifest.proof.get("second", {})
    return {name: [typed_at(row, at) for row, at in zip(found, second.get(name) or [None] * len(found), strict=True)] for name, found in rows.items()}
