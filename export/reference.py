"""What a bundle is proven against: the base in torch as the adapter knew it while it was trained.

An adapter that was trained for a base of some precision is compared on the weights of that precision when the bundle
holds them, or when they were merged with it. In a bundle of another precision it meets other weights than it learned on;
then torch has the base as it is, as for every other adapter, and the export says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgetune.bases import Base
from edgetune.export.proof import coarsest
from edgetune.quantiser import ROUNDING
from edgetune.runtime import manifest as bundle
from edgetune.weight_precision import Precision, trained_precision


def trained_base(base: Base, metadata: Mapping[str, Any]) -> Base:
    """The base with the weights that an adapter was trained on, by its metadata."""
    recorded = metadata.get("base_precision")
    return base if recorded is None else replace(base, precision=trained_precision(recorded, where=base.name))


def reference_base(base: Base, metadata: Mapping[str, Any], manifest: bundle.Manifest) -> Base:
    """The base for torch's side of the proof of one adapter."""
    known = trained_base(base, metadata)
    return known if manifest.mode == "merged" or holds(manifest, known.precision) else base


def holds(manifest: bundle.Manifest, precision: Precision | None) -> bool:
    """Whether a bundle's base has exactly the weights that an adapter of this precision was trained on."""
    if precision is None:
        return manifest.precision.weights == "fp32"
    stored = manifest.precision
    return (stored.weights, stored.block_size, dict(stored.overrides)) == (precision.weights, precision.block_size, dict(precision.overrides))


def judged_by(manifest: bundle.Manifest, reference: Base) -> str:
    """The name of the bounds that hold for a proof against `reference`.

    Where torch computes with the bundle's own weights nothing but activations is rounded, to 8 bits: int8's bounds.
    """
    own = coarsest([manifest.precision.weights, *manifest.precision.overrides.values()])
    return "int8" if own == "int4" and manifest.mode == "separate" and reference.precision is not None else own


def warning(name: str, metadata: Mapping[str, Any], manifest: bundle.Manifest) -> str:
    """One line where an adapter meets other weights than it was trained on; empty where it does not."""
    known = metadata.get("base_precision")
    if known is None:
        return ""
    weights, precision = known["weights"], trained_precision(known, where=name)
    if manifest.mode == "merged":
        if manifest.precision.weights == "fp32":
            return ""
        return (
            f"warning: adapter {name} was trained for the {weights} base; merged with it, the sum is rounded once more, "
            f"to {manifest.precision.weights}. --mode separate --precision {weights} ships what was trained"
        )
    if not holds(manifest, precision):
        return (
            f"warning: adapter {name} was trained for the {weights} base ({_words(precision)}), this bundle's is "
            f"{_stored(manifest)}; --precision {weights} ships what was trained"
        )
    if known.get("rounding") != ROUNDING:
        return f"warning: adapter {name} was trained on the {weights} base of another version of edgetune, which rounded weights otherwise"
    return ""


def _words(precision: Precision) -> str:
    return ", ".join([f"blocks of {precision.block_size}", *(f"{module} {kept}" for module, kept in precision.overrides.items())])


def _stored(manifest: bundle.Manifest) -> str:
    stored = manifest.precision
    if stored.weights == "fp32":
        return "fp32"
    words = _words(Precision(stored.weights, block_size=stored.block_size or 0, overrides=stored.overrides))
    return f"{stored.weights} ({words})"
