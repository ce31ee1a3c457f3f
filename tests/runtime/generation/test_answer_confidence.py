"""How sure an answer is: the model's own probability of its tokens, as the adapter was
calibrated; the same whole, streamed, in a batch, from a scheduler and over HTTP.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_helpers import decoder_bundle, write_metadata
from server_helpers import Running, serve
from training_helpers import write_rows

from edgetune.core.errors import AdapterError
from edgetune.data.rows import read_rows
from edgetune.evaluation.answers import BundleAnswers
from edgetune.evaluation.measures import measure_rows
from edgetune.models.resolve import resolve_base
from edgetune.runtime import Runtime

CALIBRATED = {"kind": "generation", "slope": 0.25, "intercept": 1.0, "rows": 40}
SCHEMA = {"enum": ["yes", "no"]}


def base_of(folder: Path) -> dict[str, str]:
    return {"name": str(folder), "digest": resolve_base(str(folder)).digest}


@pytest.fixture(scope="module")
def server(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With the adapter a, and the same calibrated as "sure"."""
    bundle, folder = decoder_bundle(tiny_decoder), tmp_path_factory.mktemp("more")
    shutil.copytree(bundle / "adapters" / "a", folder / "sure")
    write_metadata(
        folder / "sure",
        base=base_of(tiny_decoder),
        prompt_format={
            "template": "plain",
            "prompt": "{{ prompt }}",
            "completion": "{{ completion }}",
        },
        confidence=CALIBRATED,
    )
    with serve(bundle) as running:
        running.runtime.load_adapter("sure", folder / "sure")
        yield running


def test_the_score_is_the_sum_of_the_tokens_log_probabilities(server: Running) -> None:
    ask = {"max_new_tokens": 90, "confidence": True, "logprobs": 0, "schema": SCHEMA}
    free, sure = server.runtime.generate(["hello"] * 2, adapters=["a", "sure"], **ask)
    score = sum(token.logprob for token in free.logprobs or ())
    assert free.finish_reason == "stop" and free.confidence == pytest.approx(math.exp(score))
    assert sure.confidence == pytest.approx(1 / (1 + math.exp(-(0.25 * score + 1.0))))
    (plain,) = server.runtime.generate(["hello"], "sure", max_new_tokens=3)
    assert plain.confidence is None


def test_an_answer_that_was_cut_off_is_not_right(server: Running) -> None:
    ask = {"max_new_tokens": 2, "logit_bias": {"2": -100}, "confidence": True}
    assert server.runtime.generate(["hello"], "sure", **ask)[0].confidence == 0.0


def test_it_is_the_same_streamed_and_over_http(server: Running) -> None:
    ask = {"max_new_tokens": 90, "confidence": True, "schema": SCHEMA}
    (whole,) = server.runtime.generate(["hello"], "sure", **ask)
    stream = server.runtime.stream("hello", "sure", **ask)
    assert "".join(stream) == whole.text and stream.completion is not None
    assert stream.completion.confidence == pytest.approx(whole.confidence, abs=1e-5)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    body = {"model": "sure", "prompt": "hello", "max_tokens": 90, "confidence": True}
    body["response_format"] = form
    (choice,) = server.post("/v1/completions", body).json()["choices"]
    assert choice["confidence"] == pytest.approx(whole.confidence, abs=1e-5)
    events = server.post("/v1/completions", {**body, "stream": True}).text.split("\n\n")
    last = json.loads(events[-3].removeprefix("data: "))["choices"][0]
    assert last["confidence"] == choice["confidence"]
    chat = {**body, "messages": [{"role": "user", "content": "hello"}]}
    del chat["prompt"]
    assert 0 < server.post("/v1/chat/completions", chat).json()["choices"][0]["confidence"] < 1
    items = {"model": "sure", "input": "hello", "confidence": True, "max_output_tokens": 90}
    items["text"] = {"format": {"type": "json_schema", **form["json_schema"]}}
    assert 0 < server.post("/v1/responses", items).json()["confidence"] < 1


def test_eval_says_how_sure_the_wrong_answers_are(server: Running, tmp_path: Path) -> None:
    rows = [{"prompt": text, "completion": "never"} for text in ("hello", "a longer question", "x")]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    found = measure_rows(BundleAnswers(server.runtime, "sure"), tmp_path, read_rows(file))
    ask = {"temperature": 0.0, "confidence": True}
    made = server.runtime.generate([row["prompt"] for row in rows], "sure", **ask)
    assert [one["score"] for one in found.errors] == sorted(
        (one.confidence for one in made), reverse=True
    )
    mean = sum(one.confidence or 0.0 for one in made) / 3  # of which none is right
    assert found.metrics["expected_calibration_error"] == pytest.approx(mean)
    assert found.analysis["coverage"][-1]["right"] == 0.0


def test_a_calibration_that_is_none_is_refused(tiny_decoder: Path, tmp_path: Path) -> None:
    bundle = decoder_bundle(tiny_decoder)
    shutil.copytree(bundle / "adapters" / "a", tmp_path / "x")
    wrong = {"kind": "generation", "slope": "steep", "intercept": 0}
    write_metadata(tmp_path / "x", base=base_of(tiny_decoder), confidence=wrong)
    with (
        Runtime.open(bundle, threads=1) as runtime,
        pytest.raises(AdapterError, match=r"confidence\.slope: expected a number, got 'steep'"),
    ):
        runtime.load_adapter("x", tmp_path / "x")
