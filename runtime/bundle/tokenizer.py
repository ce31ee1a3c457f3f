"""Text ↔ token ids with `tokenizers` alone, and a streaming detokeniser that never emits half a
character.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetune.core.errors import BundleError, InputError
from edgetune.core.templates import Message, chat_messages, chat_text
from edgetune.core.text import Text, lengths_within, typed
from edgetune.runtime.bundle.manifest import Manifest

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
        self.eos_token_ids = frozenset(info.eos_token_ids)
        self.padding_id = info.pad_token_id
        """None where the tokenizer has none"""
        self.pad_token_id = info.pad_token_id if info.pad_token_id is not None else 0
        self.special_tokens = {name: _content(token) for name, token in info.special_tokens.items()}
        self._vocab_size = manifest.graph.vocab_size
        self.chat_template = None
        if info.chat_template is not None:
            template = root / info.chat_template
            try:
                self.chat_template = template.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise BundleError(
                    f"the chat template cannot be read: {error}", where=str(template)
                ) from error

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens (BOS, [CLS] … [SEP]) as the tokenizer's
        post-processor adds them.
        """
        encoding = self._encoding(text, add_special_tokens=add_special_tokens)
        self._need_known(encoding)
        ids: list[int] = encoding.ids
        return ids

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
        self._need_known(whole)
        return typed(whole.ids, whole.type_ids)

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
        self._need_known(whole)
        return whole.ids, whole.offsets

    def _need_known(self, encoding: Any) -> None:
        """InputError for a token beyond the model's embedding: one that was added to the tokenizer
        while the model was never resized.
        """
        if (highest := max(encoding.ids, default=0)) >= self._vocab_size:
            token = encoding.tokens[encoding.ids.index(highest)]
            raise InputError(
                f"the text holds the token {token!r}, which the model does not know",
                expected=f"ids below {self._vocab_size}",
                got=str(highest),
            )

    def _encoding(self, text: str, *, add_special_tokens: bool) -> Any:
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
            raise InputError(
                "the text is not valid Unicode", expected="UTF-8 text", got=repr(text)[:60]
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
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
    ) -> str:
        """A conversation as the bundle's chat template writes it."""
        if self.chat_template is None:
            raise InputError(
                "this bundle has no chat template", fix="Give a plain prompt instead of messages."
            )
        return chat_text(
            self.chat_template,
            messages,
            special_tokens=self.special_tokens,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
        )

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
        self._sent = ""  # what of the ids after `_read` is already out

    def add(self, token: int) -> str:
        """Text that is certain after one more token; may be empty."""
        self._ids.append(token)
        pending = self._pending()
        certain = pending.rstrip(REPLACEMENT)
        piece = certain[len(self._sent) :]
        if certain == pending:
            self._prefix, self._read, self._sent = self._read, len(self._ids), ""
        else:
            self._sent = certain if len(certain) > len(self._sent) else self._sent
        return piece

    def flush(self) -> str:
        """What is left at the end: a character that never got its last bytes shows as U+FFFD, as in
        `decode`.
        """
        piece = self._pending()[len(self._sent) :]
        self._prefix, self._read, self._sent = self._read, len(self._ids), ""
        return piece

    def _pending(self) -> str:
        known = self._tokenizer.decode(self._ids[self._prefix : self._read])
        return self._tokenizer.decode(self._ids[self._prefix :])[len(known) :]


def _content(token: Any) -> Any:
    """A special token's text: transformers saves it as a string or as an AddedToken object."""
    if isinstance(token, dict):
        return token.get("content")
    if isinstance(token, list):
        return [_content(one) for one in token]
    return token
