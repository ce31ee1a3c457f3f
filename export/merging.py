"""An adapter merged into the weights: by PEFT, and proven against the base as it is rounded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from edgetune.errors import ExportError
from edgetune.export.lower import Precision
from edgetune.export.probe import torch_outputs
from edgetune.export.proof import Outputs, Proof, prove, with_survival
from edgetune.export.survival import ADAPTER, LEAST_STRENGTH, summary, survival
from edgetune.runtime.manifest import Precision as PrecisionInfo
from edgetune.shipped_weights import round_weights


def merge(adapted: Any, *, where: str) -> Any:
    """PEFT's model without PEFT; ExportError for what it cannot merge."""
    _untie(adapted)
    tied = adapted.config.tie_word_embeddings
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            merged = adapted.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ExportError(f"PEFT cannot merge this adapter: {error}", where=where, fix="Export it with --mode separate.") from error
    if tied is not None:  # PEFT takes it back where the two differ already; UMT5 scales its states by it
        merged.config.tie_word_embeddings = tied
    return merged


def _untie(adapted: Any) -> None:
    """An output projection and a token embedding that are one weight get one each where an adapter changes only one of them."""
    model = adapted.get_base_model()
    if not hasattr(model, "get_output_embeddings"):
        return
    layers = [model.get_output_embeddings(), model.get_input_embeddings()]
    output, embedding = (getattr(layer, "base_layer", layer) for layer in layers)
    changed = any(ADAPTER in getattr(layer, side, {}) for layer in layers for side in ("lora_A", "lora_embedding_A"))
    if changed and output is not None and output.weight is embedding.weight:
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)


def prove_merged(
    model: Any, original: Any | None, rows: Sequence[Sequence[int]], *, trained: Outputs, trained_off: Outputs, shipped: Outputs,
    stored: PrecisionInfo, judged: str,
    decide: Callable[[Outputs], Outputs],
) -> Proof:  # fmt: skip
    """The proof of a bundle with the adapter of `model` in its weights, or (all weights trained) of `model` against `original`.

    `decide` turns a task's answers into what is compared (see `export.decisions`). Where weights are rounded, the base is rounded too, in place: only then is the difference to it the adapter's.
    """
    precision = Precision(stored.weights, stored.block_size or 32, stored.symmetric, overrides=stored.overrides, quantiser=stored.quantiser)
    layers = survival(model, precision) if original is None else survival(original, precision, trained=model)
    if not layers:
        return prove(trained=trained, trained_off=trained_off, shipped=shipped, shipped_off=trained_off, precision=judged)
    base = model if original is None else original
    round_weights(base, precision)
    rounded_off = decide(torch_outputs(base, rows, adapter=original is not None))
    proof = prove(trained=trained, trained_off=trained_off, shipped=shipped, shipped_off=rounded_off, precision=judged)
    return with_survival(proof, summary(layers), least=LEAST_STRENGTH)
