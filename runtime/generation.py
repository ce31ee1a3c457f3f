"""Logits → tokens → text: greedy and sampled choice, stop strings, end of sequence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import InputError
from edgetune.runtime.penalties import Penalties
from edgetune.runtime.structured import KINDS, constraint_of, form_of, settings_of_response_format
from edgetune.runtime.tokenizer import BundleTokenizer, Detokenizer

Float32 = npt.NDArray[np.float32]

LOWEST = -1e30
"""A scaled logit this far below the likeliest one has probability 0, and float32 holds it."""


@dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen and when to stop."""

    max_new_tokens: int = 256
    """Tokens after the prompt, at most."""
    temperature: float = 0.0
    """0 takes the most likely token; above 0 samples from softmax(logits / temperature)."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach p (nucleus sampling, Holtzman 2020)."""
    seed: int | None = None
    """Same seed and same prompts, same texts; None draws a new one each time."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these texts."""
    min_p: float = 0.0
    """Sample among the tokens at least this share as likely as the most likely one (Nguyen 2024, arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or answer: divided by it when positive, else multiplied (CTRL, arXiv 1909.05858)."""
    frequency_penalty: float = 0.0
    """Taken off a logit for each time its token is in the answer so far (OpenAI)."""
    presence_penalty: float = 0.0
    """Taken off the logits of the tokens that are in the answer so far (OpenAI)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit); -100 bans, 100 forces."""
    logprobs: int | None = None
    """Log-probabilities with the tokens: None without, 0 of the chosen ones, n of the n likeliest as well."""
    schema: str | None = None
    """The answer is JSON that this JSON schema (its JSON text) accepts."""
    regex: str | None = None
    """The answer matches this regular expression."""
    grammar: str | None = None
    """The answer is of this Lark grammar."""

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
            "stop": (all(self.stop), "no empty text"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty < math.inf, "0.01 or more"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "-2 to 2"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "-2 to 2"),
            "logit_bias": (all(-100 <= bias <= 100 for _, bias in self.logit_bias), "-100 to 100"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 20, "0 to 20"),
        }
        for name, (fits, expected) in bounds.items():
            if not fits:
                raise InputError(f"{name} is out of range", expected=expected, got=repr(getattr(self, name)))
        form_of(self)


@dataclass(frozen=True)
class TokenLogprob:
    """One generated token and how likely it was (natural logarithm, before temperature and filters)."""

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    """the likeliest tokens, best first: id, text, log-probability"""


def settings_from(
    defaults: Mapping[str, Any], overrides: Mapping[str, Any], *, base: GenerationSettings | None = None
) -> GenerationSettings:
    """Settings out of an adapter's recorded defaults and a caller's own (None means: not given).

    `response_format` (OpenAI's) may be given as well; `{"type": "text"}` frees an answer of the adapter's own form.
    """
    known = {f.name for f in fields(GenerationSettings)}
    given = {k: v for k, v in defaults.items() if k in known and v is not None}
    wanted = {k: v for k, v in overrides.items() if v is not None and k != "response_format"}
    if overrides.get("response_format") is not None:
        given = {k: v for k, v in given.items() if k not in KINDS}  # also "text" frees of an adapter's own form
        wanted |= settings_of_response_format(overrides["response_format"])
    unknown = sorted(set(wanted) - known)
    if unknown:
        raise InputError(f"unknown generation setting {unknown[0]!r}", expected=", ".join(sorted(known)))
    if set(wanted) & set(KINDS):  # a caller's form replaces the adapter's, of whatever kind
        given = {k: v for k, v in given.items() if k not in KINDS}
    given |= wanted
    if "stop" in given:
        given["stop"] = (given["stop"],) if isinstance(given["stop"], str) else tuple(given["stop"])
    if isinstance(given.get("logit_bias"), Mapping):
        given["logit_bias"] = tuple((int(token), float(bias)) for token, bias in given["logit_bias"].items())
    if isinstance(given.get("schema"), (Mapping, bool)):
        given["schema"] = json.dumps(given["schema"])
    return replace(base or GenerationSettings(), **given)


def choose(logits: Float32, settings: GenerationSettings, rng: np.random.Generator) -> int:
    """The next token of one row; `logits` (vocab,). Order as in transformers: temperature, top-k, top-p, min-p."""
    if settings.temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore", invalid="ignore"):  # a tiny temperature sends all but the likeliest far down
        scaled = np.maximum((logits - logits.max()).astype(np.float64) / settings.temperature, LOWEST)
        kept = keep_likely(scaled.astype(np.float32), top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p)
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
        order = np.argsort(kept)  # ascending, as transformers: drop the tail whose mass is at most 1 - p
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
        """`limit`: tokens the context still has room for; `row` makes the sampling of a batch's rows differ.

        `vocab_size` (of the logits) is needed for an answer of a given form. Errors: see `constraint_of`, `Penalties`.
        """
        self.settings = settings
        self.limit = settings.max_new_tokens if limit is None else min(settings.max_new_tokens, limit)
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
        self.finish_reason: str | None = None

    @property
    def plain_greedy(self) -> bool:
        """Whether each token is simply the likeliest one, whatever came before."""
        return self.settings.temperature == 0 and self._constraint is None and not self._penalties.active

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        return "".join(self._pieces)

    def choose(self, logits: Float32) -> int:
        """Choose this row's next token from its logits (vocab,), which stay as they are."""
        shifted = self._penalties.apply(logits) if self._penalties.active else logits
        if self._constraint is not None:
            shifted = np.where(self._constraint.mask(), shifted, -np.inf)
        token = choose(shifted, self.settings, self._rng)
        if not 0 <= token < logits.size:  # the row ends alone, before the id spoils the others' step
            raise InputError("no token can be chosen", expected=f"an id below {logits.size}", got=str(token))
        if self.settings.logprobs is not None:
            self.logprobs.append(token_logprob(logits, token, self._tokenizer, top=self.settings.logprobs))
        return token

    def add(self, token: int) -> str:
        """Take one token; the text that is certain now. Sets `finish_reason` when the row is done."""
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
            return self._finish("length" if found is None and not complete else "stop", rest[:found])
        keep = stop_overlap(self._held, self.settings.stop)
        piece, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
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


def token_logprob(logits: Float32, token: int, tokenizer: BundleTokenizer, *, top: int) -> TokenLogprob:
    """The log-probability of a token under its raw logits (vocab,), and those of the `top` likeliest."""
    shifted = logits.astype(np.float64) - float(logits.max())
    normalizer = math.log(np.exp(shifted).sum())
    best = np.argpartition(shifted, -top)[-top:] if top else np.zeros(0, np.int64)
    best = best[np.argsort(-shifted[best], kind="stable")]
    found = ((int(i), tokenizer.token_text(int(i)), float(shifted[i]) - normalizer) for i in best)
    return TokenLogprob(token, tokenizer.token_text(token), float(shifted[token]) - normalizer, tuple(found))


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins, or None."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def stop_overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string could begin with."""
    lengths = [
        n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])
    ]
    return max(lengths, default=0)
