"""Text of a row or a user in which a control token is spelled stays characters.

`<|im_end|>` in a message would end the turn. Whoever writes a template means its control tokens;
whoever fills it in does not. A template's result (`Rendered`) knows which of its parts are text; a
plain `str` is text from end to end. Where text spells a control token, the whole is read by a
second tokenizer that is the first with its control tokens under other names (stand-ins), which the
template's own are written as; so everything else of the tokenizer does what it always does.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

Span = tuple[int, int]
STAND_INS = 0xF0000  # private use, a character a token
_SECRET = secrets.token_hex(8)  # so that no text can hold the marks
OPEN, CLOSE = f"\ufdd0{_SECRET}\ufdd1", f"\ufdd0{_SECRET}\ufdd2"
_MARKS = re.compile(f"({OPEN}|{CLOSE})")
NOT_TEXT = frozenset({"role", "type"})  # keys of a message whose values name something


class Rendered(str):
    """What a template made; `texts`: where what it was filled in with lies, in characters."""

    texts: tuple[Span, ...]

    def __new__(cls, text: str, texts: Iterable[Span] = ()) -> Rendered:
        self = super().__new__(cls, text)
        self.texts = tuple(texts)
        return self

    def __getnewargs__(self) -> tuple[str, tuple[Span, ...]]:  # type: ignore[override]
        return str(self), self.texts


def marked_value(value: str) -> str:
    """A text between marks that `without_marks` finds again."""
    return f"{OPEN}{value}{CLOSE}"


def without_marks(text: str) -> Rendered:
    """A rendered text without its marks, and where they were; the inner ones of nested marks count
    for nothing.
    """
    parts, spans, depth, length, start = [], [], 0, 0, 0
    for part in _MARKS.split(text):
        if part == OPEN:
            start = length if depth == 0 else start
            depth += 1
        elif part == CLOSE:
            depth -= 1
            if depth == 0:
                spans.append((start, length))
        else:
            parts.append(part)
            length += len(part)
    return Rendered("".join(parts), spans)


class ControlTokens:
    """The control tokens of one tokenizer: `names` as text spells them."""

    def __init__(self, names: Iterable[str]) -> None:
        known = {name for name in names if name}
        longest_first = sorted(known, key=lambda name: (-len(name), name))
        self.stand_ins = {
            name: chr(STAND_INS + at) * len(name)  # as long, so that offsets stay
            for at, name in enumerate(longest_first)
        }
        spelled = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._any = re.compile(spelled, re.IGNORECASE)  # some tokenizers fold the case of them
        self._exact = re.compile(spelled)
        self._taken = re.compile(f"[{chr(STAND_INS)}-{chr(STAND_INS + len(longest_first))}]")

    def in_text(self, text: str) -> bool:
        """Whether a control token is spelled where it is text."""
        return any(_is_text(text, match.span()) for match in self._any.finditer(text))

    def written_apart(self, text: str) -> str:
        """The text with the template's control tokens as stand-ins, as long as before."""
        free = self._taken.sub("\N{REPLACEMENT CHARACTER}", text)

        def stand_in(match: re.Match[str]) -> str:
            return match[0] if _is_text(text, match.span()) else self.stand_ins[match[0]]

        return self._exact.sub(stand_in, free)

    def marked(self, value: Any) -> Any:
        """A message's texts, in lists and objects too, with marks around what spells a control
        token, for a template to copy.
        """
        if isinstance(value, str):

            def mark(match: re.Match[str]) -> str:
                return marked_value(match[0]) if _is_text(value, match.span()) else match[0]

            return self._any.sub(mark, value)
        if isinstance(value, dict):
            return {key: one if key in NOT_TEXT else self.marked(one) for key, one in value.items()}
        return [self.marked(one) for one in value] if isinstance(value, (list, tuple)) else value

    def renamed(self, document: str) -> str:
        """A tokenizer.json with stand-ins for the control tokens' names; every id stays."""
        tokenizer = json.loads(document)
        name = functools.partial(_renamed, self.stand_ins)
        model = tokenizer["model"]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {name(token): at for token, at in vocabulary.items()}
        elif vocabulary is not None:
            model["vocab"] = [[name(token), score] for token, score in vocabulary]
        if model.get("unk_token") is not None:
            model["unk_token"] = name(model["unk_token"])
        for token in tokenizer["added_tokens"]:
            if token["content"] in self.stand_ins:
                token |= {"content": name(token["content"]), "normalized": False}
        return json.dumps(tokenizer)


def special_names(tokenizer: Any) -> list[str]:
    """The names of the control tokens of a `tokenizers.Tokenizer`."""
    return [
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    ]


def _renamed(stand_ins: dict[str, str], token: str) -> str:
    return stand_ins.get(token, token)


def _is_text(text: str, span: Span) -> bool:
    """Whether any character of a span is text and not the template's own."""
    if not isinstance(text, Rendered):
        return True
    return any(start < span[1] and span[0] < stop for start, stop in text.texts)
