"""The proof's first step: the bundle's tokenizer reads every text as transformers reads it with the
base's own folder.

Everything behind it compares token ids; where the two make other ids of a text, all of it would
pass and the device would still answer something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from edgetune.core.errors import EdgetuneError, ExportError, InputError, ProofError
from edgetune.export.inputs.sources import AdapterSource
from edgetune.export.proof.probe import TEXTS
from edgetune.export.proof.task_rows import rows_of
from edgetune.models.base import Base
from edgetune.models.load import model_config, plain_tokenizer
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.bundle.tokenizer import BundleTokenizer

ROWS = 64  # of each recipe, and as many texts of each of their rows as it has
PROVOKING = (
    "",
    " ",
    " leading",
    "  two leading",
    "trailing ",
    "two  spaces and   three",
    "\n",
    "a line\nand another\n\nand a third\n",
    "tab\tand\r\nWindows",
    "Wörld naïve façade ÅNGSTRÖM",
    "e\u0301 and n\u0303 decomposed, \ufb01 \uff21\uff22\uff23 \u2460",
    "no\u00a0break, zero\u200bwidth, \u2028line",
    "今天天气很好。東京へ行きたい。안녕하세요",
    "مرحبا بالعالم שלום",
    "👍 👩‍👩‍👧 🇩🇪 ☕",
    "0 12 345 6789 3.14159 1,000,000",
    "Turn On The LIGHTS, don't! I'm (here).",
    "def f(x):\n    return x ** 2  # square\n\n\tif x != 0: y = '…'",
    '{"intent": "lights", "room": null, "on": [true, 1.5]}',
    "https://example.org/a?b=c&d=%20 me@example.org",
    "▁under Ġbyte ##piece <0x0A> </w>",
)
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "set_light",
            "description": "Switches a light.",
            "parameters": {
                "type": "object",
                "properties": {"room": {"type": "string"}},
                "required": ["room"],
            },
        },
    },
)
USER, ANSWER = (
    {"role": "user", "content": "Turn on the  lights\nin the Küche."},
    {"role": "assistant", "content": "Done. 👍"},
)
CHATS: tuple[tuple[Sequence[Mapping[str, str]], Sequence[Mapping[str, Any]] | None], ...] = (
    ([USER], None),
    ([{"role": "system", "content": "Be brief."}, USER], None),
    ([USER, ANSWER, USER], None),
    ([USER], TOOLS),
    ([{"role": "system", "content": "Be brief."}, USER, ANSWER, USER], TOOLS),
)


@dataclass(frozen=True)
class TextParity:
    """What both tokenizers read, and read the same: texts, conversations, and all their tokens."""

    texts: int
    chats: int
    tokens: int

    def line(self) -> str:
        """For a person."""
        return (
            f"{self.texts:,} texts and {self.chats} conversations, {self.tokens:,} tokens, the same"
            " as transformers'"
        )


def prove_text(
    folder: Path, manifest: Manifest, base: Base, sources: Sequence[AdapterSource]
) -> TextParity:
    """Read the probe's texts, the recipes' rows, a set that provokes differences, every token that
    stands by itself, and conversations with both tokenizers. ProofError names the first difference.
    """
    theirs, ours = plain_tokenizer(base), BundleTokenizer(folder, manifest)
    tokens, texts = 0, list(dict.fromkeys(_texts(theirs, sources)))
    for text in texts:
        tokens += _same_ids(text, theirs, ours)
    decoded = [ids for text in texts if (ids := theirs(text, verbose=False)["input_ids"])]
    for text_ids in decoded:
        _same_text(text_ids, theirs, ours, generates=base.kind != "encoder")
    chats = 0
    for messages, tools in CHATS:
        count = _same_chat(messages, tools, theirs, ours)
        tokens, chats = tokens + count, chats + (count > 0)
    return TextParity(len(texts), chats, tokens)


def check_vocabulary(base: Base, tokenizer: Any) -> None:
    """ExportError for a tokenizer with tokens that the model has no embedding of."""
    rows = int(model_config(base).vocab_size)
    outside = [name for name, token in tokenizer.get_vocab().items() if token >= rows]
    if outside:
        raise ExportError(
            "the tokenizer has tokens that the model has no embedding of",
            where=str(base.folder),
            expected=f"token ids below {rows}",
            got=f"{len(outside)} above: {', '.join(sorted(outside)[:3])}",
            fix=(
                "Take the tokens out of the tokenizer's files, or resize the model"
                " (resize_token_embeddings), save both and train again."
            ),
        )


def _texts(tokenizer: Any, sources: Sequence[AdapterSource]) -> Iterator[str]:
    yield from TEXTS
    yield from PROVOKING
    for token in tokenizer.get_added_vocab():
        yield from (token, f"{token} after", f"before {token}  both\n", f"un{token}spaced")
    try:
        found = rows_of(sources, limit=ROWS)
    except EdgetuneError:
        return
    for rows in found.values():
        for row in rows.rows.rows:
            yield from _strings(row.values)


def _strings(value: Any) -> Iterator[str]:
    """Every text in a row, lists and objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _same_ids(text: str, theirs: Any, ours: BundleTokenizer) -> int:
    """The tokens of a text, with and without those that frame it. ProofError where they differ."""
    count = 0
    for special in (True, False):
        try:
            expected: list[int] = theirs(text, add_special_tokens=special, verbose=False)[
                "input_ids"
            ]
        except TypeError:  # half a surrogate pair, which neither takes
            return 0
        got = ours.tokenizer.encode(text, add_special_tokens=special).ids
        if got != expected:
            raise _differs(text, theirs.convert_ids_to_tokens(expected), _pieces(ours, got))
        count += len(got)
    return count


def _same_text(ids: Sequence[int], theirs: Any, ours: BundleTokenizer, *, generates: bool) -> None:
    how: dict[str, Any] = {} if generates else {"clean_up_tokenization_spaces": False}
    expected, got = theirs.decode(ids, skip_special_tokens=True, **how), ours.decode(ids)
    if expected != got:
        raise ProofError(
            f"the bundle's tokenizer writes other text for the tokens {list(ids)[:12]}",
            expected=repr(expected)[:120],
            got=repr(got)[:120],
            fix=_FIX,
        )


def _same_chat(
    messages: Sequence[Mapping[str, str]],
    tools: Sequence[Mapping[str, Any]] | None,
    theirs: Any,
    ours: BundleTokenizer,
) -> int:
    """The tokens of a conversation; 0 where there is no template, or both refuse it."""
    if not theirs.chat_template:
        return 0
    try:
        expected: str = theirs.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            tokenize=False,
            add_generation_prompt=True,
        )
    except (TemplateError, TypeError, ValueError):
        return 0
    try:
        got = ours.chat_of(messages, tools=tools)
    except InputError as error:
        raise _differs(repr(list(messages)), expected, str(error)) from error
    if got != expected:
        raise _differs(repr(list(messages)), expected, got)
    return _same_ids(expected, theirs, ours)


def _pieces(ours: BundleTokenizer, ids: Sequence[int]) -> list[Any]:
    return [ours.tokenizer.id_to_token(token) for token in ids]


_FIX = "Nothing was written. Save the base's tokenizer again with this version of transformers."


def _differs(text: str, expected: Any, got: Any) -> ProofError:
    return ProofError(
        f"the bundle's tokenizer reads {text[:80]!r} otherwise than transformers with the base",
        expected=str(expected)[:160],
        got=str(got)[:160],
        fix=_FIX,
    )
