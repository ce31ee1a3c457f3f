"""`/score` and `/pooling` (vLLM's shapes): what a reward adapter thinks of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edgetune.errors import InputError
from edgetune.runtime.answers import VALUE
from edgetune.runtime.manifest import REWARD
from edgetune.runtime.runtime import Runtime
from edgetune.runtime.scoring import Answered, AnswerReader, prompt_and_answer
from edgetune.runtime.server.encoder_api import Call, in_time
from edgetune.runtime.server.errors import bad_request
from edgetune.runtime.server.logs import note
from edgetune.runtime.server.reading import read_json
from edgetune.runtime.server.sampling import plain_message
from edgetune.runtime.server.schema import Schema
from edgetune.runtime.server.service import Service
from edgetune.runtime.server.tables import POOLING, SCORE

SCORE_REQUEST_TOKENS = 65536
"""Tokens of one request's texts, prompts counted with every answer: what is more has to be asked for in several."""


async def score(request: Request) -> Response:
    """POST /score: the reward of each answer `text_2` to its prompt `text_1`, or of several answers to one prompt; on an
    encoder the number that an adapter for pairs of texts gives."""
    call, found = await _scores(request, SCORE, _pairs)
    return call.answer("score", [{"index": i, "object": "score", "score": value} for i, value in enumerate(found)])


async def pooling(request: Request) -> Response:
    """POST /pooling: the reward of a conversation's last answer, or of texts as they stand, as vectors of one number."""
    call, found = await _scores(request, POOLING, _whole)
    return call.answer("pool", [{"index": i, "object": "pooling", "data": [value]} for i, value in enumerate(found)])


async def _scores(request: Request, schema: Schema, answers_of: Any) -> tuple[Call, list[float]]:
    service: Service = request.app.state.service
    service.check_open()
    body = await read_json(request, schema, limit_mb=service.options.max_body_mb)
    note(request.scope, model=body["model"], user=body.get("user"))
    call = Call(service, request.scope, body, service.adapter_of(body["model"]), [])
    runtime, scheduler = service.runtime, service.scheduler
    kind = await service.in_thread(_kind, runtime, call.adapter)
    if kind is None or (kind == VALUE and schema is not SCORE):
        message = f"The model '{call.model}' gives no scores; name a reward adapter."
        raise bad_request(message, param="model", code="no_scores")
    call.inputs = answers_of(body)
    param = "text_2" if schema is SCORE else "messages" if "messages" in body else "input"
    if kind == VALUE:
        pairs = _Counted(lambda pair: runtime.text_ids(pair, call.adapter, truncate=call.truncate))
        await call.count(pairs.read, param=param)
        values = await service.in_thread(lambda: scheduler.classify(call.inputs, call.adapter, truncate=call.truncate))
        return call, [float(found.value or 0.0) for found in await in_time(request, call, values)]
    limit = min(scheduler.context, service.options.max_prompt_tokens or scheduler.context)
    reader = await service.in_thread(lambda: AnswerReader(runtime, runtime.chosen(call.adapter), truncate=call.truncate, limit=limit))
    answers = _Counted(reader.ids)
    await call.count(answers.read, param=param)
    return call, await in_time(request, call, await service.in_thread(scheduler.score_ids, answers.ids, call.adapter))


class _Counted:
    """Reads a request's texts into token ids, which are kept, and stops where they are too many for one request."""

    def __init__(self, ids_of: Callable[[Any], list[int]]) -> None:
        self._ids_of, self._left = ids_of, SCORE_REQUEST_TOKENS
        self.ids: list[list[int]] = []

    def read(self, one: Any) -> int:
        """One text's tokens. InputError where there are too many of them."""
        ids = self._ids_of(one)
        if len(ids) > self._left and self.ids:  # one text alone is bounded by the context
            more = f"more, with text {len(self.ids) + 1}"
            raise InputError("the texts of one request have too many tokens", expected=f"at most {SCORE_REQUEST_TOKENS} in all", got=more)
        self._left -= len(ids)
        self.ids.append(ids)
        return len(ids)


def _kind(runtime: Runtime, adapter: str | None) -> str | None:
    """What scores: a reward adapter, or one that gives two texts a number; None for any other."""
    if runtime.task(adapter) == REWARD:
        return REWARD
    chosen = runtime.chosen(adapter)
    packed = None if chosen is None else runtime.adapter(chosen)
    return VALUE if packed is not None and packed.reads_pairs and packed.problem == "regression" else None


def _pairs(body: Mapping[str, Any]) -> list[Answered]:
    prompts, answers = _listed(body["text_1"]), _listed(body["text_2"])
    if len(prompts) == 1:
        prompts = prompts * len(answers)
    if len(prompts) != len(answers):
        message = f"'text_2' must have as many texts as 'text_1': expected {len(prompts)}, got {len(answers)}."
        raise bad_request(message, param="text_2", code="invalid_value")
    return list(zip(prompts, answers, strict=True))


def _whole(body: Mapping[str, Any]) -> list[Answered]:
    texts, messages = body.get("input"), body.get("messages")
    if (texts is None) == (messages is None):
        raise bad_request("Give either 'messages' or 'input'.", param="messages", code="invalid_value")
    if messages is None:
        return list(_listed(texts))
    conversation = [plain_message(message) for message in messages]
    try:
        prompt_and_answer(conversation)
    except InputError as error:
        raise bad_request(f"{error}.", param="messages", code="invalid_value") from error
    return [conversation]


def _listed(texts: Any) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
