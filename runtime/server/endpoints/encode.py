"""`/classify`, `/score` and `/pooling` (vLLM's shapes), `/tag` (ours) and `/v1/embeddings`
(OpenAI's).
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from edgetune.core.errors import InputError
from edgetune.core.tasks import CLASSIFICATION, REWARD, VALUE
from edgetune.runtime.server.http.asked import read_asked
from edgetune.runtime.server.http.bodies import CLASSIFY, EMBEDDINGS, POOLING, SCORE, TAG
from edgetune.runtime.server.http.errors import bad_request, deadline_exceeded
from edgetune.runtime.server.http.exchange import unless_gone
from edgetune.runtime.server.http.json_body import Schema
from edgetune.runtime.server.http.logs import note, request_id_of
from edgetune.runtime.server.http.requests import plain_message
from edgetune.runtime.server.http.service import Service
from edgetune.runtime.tasks.answers import Classification
from edgetune.runtime.tasks.runtime import Runtime
from edgetune.runtime.tasks.scoring import Answered, AnswerReader, prompt_and_answer
from edgetune.runtime.tasks.tagging import read_words

T = TypeVar("T")


async def classify(request: Request) -> Response:
    """POST /classify: the probability of every label, in the order of the adapter's labels.

    Beside vLLM's fields: `score` of the likeliest label, and where that is below the threshold
    `label` null and `rejected`; `labels` of an adapter for several labels, `value` of one for
    numbers.
    """
    call = await _read(request, CLASSIFY)
    runtime, scheduler = call.service.runtime, call.service.scheduler
    if await call.service.in_thread(runtime.task, call.adapter) != "sequence-classification":
        message = (
            f"The model '{call.model}' does not classify texts; name an adapter with labels for"
            " texts."
        )
        raise bad_request(message, param="model", code="no_labels")
    call.inputs = [tuple(one) if isinstance(one, list) else one for one in call.inputs]
    await call.count(lambda text: len(runtime.text_ids(text, call.adapter, **call.how)))
    work = await call.service.in_thread(
        lambda: scheduler.classify(
            call.inputs, call.adapter, threshold=call.body.get("threshold"), **call.how
        )
    )
    found = await in_time(request, call, work)
    return call.answer("classify", [{"index": i, **_classified(c)} for i, c in enumerate(found)])


async def tag(request: Request) -> Response:
    """POST /tag: every word with its tag and its place in the text, and the entities that the tags
    mark (ours).
    """
    call = await _read(request, TAG)
    runtime, scheduler = call.service.runtime, call.service.scheduler
    if await call.service.in_thread(runtime.task, call.adapter) != "token-classification":
        message = f"The model '{call.model}' tags no words; name an adapter that does."
        raise bad_request(message, param="model", code="no_tags")
    await call.count(lambda row: len(read_words(runtime.opened, row, call.adapter, **call.how).ids))
    work = await call.service.in_thread(
        lambda: scheduler.tag(call.inputs, call.adapter, **call.how)
    )
    found = await in_time(request, call, work)
    data = [
        {
            "index": i,
            "text": row.text,
            "words": [asdict(word) for word in row.words],
            "entities": [asdict(span) for span in row.entities],
        }
        for i, row in enumerate(found)
    ]
    return call.answer("tag", data)


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: pooled states of length 1, as numbers or as base64 of little-endian
    float32.
    """
    call = await _read(request, EMBEDDINGS)
    runtime, scheduler = call.service.runtime, call.service.scheduler
    await call.count(lambda text: len(runtime.text_ids(text, call.adapter, **call.how)))
    work = await call.service.in_thread(
        lambda: scheduler.embed(call.inputs, call.adapter, **call.how)
    )
    vectors = await in_time(request, call, work)
    packed = call.body.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _base64(row) if packed else row.tolist()}
        for i, row in enumerate(vectors)
    ]
    return call.answer("embd", data)


