"""How sure a generated answer is: from the log-probabilities of its tokens to the probability that
all of it is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

GENERATION_KIND = "generation"


@dataclass(frozen=True)
class AnswerConfidence:
    """`edgetune_adapter.json`, key `confidence`, of an adapter that writes text:
    1 / (1 + exp(-(slope · score + intercept))), where the score is the sum of the tokens'
    log-probabilities under the model's own distribution, before a form or a temperature changes it
    (Platt 1999).
    """

    slope: float
    intercept: float
    rows: int = 0
    """held-out rows it was fitted on"""
    fitted_on: str = "torch"
    kind: str = GENERATION_KIND

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def of(self, score: float) -> float:
        """The probability that an answer of this score is right."""
        return 0.5 * (1 + math.tanh(0.5 * (self.slope * score + self.intercept)))


def answer_confidence_of(metadata: Mapping[str, Any]) -> AnswerConfidence | None:
    """What an adapter's metadata says; None where its answers were not calibrated."""
    found = metadata.get("confidence") or {}
    if found.get("kind") != GENERATION_KIND:
        return None
    known = {name: found[name] for name in ("rows", "fitted_on") if name in found}
    return AnswerConfidence(float(found["slope"]), float(found["intercept"]), **known)


def answer_confidence_problems(value: Mapping[str, Any]) -> list[str]:
    """A line for each of the two numbers where it is none."""
    return [
        f"confidence.{name}: expected a number, got {value.get(name)!r:.60}"
        for name in ("slope", "intercept")
        if isinstance(value.get(name), bool)
        or not isinstance(value.get(name), (int, float))
        or not math.isfinite(value[name])
    ]
