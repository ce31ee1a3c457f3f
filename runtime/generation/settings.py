"""How an answer is generated: lengths, sampling, stops, and the form it must have."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from edgetune.core.errors import InputError


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _texts(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(one, str) for one in value)


def _biases(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 and _whole(pair[0]) and _number(pair[1])
        for pair in value
    )


SAMPLING_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_whole, "a whole number"),
    "top_k": (_whole, "a whole number"),
    **dict.fromkeys(
        ("seed", "logprobs"), (lambda value: value is None or _whole(value), "a whole number")
    ),
    **dict.fromkeys(SAMPLING_NUMBERS, (_number, "a number")),
    "confidence": (lambda value: isinstance(value, bool), "true or false"),
    "stop": (_texts, "a text, or several"),
    "logit_bias": (_biases, "token ids with numbers"),
    **dict.fromkeys(
        ("schema", "regex", "grammar"),
        (lambda value: value is None or isinstance(value, str), "a text"),
    ),
}
"""setting → (whether a value fits, what is expected)"""


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
    """Sample among the fewest tokens whose probabilities reach p (nucleus sampling, Holtzman 2020).
    """
    seed: int | None = None
    """Same seed and same prompts, same texts; None draws a new one each time."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these texts."""
    min_p: float = 0.0
    """Sample among the tokens at least this share as likely as the most likely one (Nguyen 2024,
    arXiv 2407.01082).
    """
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or answer: divided by it when positive, else multiplied (CTRL,
    arXiv 1909.05858).
    """
    frequency_penalty: float = 0.0
    """Taken off a logit for each time its token is in the answer so far (OpenAI)."""
    presence_penalty: float = 0.0
    """Taken off the logits of the tokens that are in the answer so far (OpenAI)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit); -100 bans, 100 forces."""
    logprobs: int | None = None
    """Log-probabilities with the tokens: None without, 0 of the chosen ones, n of the n likeliest
    as well.
    """
    confidence: bool = False
    """How sure the answer is, with it: the probability that it is right, as its adapter was
    calibrated; where it was not, the answer's own probability."""
    calibration: tuple[float, float] | None = None
    """Slope and intercept of the adapter's calibration (see `core.answer_confidence`); a caller has
    no need to set it."""
    schema: str | None = None
    """The answer is JSON that this JSON schema (its JSON text) accepts."""
    regex: str | None = None
    """The answer matches this regular expression."""
    grammar: str | None = None
    """The answer is of this Lark grammar."""

    def __post_init__(self) -> None:
        for name, (is_one, expected) in TYPES.items():
            if not is_one(getattr(self, name)):
                got = repr(getattr(self, name))[:80]
                raise InputError(f"{name} has a wrong type", expected=expected, got=got)
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
                raise InputError(
                    f"{name} is out of range", expected=expected, got=repr(getattr(self, name))
                )
        form_of(self)


def settings_from(
    defaults: Mapping[str, Any],
    overrides: Mapping[str, Any],
    *,
    base: GenerationSettings | None = None,
) -> GenerationSettings:
    """Settings out of an adapter's recorded defaults and a caller's own (None means: not given).

    `response_format` (OpenAI's) may be given as well; `{"type": "text"}` frees an answer of the
    adapter's own form.
    """
    known = {f.name for f in fields(GenerationSettings)}
    given = {k: v for k, v in defaults.items() if k in known and v is not None}
    wanted = {k: v for k, v in overrides.items() if v is not None and k != "response_format"}
    if overrides.get("response_format") is not None:
        given = {
            k: v for k, v in given.items() if k not in KINDS
        }  # also "text" frees of an adapter's own form
        wanted |= settings_of_response_format(overrides["response_format"])
    unknown = sorted(set(wanted) - known)
    if unknown:
        raise InputError(
            f"unknown generation setting {unknown[0]!r}", expected=", ".join(sorted(known))
        )
    if set(wanted) & set(KINDS):  # a caller's form replaces the adapter's, of whatever kind
        given = {k: v for k, v in given.items() if k not in KINDS}
    given |= wanted
    if "stop" in given:
        given["stop"] = _several(given["stop"])
    if "logit_bias" in given:
        given["logit_bias"] = _pairs(given["logit_bias"])
    if isinstance(given.get("schema"), (Mapping, bool)):
        given["schema"] = json.dumps(given["schema"])
    return replace(base or GenerationSettings(), **given)


def _several(stop: Any) -> tuple[Any, ...]:
    return tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)


def _pairs(biases: Any) -> tuple[Any, ...]:
    """A mapping of token ids, which JSON has as texts, to what is added to their logits."""
    if not isinstance(biases, Mapping):
        return tuple(biases) if isinstance(biases, Iterable) else (biases,)
    try:
        return tuple((int(token), bias) for token, bias in biases.items())
    except ValueError:
        return tuple(biases.items())  # which are no token ids


KINDS = ("schema", "regex", "grammar")


def form_of(settings: GenerationSettings) -> tuple[str, str] | None:
    """The form that settings ask for, as (kind, text); None for free text. InputError when they ask
    for two.
    """
    asked = [(kind, str(text)) for kind in KINDS if (text := getattr(settings, kind)) is not None]
    if len(asked) > 1:
        got = " and ".join(kind for kind, _ in asked)
        raise InputError("an answer has one form", expected=f"one of {', '.join(KINDS)}", got=got)
    return asked[0] if asked else None


def settings_of_response_format(value: Any) -> dict[str, Any]:
    """OpenAI's `response_format` as generation settings: `text`, `json_object`, or `json_schema`
    with its schema.

    Besides, as vLLM's structured outputs: `{"type": "regex", "regex": …}` and `{"type": "grammar",
    "grammar": …}`.
    """
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"schema": '{"type": "object"}'}
    if kind in ("regex", "grammar") and isinstance(value.get(kind), str):
        return {kind: value[kind]}
    if kind == "json_schema" and isinstance(value.get("json_schema"), Mapping):
        schema = value["json_schema"].get("schema")
        if isinstance(schema, (Mapping, bool)):
            return {"schema": json.dumps(schema)}
    expected = (
        '{"type": "text" | "json_object"} or {"type": "json_schema", "json_schema": {"schema":'
        " {…}}}"
    )
    raise InputError("unknown response_format", expected=expected, got=repr(value)[:80])
