"""Completions and events of the scheduler → OpenAI's answer objects, whole or as chunks of a
stream.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgetune.runtime.generation.sampling import TokenLogprob
from edgetune.runtime.server.http.errors import ApiError
from edgetune.runtime.server.http.requests import Plan
from edgetune.runtime.server.http.tools import ToolParser
from edgetune.runtime.tasks.answers import Completion

FLOOR = -9999.0
"""JSON has no minus infinity; a banned token's log-probability is this, as in vLLM."""


class ChatAnswer:
    """`/v1/chat/completions`: messages and deltas."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, completion: Completion, top: int | None) -> dict[str, Any]:
        """One finished choice."""
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        logprobs = self.logprobs(completion.logprobs, top)
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice says who speaks."""
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def piece(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None, top: int | None
    ) -> dict[str, Any] | None:
        """More text; None when there is nothing to say yet."""
        return self._delta(index, {"content": text}, self.logprobs(logprobs, top), None)

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        """The last chunk of a choice says why it ended."""
        return self._delta(index, {}, None, reason)

    def logprobs(
        self, found: Sequence[TokenLogprob] | None, top: int | None
    ) -> dict[str, Any] | None:
        """Each token with its likeliest rivals."""
        if top is None or found is None:
            return None
        return {"content": token_logprobs(found, top), "refusal": None}

    @staticmethod
    def _delta(
        index: int, delta: Mapping[str, Any], logprobs: Any, reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


class ToolAnswer(ChatAnswer):
    """A chat in which the model may call tools: what it writes as calls becomes `tool_calls`."""

    def __init__(self) -> None:
        self._parsers: dict[int, ToolParser] = {}

    def choice(self, index: int, completion: Completion, top: int | None) -> dict[str, Any]:
        """One finished choice."""
        content, calls = ToolParser().add(completion.text, last=True)
        choice = super().choice(index, completion, top)
        if calls:
            told = {
                "role": "assistant",
                "content": content if content.strip() else None,
                "refusal": None,
                "tool_calls": _calls(calls),
            }
            choice |= {"message": told, "finish_reason": "tool_calls"}
        return choice

    def piece(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None, top: int | None
    ) -> dict[str, Any] | None:
        """Content at once, a call when it is whole."""
        parser = self._parsers.setdefault(index, ToolParser())
        delta = _tool_delta(parser, text)
        return (
            self._delta(index, delta, self.logprobs(logprobs, top), None)
            if delta or logprobs
            else None
        )

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        """What was held back, and why it ended."""
        parser = self._parsers.setdefault(index, ToolParser())
        delta = _tool_delta(parser, "", last=True)
        return self._delta(index, delta, None, "tool_calls" if parser.calls else reason)


class TextAnswer:
    """`/v1/completions`: bare text."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self) -> None:
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, completion: Completion, top: int | None) -> dict[str, Any]:
        """One finished choice."""
        logprobs = self.logprobs(index, completion.logprobs, top)
        return self._choice(index, completion.text, logprobs, completion.finish_reason)

    def opening(self, index: int) -> dict[str, Any] | None:
        """Bare text needs none."""
        return None

    def piece(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None, top: int | None
    ) -> dict[str, Any] | None:
        """More text."""
        return self._choice(index, text, self.logprobs(index, logprobs, top), None)

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        """The last chunk of a choice says why it ended."""
        return self._choice(index, "", None, reason)

    def logprobs(
        self, index: int, found: Sequence[TokenLogprob] | None, top: int | None
    ) -> dict[str, Any] | None:
        """Four lists side by side; offsets count characters of the tokens' texts since the choice's
        start.
        """
        if top is None or found is None:
            return None
        offsets, at = [], self._offsets.get(index, 0)
        for token in found:
            offsets.append(at)
            at += len(token.token)
        self._offsets[index] = at
        return {
            "tokens": [token.token for token in found],
            "token_logprobs": [_finite(token.logprob) for token in found],
            "top_logprobs": [
                {text: _finite(value) for _, text, value in t.top[:top]} for t in found
            ],
            "text_offset": offsets,
        }

    @staticmethod
    def _choice(index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


Answer = ChatAnswer | TextAnswer


class Envelope:
    """What all objects of one answer have in common."""

    end = b"data: [DONE]\n\n"
    """What a stream's last bytes are."""

    def __init__(self, answer: Answer, plan: Plan, request_id: str) -> None:
        self.answer, self.plan = answer, plan
        self._head = {
            "id": f"{answer.prefix}-{request_id}",
            "created": int(time.time()),
            "model": plan.model,
        }

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The answer in one piece."""
        top = self.plan.top_logprobs
        choices = [
            self.answer.choice(i, completion, top) | told_confidence(completion)
            for i, completion in enumerate(completions)
        ]
        return {
            **self._head,
            "object": self.answer.whole,
            "choices": choices,
            "system_fingerprint": None,
            **self._last(completions),
        }

    def begun(self, row: int) -> Iterator[dict[str, Any]]:
        """A choice is under way."""
        if (first := self.answer.opening(row)) is not None:
            yield self._part(first)

    def more(
        self, row: int, text: str, logprobs: Sequence[TokenLogprob] | None
    ) -> Iterator[dict[str, Any]]:
        """More text of a choice."""
        piece = self.answer.piece(row, text, logprobs, self.plan.top_logprobs)
        if piece is not None:
            yield self._part(piece)

    def ended(self, row: int, completion: Completion) -> Iterator[dict[str, Any]]:
        """A choice is over."""
        closing = self.answer.closing(row, completion.finish_reason)
        yield self._part(closing | told_confidence(completion))

    def last(self, completions: Sequence[Completion]) -> Iterator[dict[str, Any]]:
        """The chunk after the last choice's end, when it was asked for."""
        if self.plan.include_usage:
            yield {**self._part(None), **self._last(completions)}

    def failed(self, failure: ApiError) -> Iterator[dict[str, Any]]:
        """What a stream that had begun says last."""
        yield failure.body()

    @staticmethod
    def frame(part: Mapping[str, Any]) -> bytes:
        """A chunk as it is sent."""
        return b"data: " + json.dumps(part, separators=(",", ":")).encode() + b"\n\n"

    def _part(self, choice: Mapping[str, Any] | None) -> dict[str, Any]:
        """One chunk of a stream."""
        choices = [] if choice is None else [choice]
        usage: dict[str, Any] = {"usage": None} if self.plan.include_usage else {}
        return {**self._head, "object": self.answer.chunk, "choices": choices, **usage}

    def _last(self, completions: Sequence[Completion]) -> dict[str, Any]:
        made, read = sum(c.completion_tokens for c in completions), self.plan.prompt_tokens
        cached = min(sum(c.cached_tokens for c in completions), read)
        usage = {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return {"usage": usage, "timings": timings(completions)}


def told_confidence(completion: Completion) -> dict[str, float]:
    """How sure an answer is (ours, beside OpenAI's fields), where it was asked for."""
    sure = completion.confidence
    return {} if sure is None else {"confidence": round(sure, 6)}


def timings(completions: Sequence[Completion]) -> dict[str, float | None]:
    """Milliseconds (ours, beside OpenAI's fields): of the choice that began first, and the mean of
    a token.
    """
    if not completions:
        return {"queue_ms": None, "ttft_ms": None, "tpot_ms": None}
    first = min(completions, key=lambda c: c.ttft_ms)
    steady = [c.tpot_ms for c in completions if c.tpot_ms is not None]
    mean = round(sum(steady) / len(steady), 3) if steady else None
    return {
        "queue_ms": round(first.queue_ms, 3),
        "ttft_ms": round(first.ttft_ms, 3),
        "tpot_ms": mean,
    }


def _tool_delta(parser: ToolParser, text: str, *, last: bool = False) -> dict[str, Any]:
    first = parser.calls
    content, calls = parser.add(text, last=last)
    numbered = [{"index": first + i, **call} for i, call in enumerate(_calls(calls))]
    return ({"content": content} if content else {}) | (
        {"tool_calls": numbered} if numbered else {}
    )


def _calls(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": dict(call)}
        for call in calls
    ]


def token_logprobs(found: Sequence[TokenLogprob], top: int | None) -> list[dict[str, Any]]:
    """Each token with its `top` likeliest rivals; none where nobody asked."""
    if top is None:
        return []
    return [
        {
            **_token(t.token, t.logprob),
            "top_logprobs": [_token(text, value) for _, text, value in t.top[:top]],
        }
        for t in found
    ]


def _token(text: str, logprob: float) -> dict[str, Any]:
    whole = "\N{REPLACEMENT CHARACTER}" not in text
    return {
        "token": text,
        "logprob": _finite(logprob),
        "bytes": list(text.encode()) if whole else None,
    }


def _finite(logprob: float) -> float:
    return max(logprob, FLOOR)
