"""What a runtime answers: generated texts and classifications, and how they are made from a row's
tokens or logits.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetune.core.errors import AdapterError, InputError
from edgetune.core.tasks import THRESHOLD, VALUE
from edgetune.runtime.adapters.packing import PackedAdapter
from edgetune.runtime.generation.sampling import TokenLogprob, TokenSequence, softmax


@dataclass(frozen=True)
class Completion:
    """One generated text. `finish_reason`: "stop" (end token or stop text), "length"; from the
    scheduler also "cancelled" and "deadline". Times in milliseconds."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    ttft_ms: float
    tpot_ms: float | None
    """Mean time of the tokens after the first; None when there is only one."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    queue_ms: float = 0.0
    """Time in the scheduler's queue, part of `ttft_ms`."""
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were there already."""
    confidence: float | None = None
    """How sure the answer is (0 to 1), where the settings ask for it."""


@dataclass(frozen=True)
class Classification:
    """The most likely label, its calibrated probability, and every label's.

    Below the adapter's own threshold, or the request's, `label` is None and `rejected` the label
    that was likeliest.
    Of an adapter for several labels (multi-label) `labels` are those of at least 0.5, which need
    not include `label`, and each has a probability of its own. Of one for numbers (regression)
    `value` is the number; `label` is "value", and `score` and `scores` hold the number too.
    """

    label: str | None
    score: float
    scores: dict[str, float]
    labels: tuple[str, ...] | None = None
    value: float | None = None
    rejected: str | None = None

    @property
    def likeliest(self) -> str:
        """The most likely label, whether it counts or not."""
        return self.label or self.rejected or ""


class TextStream:
    """Pieces of one text as they become certain; `completion` is there after the last."""

    def __init__(self, pieces: Generator[str | Completion, None, None]) -> None:
        self._pieces = pieces
        self.completion: Completion | None = None

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if isinstance(piece, Completion):
                self.completion = piece
            else:
                yield piece

    def close(self) -> None:
        """End it before its end; its adapter is free."""
        self._pieces.close()


def need_finite(values: npt.NDArray[np.float32], adapter: str | None) -> None:
    """AdapterError, which names the adapter, where a result holds NaN or infinite values: it is no
    answer.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()) or np.isfinite(values).all():
            return
    who = "the base model" if adapter is None else f"the adapter {adapter!r}"
    raise AdapterError(
        f"what {who} computed is not finite, so there is no answer",
        fix="Its weights are too large, or damaged: train or copy it again.",
    )


def classification_of(
    logits: npt.NDArray[np.float32], adapter: PackedAdapter, threshold: float | None = None
) -> Classification:
    """A head's logits (labels,) as probabilities of its labels; `threshold` in place of the
    adapter's own. AdapterError where they are not finite; InputError for a threshold of answers
    that are not one label.
    """
    need_finite(logits, adapter.name)
    if threshold is not None and adapter.problem != "single-label":
        gives = "a number" if adapter.problem == "regression" else "several labels"
        raise InputError(
            f"the adapter {adapter.name!r} gives {gives}, which no threshold rejects",
            got=f"threshold {threshold}",
            fix="Leave the threshold out.",
        )
    if adapter.problem == "regression":
        value = float(logits[0])
        return Classification(label=VALUE, score=value, scores={VALUE: value}, value=value)
    several = adapter.problem == "multi-label"
    scaled = adapter.confidence.scaled(logits)
    probabilities = sigmoid(scaled) if several else softmax(scaled)
    scores = dict(zip(adapter.labels or (), probabilities.tolist(), strict=True))
    label = max(scores, key=lambda name: scores[name])
    labels = (
        tuple(name for name, score in scores.items() if score >= THRESHOLD) if several else None
    )
    if not several and adapter.confidence.rejects(scores[label], threshold):
        return Classification(label=None, score=scores[label], scores=scores, rejected=label)
    return Classification(label=label, score=scores[label], scores=scores, labels=labels)


def check_threshold(threshold: float | None) -> None:
    """InputError for a request's threshold that is no probability."""
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if threshold is not None and not (number and 0 <= threshold <= 1):
        raise InputError("the threshold is out of range", expected="0 to 1", got=repr(threshold))


def sigmoid(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """1 / (1 + exp(-x)), without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64))))


def unit_length(pooled: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """States (texts, hidden) scaled to length 1."""
    lengths = np.linalg.norm(pooled, axis=1, keepdims=True)
    result: npt.NDArray[np.float32] = pooled / np.maximum(lengths, 1e-12)
    return result


def completion_of(
    row: TokenSequence, prompt_tokens: int, first_s: float, total_s: float
) -> Completion:
    """A finished row, whose first token came after `first_s` and whose last after `total_s`
    seconds.
    """
    count = len(row.tokens)
    tpot_ms = (total_s - first_s) * 1e3 / (count - 1) if count > 1 else None
    logprobs = None if row.settings.logprobs is None else tuple(row.logprobs)
    return Completion(
        text=row.text,
        finish_reason=row.finish_reason or "stop",
        prompt_tokens=prompt_tokens,
        completion_tokens=count,
        ttft_ms=first_s * 1e3,
        tpot_ms=tpot_ms,
        token_ids=tuple(row.tokens),
        logprobs=logprobs,
        confidence=row.confidence,
    )
