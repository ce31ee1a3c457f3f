"""A completion → the object of `/v1/responses`, whole or as its events, in OpenAI's order.

Whole answers take the way of streamed ones and leave the events out, so that both hold the same.
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
from edgetune.runtime.server.http.responses import (
    timings,
    token_logprobs,
    told_confidence,
)
from edgetune.runtime.server.http.tools import ToolParser
from edgetune.runtime.tasks.answers import Completion

SentPart = dict[str, Any]
UNFINISHED = {"length": "max_output_tokens"}
"""Why an answer ended → the reason for which it is incomplete."""


class ResponseEnvelope:
    """One response while it is made: its items so far, and the events that tell of them."""

    end = b""
    """What a stream's last bytes are; the last event says that it is over."""

    def __init__(self, plan: Plan, request_id: str, body: Mapping[str, Any]) -> None:
        self.plan, self._body, self._id = plan, body, request_id
        self._created, self._events = int(time.time()), 0
        self._output: list[dict[str, Any]] = []
        self._open = False  # whether the last item is a message that still grows
        self._parser = ToolParser() if plan.tools else None
        self._blank = ""  # of an answer with tools, what may be the space before a call

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The answer in one piece."""
        (completion,) = completions
        list(self._take(completion.text, completion.logprobs or ()))
        list(self._close(completion.finish_reason))
        return self._response(_status(completion), completion)

    def begun(self, row: int) -> Iterator[SentPart]:
        """The answer is under way."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress"))
        if self._parser is None:
            yield from self._open_message()

    def more(
        self, row: int, text: str, logprobs: Sequence[TokenLogprob] | None
    ) -> Iterator[SentPart]:
        """More text."""
        yield from self._take(text, logprobs or ())

    def ended(self, row: int, completion: Completion) -> Iterator[SentPart]:
        """The text is over."""
        yield from self._close(completion.finish_reason)

    def last(self, completions: Sequence[Completion]) -> Iterator[SentPart]:
        """The whole response once more."""
        status = _status(completions[0])
        yield self._event(f"response.{status}", response=self._response(status, completions[0]))

    def failed(self, failure: ApiError) -> Iterator[SentPart]:
        """What a stream that had begun ends with."""
        response = self._response("failed")
        response["error"] = {"code": failure.code or failure.kind, "message": failure.message}
        yield self._event("response.failed", response=response)

    @staticmethod
    def frame(part: Mapping[str, Any]) -> bytes:
        """An event as it is sent: under its name."""
        data = json.dumps(part, separators=(",", ":")).encode()
        return b"event: " + part["type"].encode() + b"\ndata: " + data + b"\n\n"

    def _take(self, text: str, logprobs: Sequence[TokenLogprob]) -> Iterator[SentPart]:
        if self._parser is None:
            yield from self._text(text, logprobs)
            return
        content, calls = self._parser.add(text)
        yield from self._spoken(content)
        yield from self._called(calls)

    def _close(self, reason: str) -> Iterator[SentPart]:
        if self._parser is not None:
            content, calls = self._parser.add("", last=True)
            yield from self._spoken(content)
            yield from self._called(calls)
        if not self._output:
            yield from self._open_message()
        yield from self._close_message("incomplete" if reason in UNFINISHED else "completed")

    def _spoken(self, content: str) -> Iterator[SentPart]:
        """Text beside calls: white space alone is none."""
        content = content if self._open else self._blank + content
        self._blank = "" if self._open or content.strip() else content
        if content and not self._blank:
            yield from self._text(content, ())

    def _text(self, text: str, logprobs: Sequence[TokenLogprob]) -> Iterator[SentPart]:
        if not self._open:
            yield from self._open_message()
        part = self._output[-1]["content"][0]
        part["text"] += text
        told = token_logprobs(logprobs, self.plan.top_logprobs)
        part["logprobs"] += told
        if text or told:
            yield self._of_text("response.output_text.delta", delta=text, logprobs=told)

    def _open_message(self) -> Iterator[SentPart]:
        if self._open:
            return
        self._open = True
        item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._output.append({**item, "status": "in_progress", "content": []})
        yield self._of_item("response.output_item.added")
        yield self._of_text("response.content_part.added", part=part)
        self._output[-1]["content"].append({**part, "logprobs": []})

    def _close_message(self, status: str) -> Iterator[SentPart]:
        if not self._open:
            return
        self._open = False
        part = self._output[-1]["content"][0]
        yield self._of_text(
            "response.output_text.done", text=part["text"], logprobs=part["logprobs"]
        )
        yield self._of_text("response.content_part.done", part=part)
        self._output[-1]["status"] = status
        yield self._of_item("response.output_item.done")

    def _called(self, calls: Sequence[Mapping[str, str]]) -> Iterator[SentPart]:
        for call in calls:
            yield from self._close_message("completed")
            item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call"}
            item |= {"call_id": f"call_{uuid.uuid4().hex[:24]}", "name": call["name"]}
            self._output.append({**item, "arguments": "", "status": "in_progress"})
            yield self._of_item("response.output_item.added")
            place = {"item_id": item["id"], "output_index": len(self._output) - 1}
            name, arguments = "response.function_call_arguments", call["arguments"]
            yield self._event(f"{name}.delta", **place, delta=arguments)
            yield self._event(f"{name}.done", **place, name=call["name"], arguments=arguments)
            self._output[-1] |= {"arguments": arguments, "status": "completed"}
            yield self._of_item("response.output_item.done")

    def _of_item(self, kind: str) -> SentPart:
        return self._event(kind, output_index=len(self._output) - 1, item=_copy(self._output[-1]))

    def _of_text(self, kind: str, **more: Any) -> SentPart:
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return self._event(kind, **place, content_index=0, **more)

    def _event(self, kind: str, **more: Any) -> SentPart:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **more}

    def _response(self, status: str, completion: Completion | None = None) -> dict[str, Any]:
        body, settings = self._body, self.plan.rows[0].settings
        ended = None if completion is None else UNFINISHED.get(completion.finish_reason)
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None if ended is None else {"reason": ended},
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "model": self.plan.model,
            "output": _copy(self._output),
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": settings.temperature,
            "text": {"format": (body.get("text") or {}).get("format") or {"type": "text"}},
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": body.get("tools", []),
            "top_logprobs": body.get("top_logprobs", 0),
            "top_p": settings.top_p,
            "truncation": "disabled",
            "usage": None if completion is None else self._usage(completion),
            "user": body.get("user"),
            "metadata": body.get("metadata", {}),
            **({} if completion is None else {"timings": timings([completion])}),
            **({} if completion is None else told_confidence(completion)),
        }

    def _usage(self, completion: Completion) -> dict[str, Any]:
        read, made = self.plan.prompt_tokens, completion.completion_tokens
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": min(completion.cached_tokens, read)},
            "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + made,
        }


def _status(completion: Completion) -> str:
    return "incomplete" if completion.finish_reason in UNFINISHED else "completed"


def _copy(value: Any) -> Any:
    """An event shows an item as it is now; it grows further."""
    return json.loads(json.dumps(value))
