"""A conversation with a decoder bundle that goes on: its turns, who answers, and what still fits
the context.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from edgetune.core.errors import InputError
from edgetune.core.templates import Message
from edgetune.runtime.tasks.answers import Completion
from edgetune.runtime.tasks.runtime import Runtime


class ChatSession:
    """One conversation. Where the adapter, or a base without chat template, reads plain prompts,
    every question stands alone (`alone`).
    """

    def __init__(
        self,
        runtime: Runtime,
        adapter: str | None = None,
        *,
        system: str | None = None,
        **settings: Any,
    ) -> None:
        if not runtime.manifest.is_decoder:
            raise InputError(
                "this bundle classifies and embeds; it holds no conversation",
                where=str(runtime.folder),
                expected="a decoder's bundle",
                fix="Ask it with edgetune predict.",
            )
        self.runtime, self.system = runtime, system
        self.turns: list[Message] = []
        self.settings: dict[str, Any] = {}
        self.adapter: str | None = None
        self.left_out = 0
        """turns that no longer fit the context"""
        self.completion: Completion | None = None
        """of the last answer; None where it was stopped"""
        self.choose(adapter)
        self.set(**settings)

    @property
    def alone(self) -> bool:
        """Whether a question is asked without the turns before it."""
        chosen = self.runtime.chosen(self.adapter)
        form = None if chosen is None else self.runtime.adapter(chosen).prompt_format
        return self.runtime.tokenizer.template_of(form) == "plain"

    def choose(self, adapter: str | None) -> None:
        """Have this adapter answer from now on, or (None) the base; the conversation stays."""
        self.runtime.need_text(adapter)
        self.runtime.settings(adapter, **self.settings)
        self.adapter = adapter

    def set(self, **settings: Any) -> None:
        """Generation settings from now on; None takes one back. InputError changes nothing."""
        wanted = {k: v for k, v in {**self.settings, **settings}.items() if v is not None}
        self.runtime.settings(self.adapter, **(dict.fromkeys(settings) | wanted))
        self.settings = wanted

    def reset(self) -> None:
        """Forget what was said."""
        self.turns, self.left_out = [], 0

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer in pieces; what was said of it is kept, also when it is stopped. InputError
        where the question alone is too long.
        """
        prompt = text if self.alone else self._fitting(text)
        stream = self.runtime.stream(prompt, self.adapter, **self.settings)
        said = ""
        try:
            for piece in stream:
                said += piece
                yield piece
        finally:
            stream.close()
            self.completion = stream.completion
            if not self.alone:
                self.turns.append({"role": "user", "content": text})
                self.turns.append({"role": "assistant", "content": said})

    def _fitting(self, text: str) -> list[Message]:
        """The conversation up to this question without its oldest turns, so that half of the
        context, or all that an answer may take, is left.
        """
        context = self.runtime.manifest.graph.max_length
        answer = self.runtime.settings(self.adapter, **self.settings).max_new_tokens
        room = context - min(answer, context // 2)
        first: list[Message] = []
        if self.system:
            first = [{"role": "system", "content": self.system}]
        while True:
            messages = [*first, *self.turns, {"role": "user", "content": text}]
            try:
                fits = len(self.runtime.prompt_ids(messages, self.adapter)) <= room
            except InputError as error:
                if not self.turns or "longer than" not in error.what:
                    raise
                fits = False
            if fits or not self.turns:
                return messages
            self.turns = self.turns[2:]
            self.left_out += 2
