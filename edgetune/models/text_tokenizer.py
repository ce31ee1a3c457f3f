"""transformers' tokenizer, called with text of people in which control tokens are characters
(`core.control_tokens`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from edgetune.core.control_tokens import ControlTokens, special_names

TOKENS = "tokens"  # `data.control_tokens`: as transformers, whatever spells one is one


def reads_text(tokenizer: Any) -> Any:
    """The tokenizer with a call that takes a plain `str` as text."""
    own = type(tokenizer)
    control = ControlTokens(special_names(tokenizer.backend_tokenizer))
    tokenizer.__class__ = type(own.__name__, (_ReadsText, own), {"__module__": own.__module__})
    tokenizer.__dict__["control_tokens"] = control
    return tokenizer


def reading(tokenizer: Any, control_tokens: str) -> Any:
    """The tokenizer for rows of a format: with `tokens` control tokens that text spells count."""
    if control_tokens != TOKENS or control_of(tokenizer) is None:
        return tokenizer
    other = copy.copy(tokenizer)
    other.__dict__["control_tokens"] = None
    return other


def control_of(tokenizer: Any) -> ControlTokens | None:
    """What text must not be taken for; None where it may."""
    found: ControlTokens | None = tokenizer.__dict__.get("control_tokens")
    return found


class _ReadsText:
    def __call__(self, text: Any = None, text_pair: Any = None, **how: Any) -> Any:
        control = control_of(self)
        if control is None or not any(map(control.in_text, _texts((text, text_pair)))):
            return super().__call__(text, text_pair, **how)  # type: ignore[misc]
        apart = self.__dict__.get("written_apart")
        if apart is None:
            apart = self.__dict__["written_apart"] = _apart(self, control)
        return apart(_written(control, text), _written(control, text_pair), **how)

    def apply_chat_template(self, *conversation: Any, **how: Any) -> Any:
        """As transformers: what a template writes are control tokens, whoever wrote the messages.
        `data.prompts.apply_chat_template` keeps them apart.
        """
        plain = reading(self, TOKENS)
        if plain is self:
            return super().apply_chat_template(*conversation, **how)  # type: ignore[misc]
        return plain.apply_chat_template(*conversation, **how)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)


def _written(control: ControlTokens, value: Any) -> Any:
    if isinstance(value, str):
        return control.written_apart(value)
    return [_written(control, one) for one in value] if isinstance(value, (list, tuple)) else value


def _apart(tokenizer: Any, control: ControlTokens) -> Any:
    """The tokenizer with its control tokens under their stand-ins' names."""
    from tokenizers import Tokenizer

    other = copy.copy(tokenizer)
    other.__dict__["control_tokens"] = None
    other.__dict__["_tokenizer"] = Tokenizer.from_str(
        control.renamed(tokenizer.backend_tokenizer.to_str())
    )
    other.__dict__["_special_tokens_map"] = {
        role: control.stand_ins.get(str(name), name) if isinstance(name, str) or name else name
        for role, name in tokenizer._special_tokens_map.items()
    }
    return other
