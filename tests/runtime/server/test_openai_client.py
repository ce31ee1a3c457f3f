"""`edgetune serve` seen by OpenAI's official client: the answers are the runtime's own, whole or
streamed.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
from runtime_helpers import decoder_bundle
from server_helpers import Running, in_background

from edgetune.runtime import Runtime
from edgetune.runtime.scheduler.scheduler import Scheduler
from edgetune.runtime.server.endpoints.models import model_cards
from edgetune.runtime.server.http.service import ServerOptions, Service

HELLO = [{"role": "user", "content": "hello"}]


def test_models_lists_the_base_and_its_adapters_with_their_parent(server: Running) -> None:
    found = {model.id: model.model_extra or {} for model in server.client().models.list()}
    assert list(found) == ["tiny", "a", "b"]
    assert {name: extra["parent"] for name, extra in found.items()} == {
        "tiny": None,
        "a": "tiny",
        "b": "tiny",
    }
    assert found["a"]["prompt_template"] == "plain"


def test_a_broken_folder_does_not_hide_the_other_models(tiny_decoder: Path, tmp_path: Path) -> None:
    bundle = decoder_bundle(tiny_decoder)
    for name, change in (("fine", {}), ("ranks", {"rank_pattern": ["q_proj"]}), ("form", {})):
        shutil.copytree(bundle / "adapters" / "a", tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "form" / "edgetune_adapter.json").write_text(
        '{"schema": 1, "prompt_format": "chat"}'
    )
    with Runtime.open(bundle, threads=1, adapter_folder=tmp_path) as runtime:
        service = Service(runtime, Scheduler(runtime), ServerOptions(model_name="tiny"))
        cards = {card["id"]: card for card in model_cards(service)}
        service.stop()
    assert list(cards) == ["tiny", "a", "b", "fine", "form", "ranks"]
    assert (cards["fine"]["rank"], "rank" in cards["ranks"], "rank" in cards["form"]) == (
        cards["a"]["rank"],
        False,
        False,
    )


def test_one_model_is_shown(server: Running) -> None:
    assert server.client().models.retrieve("b").model_extra["rank"] == 7  # type: ignore[index]


@pytest.mark.parametrize("model", ["tiny", "a", "b"])
def test_a_chat_answer_is_the_runtimes(server: Running, model: str) -> None:
    answer = server.client().chat.completions.create(model=model, messages=HELLO, max_tokens=8)  # type: ignore[arg-type]
    adapter = None if model == "tiny" else model
    (expected,) = server.runtime.generate([HELLO], adapter, max_new_tokens=8)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage and answer.usage.completion_tokens == expected.completion_tokens
    assert answer.usage.prompt_tokens == expected.prompt_tokens


def test_a_stream_joins_to_the_whole_answer_and_ends_with_its_usage(server: Running) -> None:
    client = server.client()
    whole = client.chat.completions.create(model="a", messages=HELLO, max_tokens=8)  # type: ignore[arg-type]
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="a", messages=HELLO, max_tokens=8, stream=True, stream_options=options
        )  # type: ignore[call-overload]
    )
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
        == whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_stream_is_events_of_json_and_ends_with_done(server: Running) -> None:
    answer = server.post(
        "/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 3, "stream": True}
    )
    events = answer.text.split("\n\n")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(
        json.loads(event.removeprefix("data: "))["object"] == "text_completion"
        for event in events[:-2]
    )


def test_a_submission_that_takes_long_holds_up_nobody(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, begun, go_on = server.service.scheduler, threading.Event(), threading.Event()
    submit = scheduler.submit

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(20)
        return submit(*arguments)

    monkeypatch.setattr(scheduler, "submit", slow)
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
    waiting = in_background(lambda: server.post("/v1/completions", body))
    try:
        assert begun.wait(20)
        assert server.get("/health").status_code == 200
    finally:
        go_on.set()
    assert waiting.result(20).status_code == 200


def test_a_name_that_has_no_utf8_is_not_found_either(server: Running) -> None:
    for path, asked in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": HELLO}),
    ):
        body = json.dumps({"model": "\ud800", **asked})
        answer = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_an_unknown_model_is_not_found(server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client().chat.completions.create(model="zz", messages=HELLO)  # type: ignore[arg-type]
    assert caught.value.code == "model_not_found"
