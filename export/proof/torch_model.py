"""The other side of a proof: what a bundle holds, in torch in fp32, on the base as the adapter knew
it in training.

An adapter that was trained for a base of some precision is compared on the weights of that
precision when the bundle holds them, or when they were merged with it. In a bundle of another
precision it meets other weights than it learned on; then torch has the base as it is, as for every
other adapter, and the export says so.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from edgetune.adapters.folder import load_adapter
from edgetune.core.errors import ExportError
from edgetune.core.layout import ADAPTER, ADAPTER_METADATA
from edgetune.core.precisions import FLOATS, adapter_bounds
from edgetune.core.tasks import CLASSIFICATION, EMBEDDING, MASKED, REWARD
from edgetune.export.inputs.sources import AdapterSource
from edgetune.export.proof.probe import torch_outputs
from edgetune.export.proof.proof import Outputs, Proof, prove, with_survival
from edgetune.export.proof.survival import LEAST_STRENGTH, PEFT_NAME, survival, survival_summary
from edgetune.models.base import Base
from edgetune.models.fake_quantise import round_weights
from edgetune.models.heads import Embedder, RewardModel
from edgetune.models.load import classifier_on, load_body
from edgetune.quantisation.blocks import ROUNDING
from edgetune.quantisation.precision import Precision, coarsest, trained_precision
from edgetune.runtime.adapters.trained_for import is_held
from edgetune.runtime.bundle.manifest import Manifest, PrecisionInfo


def torch_model(base: Base, source: AdapterSource | None = None, *, merge: bool = False) -> Any:
    """The base in torch fp32, with a source's adapter on it (or merged into it)."""
    body = load_body(base).float().eval()
    if source is None or source.is_model:
        return body
    model: Any = RewardModel(body) if source.task == REWARD else body
    if base.kind == "encoder" and source.task in (MASKED, EMBEDDING):
        model = Embedder(body, pooling=base.pooling or "mean")
    elif base.kind == "encoder" or source.task == CLASSIFICATION:
        if source.labels is None:
            raise ExportError(
                "an adapter of another tool for an encoder needs a classifier here",
                where=str(source.folder),
                expected="a head in modules_to_save",
                got="none",
                fix="It loads into a finished bundle with Runtime.load_adapter, and embeds.",
            )
        model = classifier_on(
            base, body, task=source.task or "", labels=len(source.labels), head=source.head
        )
        if (
            source.rows is not None
            and base.kind == "encoder"
            and not (model.layers and "pooler" in model.layers.modules)
        ):
            body.pooler = None  # transformers' classifiers have none then, and PEFT targets none
    adapted = load_adapter(model, source.folder).eval()
    return merge_adapter(adapted, where=str(source.folder)) if merge else adapted


def as_stored(base: Base, sources: Sequence[AdapterSource], mode: str) -> Any:
    """What a bundle's graph holds with no adapter active, in torch in fp32."""
    return (
        torch_model(trained_base(base, sources[0].metadata), sources[0], merge=True)
        if mode == "merged"
        else torch_model(base)
    )


def merge_adapter(adapted: Any, *, where: str) -> Any:
    """PEFT's model without PEFT; ExportError for what it cannot merge."""
    _untie(adapted)
    tied = adapted.config.tie_word_embeddings
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Input and output embeddings are no longer tied"
            )
            merged = adapted.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ExportError(
            f"PEFT cannot merge this adapter: {error}",
            where=where,
            fix="Export it with --mode separate.",
        ) from error
    if (
        tied is not None
    ):  # PEFT takes it back where the two differ already; UMT5 scales its states by it
        merged.config.tie_word_embeddings = tied
    return merged


def _untie(adapted: Any) -> None:
    """An output projection and a token embedding that are one weight get one each where an adapter
    changes only one of them.
    """
    model = adapted.get_base_model()
    if not hasattr(model, "get_output_embeddings"):
        return
    layers = [model.get_output_embeddings(), model.get_input_embeddings()]
    output, embedding = (getattr(layer, "base_layer", layer) for layer in layers)
    changed = any(
        PEFT_NAME in getattr(layer, side, {})
        for layer in layers
        for side in ("lora_A", "lora_embedding_A")
    )
    if changed and output is not None and output.weight is embedding.weight:
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)


