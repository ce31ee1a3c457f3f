"""Whether a bundle's base has the weights that an adapter was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune.runtime.bundle.manifest import PrecisionInfo


def is_held(recorded: Mapping[str, Any], stored: PrecisionInfo) -> bool:
    """Whether `stored` is what `edgetune_adapter.json` has as `base_precision`: bits, block size,
    exceptions, quantiser, zeros.
    """
    keys = ("weights", "block_size", "overrides")
    same = (
        all(recorded.get(key) == getattr(stored, key) for key in keys)
        and recorded.get("quantiser", "rtn") == stored.quantiser
    )
    return same and recorded.get("symmetric", True) == stored.symmetric


def other_weights(recorded: Mapping[str, Any] | None, stored: PrecisionInfo) -> str:
    """A line for a person where the adapter meets other weights than it learned on; empty where it
    does not.
    """
    if recorded is None or is_held(recorded, stored):
        return ""
    overrides, quantiser = (
        dict(recorded.get("overrides") or {}),
        str(recorded.get("quantiser", "rtn")),
    )
    trained = PrecisionInfo(
        str(recorded.get("weights")),
        recorded.get("block_size"),
        overrides,
        quantiser,
        symmetric=bool(recorded.get("symmetric", True)),
    )
    return (
        f"it was trained for the {_words(trained)} base, but this one is {_words(stored)}; "
        f"export with {_options(trained, stored)} to ship what was trained"
    )


def _options(trained: PrecisionInfo, stored: PrecisionInfo) -> str:
    """What to give `edgetune export` for the weights that it was trained for; the precision, and
    what else differs.
    """
    options = [f"--precision {trained.weights}"]
    if trained.quantiser != stored.quantiser:
        options.append(f"--quantiser {trained.quantiser}")
    if trained.weights == stored.weights and trained.block_size != stored.block_size:
        options.append(f"--block-size {trained.block_size}")
    return " ".join(options)


def _words(stored: PrecisionInfo) -> str:
    """`int4 (blocks of 32, lm_head int8)`."""
    if stored.block_size is None:
        return (
            stored.weights
            if stored.activations == "float"
            else f"{stored.weights} (a scale an output, activations {stored.activations})"
        )
    how = [] if stored.quantiser == "rtn" else [f"rounded by {stored.quantiser}"]
    how += [] if stored.symmetric else ["zeros of their own"]
    others = [f"{module} {precision}" for module, precision in stored.overrides.items()]
    return f"{stored.weights} ({', '.join([f'blocks of {stored.block_size}', *how, *others])})"
