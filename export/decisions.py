"""Heads whose answer is no single class, put to the proof in its own terms: choices between two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from edgetune.export.distances import Array
from edgetune.export.proof import Outputs
from edgetune.runtime.manifest import REWARD

Decide = Callable[[Outputs], Outputs]


def decide_by(problem: str | None, trained: Outputs) -> Decide:
    """How the outputs of every model on the probe are compared.

    Several labels (multi-label): each is a choice of its own between no (logit 0) and yes. Numbers (regression): the
    choice is "above the mean of what was trained", with the distance from it in standard deviations as the logit; a
    guess that favours nothing is then the mean. A reward is such a number. Anything else stays as it is.
    """
    if problem == "multi-label":
        return lambda outputs: replace(outputs, logits=_pairs(outputs.logits.reshape(-1)))
    if problem in ("regression", REWARD):
        centre = float(trained.logits.mean())
        spread = float(trained.logits.std()) or 1.0
        return lambda outputs: replace(outputs, logits=_pairs((outputs.logits.reshape(-1) - centre) / spread))
    return lambda outputs: outputs


def _pairs(logits: Any) -> Array:
    """(n,) → (n, 2): the softmax of [0, x] is the sigmoid of x."""
    pairs: Array = np.stack([np.zeros_like(logits), logits], axis=-1).astype(np.float32)
    return pairs
