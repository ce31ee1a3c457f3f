"""What a bundle is proven against: the base in torch as the adapter knew it while it was trained.

An adapter that was trained for a base of some precision is compared on the weights of that precision when the bundle
holds them, or when they were merged with it. In a bundle of another precision it meets other weights than it learned on;
then torch has the base as it is, as for every other adapter, and the export says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetune.adapters import METADATA
from edgetune.bases import Base
from edgetune.export.proof import coarsest
from edgetune.layout import ADAPTER
from edgetune.quantiser import ROUNDING
from edgetune.runtime import manifest as bundle
from edgetune.runtime.trained_for import is_held
from edgetune.weight_precision import FLOATS, trained_precision


def trained_base(base: Base, metadata: Mapping[str, Any]) -> Base:
    """The base with the weights that an adapter was trained on, by its metadata."""
    recorded = metadata.get("base_precision")
    return base if recorded is None else replace(base, precision=trained_precision(recorded, where=base.name))


def precision_trained_for(folders: Sequence[Path]) -> str | None:
    """The one precision that all of these runs or adapters were trained for (`base_precision`); None where they differ or
    say nothing. A folder that cannot be read says nothing here: exporting it raises."""
    found: set[str | None] = set()
    for folder in folders:
        inner = folder / ADAPTER if (folder / ADAPTER / METADATA).is_file() else folder
        try:
            recorded = json.loads((inner / METADATA).read_text(encoding="utf-8")).get("base_precision")
            found.add(recorded and str(recorded["weights"]))
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            found.add(None)
    return found.pop() if len(found) == 1 else None


def reference_base(base: Base, metadata: Mapping[str, Any], manifest: bundle.Manifest) -> Base:
    """The base for torch's side of the proof of one adapter."""
    recorded = metadata.get("base_precision")
    as_trained = recorded is not None and (manifest.mode == "merged" or is_held(recorded, manifest.precision))
    return trained_base(base, metadata) if as_trained else base


def judged_by(manifest: bundle.Manifest, reference: Base) -> str:
    """The name of the bounds that hold for a proof against `reference`.

    Where torch computes with the bundle's own weights nothing but activations is rounded, to 8 bits: int8's bounds.
    """
    own = coarsest([manifest.precision.weights, *manifest.precision.overrides.values()])
    return "int8" if own == "int4" and manifest.mode == "separate" and reference.precision is not None else own


def warning(name: str, metadata: Mapping[str, Any], manifest: bundle.Manifest) -> str:
    """One line where a merged adapter, or another version, leaves other weights than it was trained on; else empty.

    That a separate bundle is of another precision is in the notes of `pack_adapter`, which the device sees too.
    """
    recorded = metadata.get("base_precision")
    if recorded is None:
        return ""
    weights, stored = recorded["weights"], manifest.precision.weights
    if manifest.mode == "merged" and stored not in FLOATS:
        return (
            f"adapter {name}: it was trained for the {weights} base; merged with it, the sum is rounded once more, to {stored}; "
            f"--mode separate --precision {weights} ships what was trained"
        )
    if manifest.mode == "separate" and recorded.get("rounding") != ROUNDING:
        return f"adapter {name}: it was trained on the {weights} base of another version of edgetune, which rounded weights otherwise"
    return ""