@dataclass
class Call:
    """A checked request to an encoder."""

    service: Service
    scope: Scope
    body: dict[str, Any]
    adapter: str | None
    inputs: list[Any]
    tokens: int = 0

    @property
    def model(self) -> str:
        """The name that was asked for."""
        return str(self.body["model"])

    @property
    def truncate(self) -> bool:
        """Whether texts that are too long are cut."""
        return self.body.get("truncate_prompt_tokens") == -1

    @property
    def how(self) -> dict[str, Any]:
        """How the texts are read."""
        return {"truncate": self.truncate, "control_tokens": self.body.get("control_tokens")}

    async def count(self, length: Callable[[Any], int], *, param: str = "input") -> None:
        """Every input's tokens, before the first is computed. ApiError, which names `param`, when
        one is too long, for the model or for this server, or no text."""
        longest = self.service.options.max_prompt_tokens

        def bounded(one: Any) -> int:
            tokens = length(one)
            if longest is not None and tokens > longest:
                message = f"The text has {tokens} tokens, but this server takes at most {longest}."
                raise bad_request(message, param=param, code="context_length_exceeded")
            return tokens

        try:
            self.tokens = await self.service.in_thread(lambda: sum(map(bounded, self.inputs)))
        except InputError as error:
            long = "longer" in error.what
            plain = InputError(error.what, expected=error.expected, got=error.got)
            fix = (
                " Set 'truncate_prompt_tokens' to -1 to cut it."
                if long and not self.truncate
                else ""
            )
            code = "context_length_exceeded" if long else None
            raise bad_request(f"{plain}.{fix}", param=param, code=code) from error
        note(self.scope, rows=len(self.inputs), prompt_tokens=self.tokens)

    def answer(self, kind: str, data: list[dict[str, Any]]) -> Response:
        """A list of results in the shape that OpenAI and vLLM share."""
        head = {
            "id": f"{kind}-{request_id_of(self.scope)}",
            "object": "list",
            "created": int(time.time()),
        }
        usage = {"prompt_tokens": self.tokens, "completion_tokens": 0, "total_tokens": self.tokens}
        return JSONResponse({**head, "model": self.model, "data": data, "usage": usage})


async def _read(request: Request, schema: Schema) -> Call:
    service, body = await read_asked(request, schema)
    adapter = service.adapter_of(body["model"])
    if service.runtime.manifest.is_decoder:
        task = await service.in_thread(service.runtime.task, adapter)
        if schema is not CLASSIFY or task != CLASSIFICATION:
            what = (
                "This bundle generates text and embeds nothing; name an adapter that classifies."
                if schema is CLASSIFY
                else "This bundle generates text; it neither tags nor embeds."
            )
            raise bad_request(what, param="model", code="wrong_task")
    inputs = [body["input"]] if isinstance(body["input"], str) else body["input"]
    return Call(service, request.scope, body, adapter, inputs)


def _classified(found: Classification) -> dict[str, Any]:
    own = {
        "label": found.label,
        "score": found.score,
        "probs": list(found.scores.values()),
        "num_classes": len(found.scores),
    }
    if found.rejected is not None:
        own["rejected"] = found.rejected
    several = {} if found.labels is None else {"labels": list(found.labels)}
    return {**own, **several, **({} if found.value is None else {"value": found.value})}


async def in_time(request: Request, call: Call, work: Future[T]) -> T:
    """The scheduler's answer, unless the deadline or the client's patience ends first."""
    deadline = call.service.deadline(call.body.get("deadline_s"))
    seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
    try:
        return await unless_gone(
            request.receive, asyncio.wait_for(asyncio.wrap_future(work), seconds)
        )
    except asyncio.TimeoutError:
        raise deadline_exceeded("The deadline passed before the answer was there.") from None
    finally:
        work.cancel()  # texts that still wait in the queue are dropped


def _base64(row: Any) -> str:
    return base64.b64encode(np.asarray(row, "<f4").tobytes()).decode()


SCORE_REQUEST_TOKENS = 65536
"""Tokens of one request's texts, prompts counted with every answer: what is more has to be asked
for in several.
"""


