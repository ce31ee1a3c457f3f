"""Aliases over HTTP: answers, logs and metrics name the version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CommandLine
from runtime_helpers import decoder_bundle, encoder_bundle
from server_helpers import Running, serve


@pytest.fixture(scope="module")
def running(tiny_encoder: Path) -> Iterator[Running]:
    with serve(encoder_bundle(tiny_encoder)) as found:
        found.service.aliases.set("desk", {"intent": 3, "mood": 1})
        yield found


def ask(running: Running, model: str, **more: object) -> str:
    answer = running.post("/classify", {"model": model, "input": "hello", **more})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"])


def test_answers_say_which_version_answered_and_a_user_meets_the_same_one(
    running: Running,
) -> None:
    assert {ask(running, "desk") for _ in range(40)} == {"intent", "mood"}
    for user in ("ann", "ben", "cem"):
        assert len({ask(running, "desk", user=user) for _ in range(5)}) == 1
    assert ask(running, "mood") == "mood"


def test_metrics_count_each_version(running: Running) -> None:
    asked = [ask(running, "desk", user=str(at)) for at in range(20)]
    page = running.get("/metrics").text
    assert 'edgetune_alias_share{alias="desk",version="intent"} 0.75' in page
    counts = dict(
        re.findall(
            r'edgetune_version_requests_total{alias="desk",status="200",version="(.*)"} (.*)', page
        )
    )
    assert all(float(counts[name]) >= asked.count(name) for name in set(asked))


def test_an_alias_is_listed_and_its_versions_cannot_be_unloaded(
    running: Running, tmp_path: Path
) -> None:
    card = running.get("/v1/models/desk").json()
    assert (card["id"], card["versions"]) == ("desk", {"intent": 0.75, "mood": 0.25})
    running.service.options = running.service.options.__class__(adapter_folders=(tmp_path,))
    answer = running.post("/v1/unload_lora_adapter", {"lora_name": "mood"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_in_use")


def test_a_stream_names_the_version(tiny_decoder: Path) -> None:
    with serve(decoder_bundle(tiny_decoder)) as running:
        running.service.aliases.set("home", {"b": 1})
        asked = {"model": "home", "prompt": "hello", "max_tokens": 2, "stream": True}
        assert '"model":"b"' in running.post("/v1/completions", asked).text


@pytest.mark.parametrize("alias", ["home=nobody", "home", "base=a:1,nobody:1"])
def test_an_alias_of_what_is_not_there_is_one_line(
    tiny_decoder: Path, command_line: CommandLine, alias: str
) -> None:
    code, _, err = command_line(
        "serve", decoder_bundle(tiny_decoder), "--port", 0, "--alias", alias
    )
    assert (code, err.count("\n")) == (2, 1) and "alias" in err
