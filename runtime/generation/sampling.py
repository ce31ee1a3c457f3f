"""Logits → tokens → text: bias and penalties, greedy and sampled choice, stop strings, end of
sequence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgetune.core.answer_confidence import AnswerConfidence
from edgetune.core.arrays import Float32
from edgetune.core.errors import InputError
from edgetune.runtime.bundle.tokenizer import BundleTokenizer, Detokenizer
from edgetune.runtime.generation.settings import GenerationSettings
from edgetune.runtime.generation.structured import constraint_of

LOWEST = -1e30
"""A scaled logit this far below the likeliest one has probability 0, and float32 holds it."""


@dataclass(frozen=True)
class TokenLogprob:
    """One generated token and how likely it was (natural logarithm, before temperature and
    filters).
    """

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    """the likeliest tokens, best first: id, text, log-probability"""


def choose_token(logits: Float32, settings: GenerationSettings, rng: np.random.Generator) -> int:
    """The next token of one row; `logits` (vocab,). Order as in transformers: temperature, top-k,
    top-p, min-p.
    """
    if settings.temperature == 0:
        return int(logits.argmax())
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # a tiny temperature sends all but the likeliest far down
        scaled = np.maximum(
            (logits - logits.max()).astype(np.float64) / settings.temperature, LOWEST
        )
        kept = keep_likely(
            scaled.astype(np.float32),
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
        )
        total = np.cumsum(softmax(kept).astype(np.float64))
    if not np.isfinite(total[-1]):
        return int(logits.argmax())
    return int(np.searchsorted(total, rng.random() * total[-1], side="right"))


def keep_likely(logits: Float32, *, top_k: int, top_p: float, min_p: float = 0.0) -> Float32:
    """Logits with everything outside top-k, then top-p, then min-p set to minus infinity."""
    kept = logits.astype(np.float32, copy=True)
    if 0 < top_k < kept.size:
        kept[kept < np.partition(kept, -top_k)[-top_k]] = -np.inf
    if top_p < 1:
        order = np.argsort(
            kept
        )  # ascending, as transformers: drop the tail whose mass is at most 1 - p
        mass = np.cumsum(softmax(kept[order]))
        drop = order[mass <= 1 - top_p]
        kept[drop[drop != order[-1]]] = -np.inf
    if min_p > 0:
        kept[kept < kept.max() + np.float32(math.log(min_p))] = -np.inf
    return kept


def softmax(logits: Float32) -> Float32:
    """Probabilities over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Float32 = shifted / shifted.sum(axis=-1, keepdims=True)
    return result