async def score(request: Request) -> Response:
    """POST /score: the reward of each answer `text_2` to its prompt `text_1`, or of several answers
    to one prompt; on an encoder the number that an adapter for pairs of texts gives."""
    call, found = await _scores(request, SCORE, _pairs)
    return call.answer(
        "score", [{"index": i, "object": "score", "score": value} for i, value in enumerate(found)]
    )


async def pooling(request: Request) -> Response:
    """POST /pooling: the reward of a conversation's last answer, or of texts as they stand, as
    vectors of one number.
    """
    call, found = await _scores(request, POOLING, _whole)
    return call.answer(
        "pool",
        [{"index": i, "object": "pooling", "data": [value]} for i, value in enumerate(found)],
    )


async def _scores(request: Request, schema: Schema, answers_of: Any) -> tuple[Call, list[float]]:
    service, body = await read_asked(request, schema)
    call = Call(service, request.scope, body, service.adapter_of(body["model"]), [])
    runtime, scheduler = service.runtime, service.scheduler
    kind = await service.in_thread(_kind, runtime, call.adapter)
    if kind is None or (kind == VALUE and schema is not SCORE):
        message = f"The model '{call.model}' gives no scores; name a reward adapter."
        raise bad_request(message, param="model", code="no_scores")
    call.inputs = answers_of(body)
    param = "text_2" if schema is SCORE else "messages" if "messages" in body else "input"
    if kind == VALUE:
        pairs = _Counted(lambda pair: runtime.text_ids(pair, call.adapter, **call.how))
        await call.count(pairs.read, param=param)
        values = await service.in_thread(
            lambda: scheduler.classify(call.inputs, call.adapter, **call.how)
        )
        return call, [float(found.value or 0.0) for found in await in_time(request, call, values)]
    limit = min(scheduler.context, service.options.max_prompt_tokens or scheduler.context)
    reader = await service.in_thread(
        lambda: AnswerReader(runtime.opened, runtime.chosen(call.adapter), limit=limit, **call.how)
    )
    answers = _Counted(reader.ids)
    await call.count(answers.read, param=param)
    return call, await in_time(
        request, call, await service.in_thread(scheduler.score_ids, answers.ids, call.adapter)
    )


class _Counted:
    """Reads a request's texts into token ids, which are kept, and stops where they are too many for
    one request.
    """

    def __init__(self, ids_of: Callable[[Any], list[int]]) -> None:
        self._ids_of, self._left = ids_of, SCORE_REQUEST_TOKENS
        self.ids: list[list[int]] = []

    def read(self, one: Any) -> int:
        """One text's tokens. InputError where there are too many of them."""
        ids = self._ids_of(one)
        if len(ids) > self._left and self.ids:  # one text alone is bounded by the context
            more = f"more, with text {len(self.ids) + 1}"
            raise InputError(
                "the texts of one request have too many tokens",
                expected=f"at most {SCORE_REQUEST_TOKENS} in all",
                got=more,
            )
        self._left -= len(ids)
        self.ids.append(ids)
        return len(ids)


def _kind(runtime: Runtime, adapter: str | None) -> str | None:
    """What scores: a reward adapter, or one that gives two texts a number; None for any other."""
    if runtime.task(adapter) == REWARD:
        return REWARD
    chosen = runtime.chosen(adapter)
    packed = None if chosen is None else runtime.adapter(chosen)
    return (
        VALUE
        if packed is not None and packed.reads_pairs and packed.problem == "regression"
        else None
    )


def _pairs(body: Mapping[str, Any]) -> list[Answered]:
    prompts, answers = _listed(body["text_1"]), _listed(body["text_2"])
    if len(prompts) == 1:
        prompts = prompts * len(answers)
    if len(prompts) != len(answers):
        message = (
            f"'text_2' must have as many texts as 'text_1': expected {len(prompts)}, got"
            f" {len(answers)}."
        )
        raise bad_request(message, param="text_2", code="invalid_value")
    return list(zip(prompts, answers, strict=True))


def _whole(body: Mapping[str, Any]) -> list[Answered]:
    texts, messages = body.get("input"), body.get("messages")
    if (texts is None) == (messages is None):
        raise bad_request(
            "Give either 'messages' or 'input'.", param="messages", code="invalid_value"
        )
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
