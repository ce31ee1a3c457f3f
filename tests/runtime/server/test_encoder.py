"""`/classify` and `/v1/embeddings`: the runtime's own numbers in vLLM's and OpenAI's shapes."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from head_helpers import bundle as head_bundle
from runtime_helpers import encoder_bundle
from server_helpers import Running, serve

TEXTS = ["turn on the lights", "my card", "x"]


@pytest.fixture(scope="module")
def server(tiny_encoder: Path) -> Iterator[Running]:
    with serve(encoder_bundle(tiny_encoder)) as running:
        yield running


@pytest.mark.parametrize("model", ["intent", "mood"])
def test_every_labels_probability_is_in_the_answer(server: Running, model: str) -> None:
    answer = server.post("/classify", {"model": model, "input": TEXTS}).json()
    expected = server.runtime.classify(TEXTS, model)
    assert [row["label"] for row in answer["data"]] == [found.label for found in expected]
    for row, found in zip(answer["data"], expected, strict=True):
        np.testing.assert_allclose(row["probs"], list(found.scores.values()), atol=1e-5)
        assert row["num_classes"] == len(found.scores)
    assert answer["usage"]["total_tokens"] == sum(
        len(server.runtime.text_ids(text, model)) for text in TEXTS
    )


def test_a_request_may_set_a_threshold_of_its_own(server: Running) -> None:
    body = {"model": "mood", "input": "hello", "threshold": 1}
    (row,) = server.post("/classify", body).json()["data"]
    (found,) = server.runtime.classify(["hello"], "mood")
    assert (row["label"], row["rejected"]) == (None, found.label)
    assert row["score"] == pytest.approx(found.score, abs=1e-5)
    (row,) = server.post("/classify", {**body, "threshold": 0}).json()["data"]
    assert row["label"] == found.label and "rejected" not in row
    refused = server.post("/classify", {**body, "threshold": 1.5})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "threshold")


def test_one_text_is_a_list_of_one(server: Running) -> None:
    answer = server.post("/classify", {"model": "mood", "input": "hello"}).json()
    assert (answer["object"], [row["index"] for row in answer["data"]]) == ("list", [0])


@pytest.mark.parametrize("model", ["tiny", "intent"])
def test_embeddings_are_the_runtimes_as_numbers_and_as_bytes(server: Running, model: str) -> None:
    client, adapter = server.client(), None if model == "tiny" else model
    expected = server.runtime.embed(TEXTS, adapter)
    for form in ("float", "base64"):
        answer = client.embeddings.create(model=model, input=TEXTS, encoding_format=form)  # type: ignore[arg-type]
        found = [row.embedding for row in answer.data]
        found = [
            np.frombuffer(base64.b64decode(v), "<f4") if isinstance(v, str) else v for v in found
        ]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_long_text_is_cut_only_when_asked(server: Running) -> None:
    body = {"model": "intent", "input": "lights " * 200}
    refused = server.post("/classify", body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (
        400,
        "context_length_exceeded",
    )
    assert "truncate_prompt_tokens" in refused.json()["error"]["message"]
    assert (
        server.post("/classify", {**body, "truncate_prompt_tokens": -1}).json()["usage"][
            "prompt_tokens"
        ]
        == 16
    )


@pytest.mark.parametrize(
    ("path", "model"), [("/classify", "intent"), ("/v1/embeddings", "intent"), ("/tag", "rooms")]
)
def test_the_servers_own_limit_holds_for_every_text(
    path: str, model: str, heads: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        heads.service, "options", replace(heads.service.options, max_prompt_tokens=4)
    )
    refused = heads.post(
        path, {"model": model, "input": ["on", "turn on the lights in every room of the house"]}
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (
        400,
        "context_length_exceeded",
    )
    assert "at most 4" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/classify", {"model": "tiny", "input": "x"}, "no_labels"),
        ("/classify", {"model": "intent", "input": []}, "array_below_min_length"),
        ("/classify", {"model": "intent", "input": [1]}, "invalid_type"),
        (
            "/v1/embeddings",
            {"model": "tiny", "input": "x", "dimensions": 3},
            "unsupported_parameter",
        ),
        ("/v1/completions", {"model": "intent", "prompt": "x"}, "wrong_task"),
    ],
)
def test_what_does_not_fit_is_refused(
    path: str, body: dict[str, object], code: str, server: Running
) -> None:
    answer = server.post(path, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_an_unknown_model_is_not_found(server: Running) -> None:
    assert server.post("/classify", {"model": "zz", "input": "x"}).status_code == 404


@pytest.fixture(scope="module")
def heads(tiny_encoder: Path) -> Iterator[Running]:
    with serve(head_bundle(tiny_encoder)) as running:
        yield running


def test_words_are_tagged_with_their_places_and_entities(heads: Running) -> None:
    rows = ["Turn on the lights in the kitchen!", ["the", "kitchen", "!"]]
    for row in rows:
        answer = heads.post(
            "/tag", {"model": "rooms", "input": row if isinstance(row, str) else [row]}
        ).json()
        (expected,) = heads.runtime.tag([row], "rooms")
        (found,) = answer["data"]
        assert found["text"] == expected.text
        assert [(w["word"], w["tag"], w["start"], w["end"]) for w in found["words"]] == [
            (w.word, w.tag, w.start, w.end) for w in expected.words
        ]
        assert [(e["type"], e["text"]) for e in found["entities"]] == [
            (e.type, e.text) for e in expected.entities
        ]
        assert answer["usage"]["prompt_tokens"] > 2


def test_several_labels_and_numbers_have_fields_of_their_own(heads: Running) -> None:
    (several,) = heads.post("/classify", {"model": "topics", "input": "lights"}).json()["data"]
    (number,) = heads.post("/classify", {"model": "warmth", "input": "lights"}).json()["data"]
    assert several["labels"] == list(heads.runtime.classify(["lights"], "topics")[0].labels or ())
    assert number["value"] == pytest.approx(
        heads.runtime.classify(["lights"], "warmth")[0].value, abs=1e-5
    )


@pytest.mark.parametrize(
    ("path", "model", "code"), [("/tag", "intent", "no_tags"), ("/classify", "rooms", "no_labels")]
)
def test_a_tagger_and_a_classifier_are_not_confused(
    path: str, model: str, code: str, heads: Running
) -> None:
    answer = heads.post(path, {"model": model, "input": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