class TokenSequence:
    """One row while it is generated: takes tokens, gives text, knows when it is done."""

    def __init__(
        self,
        tokenizer: BundleTokenizer,
        settings: GenerationSettings,
        *,
        row: int = 0,
        limit: int | None = None,
        prompt_ids: Sequence[int] = (),
        vocab_size: int | None = None,
    ) -> None:
        """`limit`: tokens the context still has room for; `row` makes the sampling of a batch's
        rows differ.

        `vocab_size` (of the logits) is needed for an answer of a given form. Errors: see
        `constraint_of`, `Penalties`.
        """
        self.settings = settings
        self.limit = (
            settings.max_new_tokens if limit is None else min(settings.max_new_tokens, limit)
        )
        seed = None if settings.seed is None else [settings.seed, row]
        self._rng = np.random.default_rng(seed)
        self._tokenizer, self._eos = tokenizer, tokenizer.eos_token_ids
        self._detokenizer = Detokenizer(tokenizer)
        self._penalties = Penalties(settings, prompt_ids, vocab_size=vocab_size)
        self._constraint = constraint_of(settings, tokenizer, vocab_size=vocab_size or 0)
        self._held = ""  # text that may be the beginning of a stop string
        self._pieces: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        """of the chosen tokens, when `settings.logprobs` asks for them"""
        self.score = 0.0
        """sum of the chosen tokens' log-probabilities, when `settings.confidence` asks for it"""
        self.finish_reason: str | None = None

    @property
    def plain_greedy(self) -> bool:
        """Whether each token is simply the likeliest one, whatever came before."""
        return (
            self.settings.temperature == 0
            and self._constraint is None
            and not self._penalties.active
        )

    def forced(self) -> list[int]:
        """Tokens that the answer's form leaves no choice about; empty for free text."""
        return [] if self._constraint is None else self._constraint.forced()

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        return "".join(self._pieces)

    @property
    def confidence(self) -> float | None:
        """How sure the answer is, 0 to 1, when `settings.confidence` asks for it. One that was cut
        off is not right.
        """
        if not self.settings.confidence:
            return None
        if self.finish_reason == "length":
            return 0.0
        if self.settings.calibration is None:
            return math.exp(self.score)
        return AnswerConfidence(*self.settings.calibration).of(self.score)

    def choose(self, logits: Float32) -> int:
        """Choose this row's next token from its logits (vocab,), which stay as they are."""
        shifted = self._penalties.apply(logits) if self._penalties.active else logits
        if self._constraint is not None:
            shifted = np.where(self._constraint.mask(), shifted, -np.inf)
        token = choose_token(shifted, self.settings, self._rng)
        if (
            not 0 <= token < logits.size
        ):  # the row ends alone, before the id spoils the others' step
            raise InputError(
                "no token can be chosen", expected=f"an id below {logits.size}", got=str(token)
            )
        if self.settings.confidence:
            self.score += logprob_of(logits, token)
        if self.settings.logprobs is not None:
            self.logprobs.append(
                token_logprob(logits, token, self._tokenizer, top=self.settings.logprobs)
            )
        return token

    def add(self, token: int) -> str:
        """Take one token; the text that is certain now. Sets `finish_reason` when the row is
        done.
        """
        self.tokens.append(token)
        self._penalties.add(token)
        if token in self._eos:
            return self._finish("stop", self._held + self._detokenizer.flush())
        self._held += self._detokenizer.add(token)
        if (found := first_stop(self._held, self.settings.stop)) is not None:
            return self._finish("stop", self._held[:found])
        complete = self._follow_form(token)
        if complete or len(self.tokens) >= self.limit:
            rest = self._held + self._detokenizer.flush()
            found = first_stop(rest, self.settings.stop)
            return self._finish(
                "length" if found is None and not complete else "stop", rest[:found]
            )
        keep = stop_overlap(self._held, self.settings.stop)
        piece, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return self._emit(piece)

    def _follow_form(self, token: int) -> bool:
        """Begin with the next token's mask; whether the answer's form allows nothing more."""
        if self._constraint is None:
            return False
        self._constraint.add(token)
        return self._constraint.complete

    def _finish(self, reason: str, piece: str) -> str:
        self.finish_reason, self._held = reason, ""
        return self._emit(piece)

    def _emit(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece


def logprob_of(logits: Float32, token: int) -> float:
    """The log-probability of a token under its raw logits (vocab,), 0 at most."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return min(0.0, float(shifted[token]) - math.log(np.exp(shifted).sum()))


def token_logprob(
    logits: Float32, token: int, tokenizer: BundleTokenizer, *, top: int
) -> TokenLogprob:
    """The log-probability of a token under its raw logits (vocab,), and those of the `top`
    likeliest.
    """
    shifted = logits.astype(np.float64) - float(logits.max())
    normalizer = math.log(np.exp(shifted).sum())
    best = np.argpartition(shifted, -top)[-top:] if top else np.zeros(0, np.int64)
    best = best[np.argsort(-shifted[best], kind="stable")]
    found = ((int(i), tokenizer.token_text(int(i)), float(shifted[i]) - normalizer) for i in best)
    return TokenLogprob(
        token, tokenizer.token_text(token), float(shifted[token]) - normalizer, tuple(found)
    )


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins, or None."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def stop_overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string could begin with."""
    lengths = [
        n
        for stop in stops
        for n in range(1, min(len(stop), len(text) + 1))
        if text.endswith(stop[:n])
    ]
    return max(lengths, default=0)


class Penalties:
    """One row's bias and penalties; knows which tokens were there. Order: bias, repetition,
    frequency and presence.
    """

    def __init__(
        self, settings: GenerationSettings, prompt_ids: Sequence[int], *, vocab_size: int | None
    ) -> None:
        """InputError when a bias is for a token id outside the vocabulary."""
        self._settings = settings
        self._bias_ids = np.array([token for token, _ in settings.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in settings.logit_bias], np.float32)
        if vocab_size is not None and any(not 0 <= token < vocab_size for token in self._bias_ids):
            expected = f"token ids below {vocab_size}"
            raise InputError(
                "logit_bias names an unknown token",
                expected=expected,
                got=str(int(self._bias_ids.max())),
            )
        self._repeats = settings.repetition_penalty != 1
        self._counts_matter = bool(settings.frequency_penalty or settings.presence_penalty)
        self._seen = set(prompt_ids) if self._repeats else set()
        self._counts: Counter[int] = Counter()

    @property
    def active(self) -> bool:
        """Whether `apply` changes anything."""
        return bool(len(self._bias)) or self._repeats or self._counts_matter

    def add(self, token: int) -> None:
        """A token of the answer."""
        if self._repeats:
            self._seen.add(token)
        if self._counts_matter:
            self._counts[token] += 1

    def apply(self, logits: Float32) -> Float32:
        """Shifted logits (vocab,), a copy."""
        shifted = logits.copy()
        shifted[self._bias_ids] += self._bias
        if self._repeats:
            ids = np.fromiter(self._seen, np.int64, len(self._seen))
            there, factor = shifted[ids], np.float32(self._settings.repetition_penalty)
            shifted[ids] = np.where(there > 0, there / factor, there * factor)
        if self._counts_matter and self._counts:
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            times = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            taken = times * self._settings.frequency_penalty + self._settings.presence_penalty
            shifted[ids] -= taken.astype(np.float32)
        return shifted
