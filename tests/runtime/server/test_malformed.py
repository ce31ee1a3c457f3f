"""Whatever a request holds, it is answered or refused: no endpoint says 5xx, and every refusal is
an error in OpenAI's form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from head_helpers import bundle as head_bundle
from runtime_helpers import decoder_bundle
from server_helpers import Running, serve

from edgetune.runtime.server.app import ROUTES
from edgetune.runtime.server.http import bodies
from edgetune.runtime.server.http.responses_request import RESPONSES

BODIES = {**bodies.BODIES, "ResponseRequest": RESPONSES}
HELLO = [{"role": "user", "content": "hello"}]
# What each endpoint takes, and its table of properties.
FINE: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/chat/completions": ("ChatRequest", {"messages": HELLO, "max_tokens": 1}),
    "/v1/completions": ("CompletionRequest", {"prompt": "hello", "max_tokens": 1}),
    "/v1/responses": ("ResponseRequest", {"input": "hello", "max_output_tokens": 1}),
    "/v1/embeddings": ("EmbeddingRequest", {"input": "hello"}),
    "/classify": ("ClassifyRequest", {"input": "hello"}),
    "/tag": ("TagRequest", {"input": "hello"}),
    "/score": ("ScoreRequest", {"text_1": "hello", "text_2": "you"}),
    "/pooling": ("PoolingRequest", {"messages": HELLO}),
    "/v1/load_lora_adapter": ("LoadAdapterRequest", {"lora_name": "new", "lora_path": "new"}),
    "/v1/unload_lora_adapter": ("UnloadAdapterRequest", {"lora_name": "nobody"}),
}
# As they stand in the body: JSON that Python's own writer would not write.
VALUES = [
    *("null", "true", "0", "-1", "1.5", "1e400", "-1e400", "1e-400", "1" * 40, "9" * 5000, "NaN"),
    *('""', '" "', '"x"', '"\\ud800"', '"\\u0000"', '"../../etc"', json.dumps("x" * 3000)),
    *("[]", "[null]", "[[]]", "[1e400]", '[""]', '["\\ud800"]', "[" * 300 + "]" * 300, "[{}]"),
    *("{}", '{"": null}', '{"a": 1e400}', '{"type": "x"}', '{"a":' * 300 + "1" + "}" * 300),
    *("[-1]", "[2147483647]", "[true]", "[[1, 2], [3]]", '{"1": 100, "2": "x"}', "Infinity"),
]
SCHEMAS = [
    *("{}", '{"type": 3}', '{"$ref": "#"}', '{"$ref": "http://x"}', '{"enum": []}', '{"x": 1e400}'),
    *('{"type": "string", "pattern": "(?=a)"}', '{"type": "string", "pattern": "("}'),
    *('{"minItems": 1e30, "type": "array"}', '{"type": "integer", "minimum": 1e400}', '{"not": 1}'),
    *('{"allOf": 3}', '{"properties": []}', '{"\\ud800": 1}', '{"const": "\\ud800"}'),
    '{"type": "string", "maxLength": 99999999999}',
]
FORMATS = [
    f'{{"type": "json_schema", "json_schema": {{"name": "x", "schema": {schema}}}}}'
    for schema in SCHEMAS
]
TOOLS = [
    f'[{{"type": "function", "function": {{"name": "x", "parameters": {schema}}}}}]'
    for schema in SCHEMAS
]
SHAPES = {
    "response_format": FORMATS,
    "tools": TOOLS,
    "guided_regex": ['"("', '"(?=a)"', '"a{1000000}"', '"(a*)*b"', '"\\\\"', '"[z-a]"'],
    "guided_grammar": ['"start:"', '"x"', '"start: start"', '"start: \\"a\\" | "', '"%ignore"'],
    "messages": [
        '[{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function":'
        ' {"name": "x", "arguments": "{"}}]}]',
        '[{"role": "tool", "content": "x"}]',
        '[{"role": "system", "content": "x"}]',
        '[{"role": "user", "content": [{"type": "text", "text": "\\ud800"}]}]',
        '[{"role": "user", "content": "x", "name": 3}]',
    ],
    "prompt": ["[[]]", "[5, 99999]", '["a", 5]', '["", "a"]', "[[5], [true]]"],
    "input": ['[["a"]]', '[["a", "b"]]', '[["a", "b", "c"]]', '["a", ["b"]]', '[[""]]'],
    "logit_bias": ['{"5": 100}', '{"05": 1}', '{"٣": 1}', '{"-1": 1}', '{"5": 1e400}'],
}
BODIES_OF_ALL_KINDS = [
    *(b"", b" ", b"null", b"[]", b"3", b'"x"', b"{", b"{}", b'{"model": "a"', b"\xff\xfe{}"),
    *(b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b"\0" * 10),
    *(b'{"model": "a", "model": 3}', b"{'model': 'a'}", b'{"model": "a",}', b"a=b&c=d"),
]


@pytest.fixture(scope="module", params=["decoder", "encoder"])
def server(
    request: pytest.FixtureRequest,
    tiny_decoder: Path,
    tiny_encoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    is_decoder = request.param == "decoder"
    bundle = decoder_bundle(tiny_decoder) if is_decoder else head_bundle(tiny_encoder)
    folder = tmp_path_factory.mktemp("allowed")
    (folder / "empty").mkdir()
    with serve(bundle, adapter_folders=(folder,)) as running:
        yield running


def refused(answer: httpx.Response, what: str) -> None:
    """Not 5xx; and what is no success says why."""
    assert answer.status_code < 500, f"{answer.status_code} for {what[:300]}: {answer.text[:300]}"
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"] and len(error["message"]) < 3000, what[:300]


def posted(server: Running, path: str, body: str | bytes, kind: str = "application/json") -> None:
    content = body if isinstance(body, bytes) else body.encode()
    headers = [(b"content-type", kind.encode("latin-1"))]
    answer = server.http.post(path, content=content, headers=headers)
    refused(answer, f"{path} {body!r}")


def own_properties(name: str) -> list[str]:
    """The properties of a table, without those that the one of chat has just so."""
    chat = BODIES["ChatRequest"]["properties"] if name != "ChatRequest" else {}
    return [key for key, one in BODIES[name]["properties"].items() if chat.get(key) is not one]


def with_value(fine: dict[str, Any], key: str, value: str) -> str:
    """A body with `value`, as it stands, under `key`."""
    rest = json.dumps({name: one for name, one in fine.items() if name != key})
    return f"{rest[:-1]}, {json.dumps(key)}: {value}}}" if rest != "{}" else f'{{"{key}": {value}}}'


def test_every_endpoint_that_takes_a_body_is_tried() -> None:
    assert set(FINE) == {path for path, (method, _) in ROUTES.items() if method == "POST"}
    assert {name for name, _ in FINE.values()} == set(BODIES)


@pytest.mark.parametrize("path", FINE)
def test_no_value_of_any_property_is_an_error_of_the_servers(path: str, server: Running) -> None:
    name, fine = FINE[path]
    generates = "messages" in fine or "prompt" in fine
    values = VALUES if generates is server.runtime.manifest.is_decoder else VALUES[::5]
    models = [name for name in ("a", "intent", "rooms") if server.runtime.registry.knows(name)]
    for model in models[:1] if path.startswith("/v1") else models:
        body = {"model": model, **fine} if "model" in BODIES[name]["properties"] else fine
        for key in [*own_properties(name), "wibble", "\ud800"]:
            for value in [*values, *SHAPES.get(key, ())]:
                posted(server, path, with_value(body, key, value))
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize("path", ROUTES)
def test_no_body_of_any_kind_is_an_error_of_the_servers(path: str, server: Running) -> None:
    for body in BODIES_OF_ALL_KINDS:
        posted(server, path, body)
    for kind in ("text/plain", "", "application/x-www-form-urlencoded", "application/json; x=\xe9"):
        posted(server, path, b'{"model": "a"}', kind)
    for method in ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"):
        answer = server.http.request(method, path.replace("{model:path}", "%ff/../x%00"))
        assert answer.status_code < 500
