"""How sure an adapter's answers are: what makes a logit a probability that can be believed, and the
score below which an answer is none of the labels. A few numbers, which travel with the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from edgetune.core.arrays import Float32
from edgetune.core.errors import AdapterError

LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 0.05, 20.0


@dataclass(frozen=True)
class Confidence:
    """`edgetune_adapter.json`, key `confidence`. The defaults are an adapter that was not
    calibrated.
    """

    temperature: float = 1.0
    """logits are divided by it before they become probabilities (Guo et al. 2017, section 4.2)"""
    threshold: float | None = None
    """a calibrated score below it is no answer; None: every answer counts"""
    target: float | None = None
    """share of right answers among those given that the threshold was chosen for"""
    answered: float | None = None
    """share of the rows that the threshold lets through, where that was asked for"""
    out_of_scope: str | None = None
    """the label of rows that are none of the labels, beside an empty one"""
    rows: int = 0
    """held-out rows (words of a tagger, labels of rows that have several) it was fitted on"""
    fitted_on: str = "torch"
    """whose logits it was fitted on: "torch", as trained, or a bundle's precision"""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def rejects(self, score: float, threshold: float | None = None) -> bool:
        """Whether an answer of this score is none; a `threshold` of a request's own goes before,
        and 0 lets everything through.
        """
        least = self.threshold if threshold is None else threshold
        return least is not None and score < least

    def scaled(self, logits: Float32) -> Float32:
        """The logits whose softmax (of several labels, sigmoid) is calibrated."""
        if self.temperature == 1.0:
            return logits
        most = float(np.finfo(np.float32).max)
        wide = np.asarray(logits, np.float64) / self.temperature
        return np.asarray(wide.clip(-most, most), np.float32)


NONE = Confidence()
KNOWN = tuple(field.name for field in fields(Confidence))


def confidence_of(metadata: Mapping[str, Any]) -> Confidence:
    """What an adapter's metadata says; keys that a later version adds are passed over. AdapterError
    for numbers that are none.
    """
    found = metadata.get("confidence")
    if found is None:
        return NONE
    if wrong := confidence_problems(found):
        raise AdapterError("; ".join(wrong), fix="Train the adapter again.")
    return Confidence(**{name: found[name] for name in KNOWN if name in found})


def confidence_problems(value: Any) -> list[str]:
    """A line for each of the two numbers that answers depend on where it is none."""
    if not isinstance(value, dict):
        return [f"confidence: expected an object, got {value!r:.60}"]
    checks = (
        ("temperature", LEAST_TEMPERATURE, LARGEST_TEMPERATURE, False),
        ("threshold", 0.0, 1.0, True),
    )
    return [
        f"confidence.{name}: expected {low:g} to {high:g}, got {value[name]!r:.60}"
        for name, low, high, optional in checks
        if name in value and not _between(value[name], low, high, optional=optional)
    ]


def _between(value: Any, low: float, high: float, *, optional: bool) -> bool:
    if value is None:
        return optional
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high


@dataclass(frozen=True)
class ScoredLabel:
    """An answer with its calibrated score, and whether that is too low to count; None where an
    answer has no probability.
    """

    label: str
    score: float | None
    rejected: bool = False


def scored(
    labels: Sequence[str], probabilities: Sequence[float], confidence: Confidence
) -> ScoredLabel:
    """The likeliest of the labels."""
    best = max(range(len(labels)), key=lambda at: probabilities[at])
    score = float(probabilities[best])
    return ScoredLabel(labels[best], score, confidence.rejects(score))
