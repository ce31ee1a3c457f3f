"""A type check of an adapter's JSON files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgetune.core.answer_confidence import GENERATION_KIND, answer_confidence_problems
from edgetune.core.confidence import confidence_problems
from edgetune.core.errors import InputError
from edgetune.core.head_layers import LINEAR, TRANSFORMERS
from edgetune.core.precisions import PRECISIONS
from edgetune.core.tag_sequences import IOB2
from edgetune.core.tasks import PROBLEMS
from edgetune.runtime.adapters.patterns import is_safe
from edgetune.runtime.generation.settings import SAMPLING_NUMBERS

MAX_KEYS = 2000
"""Of `rank_pattern` and `alpha_pattern`: seven modules in each of a hundred layers, and more."""
Check = Callable[[Any], bool]
Table = Mapping[str, tuple[Check, str]]
"""field → (whether a value other than null fits, what is expected)"""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_whole(value) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_regex(value: Any) -> bool:
    return isinstance(value, str) and is_safe(value)


def _keys_are_safe(pattern: Mapping[str, Any]) -> bool:
    """Few enough that every module's name can be held against them."""
    return len(pattern) <= MAX_KEYS and all(map(_is_regex, pattern))


def _one_of(*values: str) -> tuple[Check, str]:
    return lambda value: value in values, " | ".join(values)


def _list_of(fits: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _pattern_of(fits: Check) -> Check:
    return lambda value: (
        isinstance(value, dict) and _keys_are_safe(value) and all(map(fits, value.values()))
    )


def _either(one: Check, other: Check) -> Check:
    return lambda value: one(value) or other(value)


TEXT, WHOLE, NUMBER, OBJECT = (
    (_is_text, "a text"),
    (_is_whole, "a whole number"),
    (_is_number, "a number"),
    (_is_object, "an object"),
)
POSITIVE = (_is_positive, "1 or more")
REGEX = "regular expression (without lookaround, back-references or flags)"
MODULES = (_either(_is_regex, _list_of(_is_text)), f"a {REGEX} or a list of names")
PEFT: Table = {
    "r": POSITIVE,
    "lora_alpha": NUMBER,
    "rank_pattern": (_pattern_of(_is_positive), f"an object: {REGEX} → 1 or more"),
    "alpha_pattern": (_pattern_of(_is_number), f"an object: {REGEX} → number"),
    "target_modules": MODULES,
    "exclude_modules": MODULES,
    "modules_to_save": (_list_of(_is_regex), "a list of names"),
    "layers_to_transform": (
        _either(_is_whole, _list_of(_is_whole)),
        "a layer's number or a list of them",
    ),
    "layers_pattern": (
        _either(_is_regex, _list_of(_is_regex)),
        f"a {REGEX} or a list of them",
    ),
}
OWN: Table = {
    "base": OBJECT,
    "files": (
        lambda value: _is_object(value) and all(map(_is_text, value.values())),
        "an object: file → sha256",
    ),
    "task": TEXT,
    "problem": _one_of(*PROBLEMS),
    "pooling": TEXT,
    "head": _one_of(LINEAR, TRANSFORMERS),
    "labels": (_list_of(_either(_is_text, _is_number)), "a list of texts"),
    "max_length": POSITIVE,
    "prompt_format": OBJECT,
    "generation": OBJECT,
    "base_precision": OBJECT,
}
PROMPT_FORMAT: Table = {
    "template": _one_of("chat", "plain"),
    "system": TEXT,
    "system_column": TEXT,
    "prompt": TEXT,
    "text": TEXT,
    "text_pair": TEXT,
    "tokens": TEXT,
    "tag_scheme": _one_of(IOB2),
    "case_marks": (_is_flag, "true or false"),
}
GENERATION: Table = {
    **dict.fromkeys(("max_new_tokens", "top_k", "seed", "logprobs"), WHOLE),
    **dict.fromkeys(SAMPLING_NUMBERS, NUMBER),
    **dict.fromkeys(("regex", "grammar"), TEXT),
    "stop": (_either(_is_text, _list_of(_is_text)), "a text or a list of texts"),
}
BASE_PRECISION: Table = {
    "weights": _one_of(*PRECISIONS),
    "block_size": POSITIVE,
    "symmetric": (lambda value: isinstance(value, bool), "true or false"),
    "overrides": (
        lambda value: _is_object(value) and all(map(_is_text, value.values())),
        "an object: module → precision",
    ),
}


def wrong_config(config: Mapping[str, Any]) -> list[str]:
    """A line for each value of `adapter_config.json` that PEFT's LoRA could not have written."""
    null = [
        f"{name}: expected {PEFT[name][1]}, got null"
        for name in ("r", "lora_alpha")
        if name in config and config[name] is None
    ]
    return null + _wrong(config, PEFT, "")


def wrong_metadata(metadata: Mapping[str, Any]) -> list[str]:
    """A line for each value of `edgetune_adapter.json` of a wrong type or, among the generation
    defaults, out of range.
    """
    from edgetune.runtime.generation.settings import settings_from

    wrong = _wrong(metadata, OWN, "")
    for name, table in (
        ("prompt_format", PROMPT_FORMAT),
        ("generation", GENERATION),
        ("base_precision", BASE_PRECISION),
    ):
        if _is_object(metadata.get(name)):
            wrong += _wrong(metadata[name], table, f"{name}.")
    if (sure := metadata.get("confidence")) is not None:
        of_text = isinstance(sure, dict) and sure.get("kind") == GENERATION_KIND
        wrong += answer_confidence_problems(sure) if of_text else confidence_problems(sure)
    if not wrong and metadata.get("generation"):
        try:
            settings_from(metadata["generation"], {})
        except (InputError, TypeError, ValueError) as error:
            wrong.append(f"generation: {error}")
    return wrong


def _wrong(values: Mapping[str, Any], table: Table, where: str) -> list[str]:
    return [
        f"{where}{name}: expected {expected}, got {values[name]!r:.60}"
        for name, (fits, expected) in table.items()
        if values.get(name) is not None and not fits(values[name])
    ]
