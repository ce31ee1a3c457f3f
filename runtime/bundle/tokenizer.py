"""Text ↔ token ids with `tokenizers` alone, and a streaming detokeniser that never emits half a
character.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetune.core.control_tokens import (
    ControlTokens,
    Rendered,
    special_names,
    without_marks,
)
from edgetune.core.errors import BundleError, InputError
from edgetune.core.templates import Message, chat_messages, chat_text
from edgetune.core.text import Text, lengths_within, typed
from edgetune.runtime.bundle.manifest import Manifest

CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
LONGEST = 4  # characters of these
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class BundleTokenizer:
    """A bundle's tokenizer: the same ids as transformers gives for the same text."""

    def __init__(self, folder: str | Path, manifest: Manifest) -> None:
        from tokenizers import Tokenizer

        info, root = manifest.tokenizer, Path(folder)
        try:
            self.tokenizer: Any = Tokenizer.from_file(str(root / info.file))
        except Exception as error:  # tokenizers raises bare Exception for every damaged file
            raise BundleError(
                f"the tokenizer cannot be read: {error}", where=str(root / info.file)
            ) from error
        # a saved file may carry the padding and truncation of its training
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.cleans_up = info.clean_up
        self.eos_token_ids = frozenset(info.eos_token_ids)
        self.padding_id = info.pad_token_id
        """None where the tokenizer has none"""
        self.pad_token_id = info.pad_token_id if info.pad_token_id is not None else 0
        self.special_tokens = {name: _content(token) for name, token in info.special_tokens.items()}
        self.chat_template = _read(root, info.chat_template)
        self.tool_template = _read(root, info.tool_template) or self.chat_template
        """the one for conversations with tools, as transformers chooses it"""
        self._control: ControlTokens | None = ControlTokens(special_names(self.tokenizer))
        self._vocabulary = manifest.graph.vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens (BOS, [CLS] … [SEP]) as the tokenizer's
        post-processor adds them.
        """
        ids: list[int] = self._encoding(text, add_special_tokens=add_special_tokens).ids
        return self._known(ids)

    def encode_within(self, text: str, *, max_tokens: int) -> list[int]:
        """Ids of a text, cut to `max_tokens` with its special tokens kept, as transformers'
        `truncation=True`.
        """
        return self.encode_with_offsets(text, max_tokens=max_tokens)[0]

    def encode_text(self, text: Text, *, max_tokens: int | None = None) -> list[int]:
        """Ids of a text or of two, cut as by `encode_within` unless None; of two texts the longer
        one is cut first.

        Two texts' ids say where the second begins, when the tokenizer tells them apart
        (`edgetune.core.text.PairIds`).
        """
        if isinstance(text, str):
            return (
                self.encode(text)
                if max_tokens is None
                else self.encode_within(text, max_tokens=max_tokens)
            )
        first, second = (self._encoding(one, add_special_tokens=False) for one in text)
        if max_tokens is not None:
            most = max(max_tokens - self.tokenizer.num_special_tokens_to_add(True), 0)
            kept = lengths_within(len(first.ids), len(second.ids), most)
            first.truncate(kept[0])
            second.truncate(kept[1])
        whole = self.tokenizer.post_process(first, second)
        return typed(self._known(whole.ids), whole.type_ids)

    def encode_with_offsets(
        self, text: str, *, max_tokens: int | None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, cut as by `encode_within` unless None, and the characters of each: (0, 0)
        of a special token.
        """
        encoding = self._encoding(text, add_special_tokens=False)
        if max_tokens is not None:
            encoding.truncate(max(max_tokens - self.tokenizer.num_special_tokens_to_add(False), 0))
        whole = self.tokenizer.post_process(encoding)
        return self._known(whole.ids), whole.offsets

    def _known(self, ids: list[int]) -> list[int]:
        """InputError for a token that the model has no embedding of: a batch of many callers would
        fail at it.
        """
        if ids and max(ids) >= self._vocabulary:
            token = self.tokenizer.id_to_token(max(ids))
            raise InputError(
                f"the text holds the token {token!r}, which the model does not know",
                expected=f"ids below {self._vocabulary}",
                got=str(max(ids)),
                fix="Leave it out, or export the bundle again with a base that knows it.",
            )
        return ids

    def _encoding(self, text: str, *, add_special_tokens: bool) -> Any:
        tokenizer, control = self.tokenizer, self._control
        try:
            if control is not None and control.in_text(text):
                tokenizer, text = self._apart, control.written_apart(text)
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
            raise InputError(
                "the text is not valid Unicode", expected="UTF-8 text", got=repr(text)[:60]
            ) from error

    @functools.cached_property
    def _apart(self) -> Any:
        """The tokenizer with its control tokens under other names."""
        from tokenizers import Tokenizer

        control = self._control or ControlTokens(())
        return Tokenizer.from_str(control.renamed(self.tokenizer.to_str()))

    def reading(self, prompt_format: Mapping[str, Any] | None) -> BundleTokenizer:
        """The tokenizer for an adapter's requests: control tokens that text spells are characters,
        unless it was trained otherwise (`data.control_tokens = "tokens"`).
        """
        if (prompt_format or {}).get("control_tokens") != "tokens":
            return self
        other = copy.copy(self)
        other._control = None
        return other

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.cleaned(self.with_spaces(ids))

    def with_spaces(self, ids: Sequence[int]) -> str:
        """`decode` before spaces are taken out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def cleaned(self, text: str) -> str:
        """Decoded text as transformers leaves it (`clean_up_tokenization_spaces`)."""
        for spaced, written in CLEAN_UP if self.cleans_up else ():
            text = text.replace(spaced, written)
        return text

    def token_text(self, token: int) -> str:
        """Text of one token, special ones too; bytes that are no whole character show as U+FFFD."""
        text: str = self.tokenizer.decode([token], skip_special_tokens=False)
        return text

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation through the bundle's chat template (it writes its own special
        tokens).
        """
        text = self.chat_of(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        return self.encode(text, add_special_tokens=False)

    def chat_of(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Rendered:
        """A conversation as the bundle's chat template writes it; control tokens that a message
        spells are none.
        """
        template = self.chat_template if tools is None else self.tool_template
        if template is None:
            raise InputError(
                "this bundle has no chat template", fix="Give a plain prompt instead of messages."
            )
        control = self._control
        made = chat_text(
            template,
            messages if control is None else control.marked(list(messages)),
            special_tokens=self.special_tokens,
            add_generation_prompt=add_generation_prompt,
            tools=tools if control is None or tools is None else control.marked(list(tools)),
        )
        return without_marks(made)

    def encode_prompt(self, prompt: str, prompt_format: dict[str, Any] | None = None) -> list[int]:
        """Ids of a finished prompt: as a user turn of the chat template, or plain; as the adapter
        was trained.

        Without a recorded format: chat when the bundle has a template, else plain.
        """
        if self.template_of(prompt_format) == "chat":
            return self.encode_chat(
                chat_messages(prompt, system=(prompt_format or {}).get("system"))
            )
        return self.encode(prompt)

    def template_of(self, prompt_format: dict[str, Any] | None) -> str:
        """`chat` or `plain`: as recorded, else by whether the bundle has a chat template."""
        recorded = (prompt_format or {}).get("template")
        return recorded or ("chat" if self.chat_template is not None else "plain")


class Detokenizer:
    """Ids in, text out, in pieces that join to `decode(ids)`; a character spread over tokens waits
    for its end.

    Decodes from a short window of earlier ids, because a token's text can depend on the ones before
    it (the method of text-generation-inference and vLLM: prefix and read offsets).
    """

    def __init__(self, tokenizer: BundleTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._prefix = 0  # the window decodes from here
        self._read = 0  # ids before here are emitted
        self._held = ""  # may lose a space yet
        self._sent = ""  # what of the ids after `_read` is already out

    def add(self, token: int) -> str:
        """Text that is certain after one more token; may be empty."""
        self._ids.append(token)
        pending = self._pending()
        certain = pending.rstrip(REPLACEMENT)
        piece = certain[len(self._sent) :]
        if certain == pending and pending:  # after nothing but skipped tokens the window stays
            self._prefix, self._read, self._sent = self._read, len(self._ids), ""
        else:
            self._sent = certain if len(certain) > len(self._sent) else self._sent
        return self._cleaned(piece)

    def flush(self) -> str:
        """What is left at the end: a character that never got its last bytes shows as U+FFFD, as in
        `decode`.
        """
        piece = self._pending()[len(self._sent) :]
        self._prefix, self._read, self._sent = self._read, len(self._ids), ""
        last, self._held = self._held + piece, ""
        return self._tokenizer.cleaned(last)

    def _cleaned(self, piece: str) -> str:
        """A piece without the spaces that `decode` takes out; an end that may become one of these
        waits.
        """
        if not self._tokenizer.cleans_up:
            return piece
        text = self._held + piece
        space = text.find(" ", max(0, len(text) - LONGEST + 1))
        cut = len(text) if space < 0 else space
        self._held = text[cut:]
        return self._tokenizer.cleaned(text[:cut])

    def _pending(self) -> str:
        known = self._tokenizer.with_spaces(self._ids[self._prefix : self._read])
        return self._tokenizer.with_spaces(self._ids[self._prefix :])[len(known) :]


def _read(root: Path, name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return (root / name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BundleError(
            f"the chat template cannot be read: {error}", where=str(root / name)
        ) from error


def _content(token: Any) -> Any:
    """A special token's text: transformers saves it as a string or as an AddedToken object."""
    if isinstance(token, dict):
        return token.get("content")
    if isinstance(token, list):
        return [_content(one) for one in token]
    return token