def prove_merged(
    model: Any,
    original: Any | None,
    rows: Sequence[Sequence[int]],
    *,
    trained: Outputs,
    trained_off: Outputs,
    shipped: Outputs,
    stored: PrecisionInfo,
    judged: str,
    decide: Callable[[Outputs], Outputs],
) -> Proof:
    """The proof of a bundle with the adapter of `model` in its weights, or (all weights trained) of
    `model` against `original`.

    `decide` turns a task's answers into what is compared (see `export.decisions`). Where weights
    are rounded, the base is rounded too, in place: only then is the difference to it the adapter's.
    """
    precision = Precision(
        stored.weights,
        stored.block_size or 32,
        stored.symmetric,
        overrides=stored.overrides,
        quantiser=stored.quantiser,
    )
    layers = (
        survival(model, precision)
        if original is None
        else survival(original, precision, trained=model)
    )
    if not layers:
        return prove(
            trained=trained,
            trained_off=trained_off,
            shipped=shipped,
            shipped_off=trained_off,
            precision=judged,
        )
    base = model if original is None else original
    round_weights(base, precision)
    rounded_off = decide(torch_outputs(base, rows, adapter=original is not None))
    proof = prove(
        trained=trained,
        trained_off=trained_off,
        shipped=shipped,
        shipped_off=rounded_off,
        precision=judged,
    )
    return with_survival(proof, survival_summary(layers), least=LEAST_STRENGTH)


def trained_base(base: Base, metadata: Mapping[str, Any]) -> Base:
    """The base with the weights that an adapter was trained on, by its metadata."""
    recorded = metadata.get("base_precision")
    return (
        base
        if recorded is None
        else replace(base, precision=trained_precision(recorded, where=base.name))
    )


def precision_trained_for(folders: Sequence[Path]) -> str | None:
    """The one precision that all of these runs or adapters were trained for (`base_precision`);
    None where they differ or say nothing. A folder that cannot be read says nothing here: exporting
    it raises."""
    found: set[str | None] = set()
    for folder in folders:
        inner = folder / ADAPTER if (folder / ADAPTER / ADAPTER_METADATA).is_file() else folder
        try:
            recorded = json.loads((inner / ADAPTER_METADATA).read_text(encoding="utf-8")).get(
                "base_precision"
            )
            found.add(recorded and str(recorded["weights"]))
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            found.add(None)
    return found.pop() if len(found) == 1 else None


def reference_base(base: Base, metadata: Mapping[str, Any], manifest: Manifest) -> Base:
    """The base for torch's side of the proof of one adapter."""
    recorded = metadata.get("base_precision")
    as_trained = recorded is not None and (
        manifest.mode == "merged" or is_held(recorded, manifest.precision)
    )
    return trained_base(base, metadata) if as_trained else base


def judged_by(manifest: Manifest, reference: Base) -> str:
    """The name of the bounds that hold for a proof against `reference`.

    Where torch computes with the bundle's own weights nothing but activations is rounded, to 8
    bits: int8's bounds.
    """
    own = coarsest([manifest.precision.weights, *manifest.precision.overrides.values()])
    if own == "int4" and manifest.mode == "separate" and reference.precision is not None:
        own = "int8"
    adapters: str = manifest.quality.get("adapter_precision", "fp32")
    return coarsest([own, adapter_bounds(adapters)])


def warning(name: str, metadata: Mapping[str, Any], manifest: Manifest) -> str:
    """One line where a merged adapter, or another version, leaves other weights than it was trained
    on; else empty.

    That a separate bundle is of another precision is in the notes of `pack_adapter`, which the
    device sees too.
    """
    recorded = metadata.get("base_precision")
    if recorded is None:
        return ""
    weights, stored = recorded["weights"], manifest.precision.weights
    if manifest.mode == "merged" and stored not in FLOATS:
        return (
            f"adapter {name}: it was trained for the {weights} base; merged with it, the sum is"
            f" rounded once more, to {stored}; --mode separate --precision {weights} ships what was"
            " trained"
        )
    if manifest.mode == "separate" and recorded.get("rounding") != ROUNDING:
        return (
            f"adapter {name}: it was trained on the {weights} base of another version of edgetune,"
            " which rounded weights otherwise"
        )
    return ""
