"""What a request may say, and the one clear 4xx it gets when it says something else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from runtime_helpers import decoder_bundle
from server_helpers import NEVER_EOS, Running, serve

from edgetune.runtime.server.http.requests import settings_of

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tiny_decoder: Path) -> Iterator[Running]:
    with serve(decoder_bundle(tiny_decoder), max_body_mb=0.01, max_prompt_tokens=200) as running:
        yield running


CHAT: dict[str, tuple[dict[str, Any], str, str]] = {
    "no messages": ({"messages": None}, "invalid_type", "messages"),
    "empty messages": ({"messages": []}, "array_below_min_length", "messages"),
    "an unknown role": (
        {"messages": [{"role": "bot", "content": "x"}]},
        "invalid_value",
        "messages[0].role",
    ),
    "a picture": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
            ]
        },
        "invalid_value",
        "messages[0].content[0].type",
    ),
    "a hot temperature": ({"temperature": 3}, "integer_above_max_value", "temperature"),
    "a temperature in words": ({"temperature": "hot"}, "invalid_type", "temperature"),
    "an empty stop": ({"stop": ""}, "string_below_min_length", "stop"),
    "a negative seed": ({"seed": -1}, "integer_below_min_value", "seed"),
    "tools without a template for them": (
        {"tools": [{"type": "function", "function": {"name": "x"}}]},
        "unsupported_parameter",
        "tools",
    ),
    "nothing said": ({"messages": [{"role": "user"}]}, "invalid_value", "messages"),
    "audio": ({"audio": {"voice": "x"}}, "unsupported_parameter", "audio"),
    "something unheard of": ({"wibble": 1}, "unknown_parameter", "wibble"),
    "stream options alone": (
        {"stream_options": {"include_usage": True}},
        "invalid_value",
        "stream_options",
    ),
    "rivals without logprobs": ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    "two limits": ({"max_tokens": 1, "max_completion_tokens": 2}, "invalid_value", "max_tokens"),
    "a bias for no token": ({"logit_bias": {"99999": 1}}, "invalid_value", "logit_bias"),
    "a bias for a word": ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    "a prompt too long": (
        {"messages": [{"role": "user", "content": "~" * 250}]},
        "context_length_exceeded",
        "messages",
    ),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, "", "messages"),
    "a boolean for a number": ({"max_tokens": True}, "invalid_type", "max_tokens"),
}


@pytest.mark.parametrize("name", CHAT)
def test_a_chat_request_that_does_not_fit_names_its_parameter(name: str, server: Running) -> None:
    change, code, param = CHAT[name]
    answer = server.http.post(
        "/v1/chat/completions",
        content=json.dumps({"model": "a", "messages": HELLO, **change}),
        headers={"Content-Type": "application/json"},
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"] or "", error["param"]) == (400, code, param)
    assert error["type"] == "invalid_request_error"


BODIES = {
    "nothing": (b"", 400, "invalid_json"),
    "half of it": (b'{"model": "a"', 400, "invalid_json"),
    "no UTF-8": (b'{"model": "\xff"}', 400, "invalid_json"),
    "not a number": (b'{"model": NaN}', 400, "invalid_json"),
    "a list": (b"[]", 400, "invalid_type"),
    "a pit": (b"[" * 9000, 400, "invalid_json"),
    "an enormous number": (b'{"model": ' + b"9" * 9000 + b"}", 400, "invalid_json"),
    "too much": (b'{"model": "' + b"x" * 20000 + b'"}', 413, "body_too_large"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request_is_refused(name: str, server: Running) -> None:
    body, status, code = BODIES[name]
    answer = server.http.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_body_of_unknown_length_is_measured_as_it_comes(server: Running) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    answer = server.http.post(
        "/v1/completions", content=endless(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/completions", 405), ("GET", "/v1/nothing", 404)]
)
def test_a_wrong_path_or_method_is_in_openais_form(
    method: str, path: str, status: int, server: Running
) -> None:
    answer = server.http.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, "unknown_url")


def test_a_prompt_may_be_tokens_or_several(server: Running) -> None:
    client, ids = server.client(), server.runtime.tokenizer.encode("hello")
    (text,) = client.completions.create(model="a", prompt="hello", max_tokens=4).choices
    (tokens,) = client.completions.create(model="a", prompt=ids, max_tokens=4).choices
    several = client.completions.create(model="a", prompt=["x", "hello"], max_tokens=4)
    assert text.text == tokens.text == several.choices[1].text
    assert several.usage and several.usage.prompt_tokens == len(ids) + len(
        server.runtime.tokenizer.encode("x")
    )


def test_a_token_outside_the_vocabulary_is_refused(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="not below 352"):
        server.client().completions.create(model="a", prompt=[352])


def test_what_is_not_given_comes_from_the_adapter(server: Running) -> None:
    answer = server.client().completions.create(
        model="a", prompt="hello", logit_bias={str(NEVER_EOS): -100}
    )
    assert answer.usage and answer.usage.completion_tokens == 9  # the adapter's own max_new_tokens


def test_the_same_seed_gives_the_same_texts_and_n_different_ones(server: Running) -> None:
    def sample() -> list[str]:
        answer = server.client().completions.create(
            model="a",
            prompt="hello",
            max_tokens=8,
            temperature=2,
            seed=7,
            n=3,
            logit_bias={str(NEVER_EOS): -100},
        )
        return [choice.text for choice in answer.choices]

    first = sample()
    assert first == sample()
    assert len(set(first)) == 3


def test_a_stop_text_ends_the_answer_before_it(server: Running) -> None:
    bias = {str(NEVER_EOS): -100}
    whole = (
        server.client()
        .completions.create(model="a", prompt="hello", max_tokens=8, logit_bias=bias)
        .choices[0]
        .text
    )
    stop = whole[len(whole) // 2 :][:2]
    answer = (
        server.client()
        .completions.create(model="a", prompt="hello", max_tokens=8, stop=stop, logit_bias=bias)
        .choices[0]
    )
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_chat_logprobs_name_the_chosen_token_and_its_rivals(server: Running) -> None:
    answer = server.client().chat.completions.create(
        model="a",
        messages=HELLO,
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,  # type: ignore[arg-type]
    )
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content and len(content) == answer.usage.completion_tokens  # type: ignore[union-attr]
    assert all(token.logprob == token.top_logprobs[0].logprob for token in content)  # greedy
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in content)


def test_completion_logprobs_are_the_same_whole_and_streamed(server: Running) -> None:
    body: dict[str, Any] = {"model": "a", "prompt": "hello", "max_tokens": 5, "logprobs": 1}
    whole = server.client().completions.create(**body).choices[0].logprobs
    streamed = [
        c.choices[0].logprobs for c in server.client().completions.create(**body, stream=True)
    ]
    assert whole and whole.tokens == [token for part in streamed if part for token in part.tokens]
    assert whole.text_offset == [at for part in streamed if part for at in part.text_offset]


def test_an_answer_keeps_to_its_json_schema(server: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    form = {
        "type": "json_schema",
        "json_schema": {"name": "switch", "schema": schema, "strict": True},
    }
    answer = server.client().chat.completions.create(
        model="a",
        messages=HELLO,
        max_tokens=60,
        response_format=form,  # type: ignore[arg-type]
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert list(value) == ["on"] and isinstance(value["on"], bool)


def test_plain_text_is_free_of_the_adapters_own_form(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(server.runtime.adapter("a").metadata, "generation", {"schema": "{}"})
    for form, schema in (({}, "{}"), ({"response_format": {"type": "text"}}, None)):
        assert settings_of(server.service, form, "a", None).schema == schema


def test_a_schema_that_is_none_is_refused(server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wibble"}}}
    answer = server.post(
        "/v1/chat/completions", {"model": "a", "messages": HELLO, "response_format": form}
    )
    assert answer.status_code == 400
