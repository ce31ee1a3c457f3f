"""An answer of a given form has that form whatever the model would rather say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_helpers import decoder_bundle, write_metadata

from edgetune.core.errors import InputError
from edgetune.models.resolve import resolve_base
from edgetune.runtime import Runtime
from edgetune.runtime.generation.settings import GenerationSettings, settings_from
from edgetune.runtime.generation.structured import PackageMissing, constraint_of

SCHEMA = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["lights", "card"]},
        "level": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["intent", "level"],
    "additionalProperties": False,
}


def answers(runtime: Runtime, **settings: Any) -> list[Any]:
    return runtime.generate(["hello"] * 6, temperature=1.5, seed=3, max_new_tokens=120, **settings)


def fits(text: str) -> bool:
    value = json.loads(text)
    return (
        set(value) == {"intent", "level"}
        and value["intent"] in ("lights", "card")
        and 0 <= value["level"] <= 9
    )


def test_a_json_schema_is_kept_by_every_sample(runtime: Runtime) -> None:
    for given in ({"schema": SCHEMA}, {"schema": json.dumps(SCHEMA)}):
        done = answers(runtime, **given)
        assert all(fits(c.text) for c in done)
        assert {c.finish_reason for c in done} == {"stop"}


def test_openais_response_format_is_understood(runtime: Runtime) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA},
    }
    assert fits(answers(runtime, response_format=form)[0].text)
    empty = runtime.generate(
        ["x"], response_format={"type": "json_object"}, logit_bias={"0": 0}, max_new_tokens=200
    )[0]
    if empty.finish_reason == "stop":
        assert isinstance(json.loads(empty.text), dict)
    with pytest.raises(InputError, match="unknown response_format"):
        runtime.settings(None, response_format={"type": "xml"})


def test_a_regular_expression_is_kept(runtime: Runtime) -> None:
    pattern = r"[a-f]{3}-[0-9]{2}(ü|🙂)"
    for completion in answers(runtime, regex=pattern):
        assert re.fullmatch(pattern, completion.text)


def test_a_grammar_is_kept(runtime: Runtime) -> None:
    grammar = 'start: "(" (start | NUMBER) ")"\nNUMBER: /[0-9]{1,2}/'
    found = [c for c in answers(runtime, grammar=grammar) if c.finish_reason == "stop"]
    assert found
    for completion in found:
        assert re.fullmatch(r"\(+\d{1,2}\)+", completion.text)
        assert completion.text.count("(") == completion.text.count(")")


def test_greedy_answers_take_the_likeliest_token_that_is_allowed(runtime: Runtime) -> None:
    ids = runtime.prompt_ids("hello")
    logits = runtime.decoder.logits([ids])[0][-1]  # type: ignore[union-attr]
    allowed = [
        token for token in range(352) if re.fullmatch("[0-9]", runtime.tokenizer.token_text(token))
    ]
    done = runtime.generate(["hello"], regex="[0-9]")[0]
    assert done.text == runtime.tokenizer.token_text(allowed[int(np.argmax(logits[allowed]))])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"schema": "not json"}, "the schema of the answer: cannot be used"),
        ({"schema": {"type": "wat"}}, "the schema of the answer: cannot be used"),
        ({"regex": "(["}, r"the regex of the answer: cannot be used.*unclosed character class"),
        ({"grammar": "start: nothing"}, "the grammar of the answer: cannot be used"),
        (
            {"regex": "a", "schema": "{}"},
            (
                r"an answer has one form \(expected one of schema, regex, grammar, got schema and"
                r" regex"
            ),
        ),
    ],
)
def test_a_form_that_cannot_be_used_is_named_in_one_line(
    runtime: Runtime, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        runtime.generate(["hello"], **given)
    assert "\n" not in str(error.value)


def test_without_the_package_its_name_is_said(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    fresh = type(runtime.tokenizer)(runtime.folder, runtime.manifest)
    with pytest.raises(
        PackageMissing, match=r"needs the package llguidance\. Install edgetune\[structured\]"
    ):
        constraint_of(GenerationSettings(regex="a"), fresh, vocab_size=352)


def test_an_adapter_brings_its_own_schema(
    runtime: Runtime, tiny_decoder: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(decoder_bundle(tiny_decoder) / "adapters" / "a", tmp_path / "x")
    base = {"name": str(tiny_decoder), "digest": resolve_base(str(tiny_decoder)).digest}
    write_metadata(tmp_path / "x", base=base, generation={"schema": SCHEMA, "max_new_tokens": 100})
    runtime.load_adapter("x", tmp_path / "x")
    assert fits(runtime.generate(["hello"], "x")[0].text)
    assert fits("".join(runtime.stream("hello", "x")))
    free = runtime.settings("x", response_format={"type": "text"})
    assert (free.schema, free.max_new_tokens) == (None, 100)
    assert runtime.settings("x", regex="a").schema is None
    runtime.unload_adapter("x")


def test_rows_of_different_forms_share_a_batch(runtime: Runtime) -> None:
    from edgetune.runtime.scheduler.requests import FinishedEvent, GenerationRequest
    from edgetune.runtime.scheduler.scheduler import Scheduler

    done: dict[int, Any] = {}
    forms: list[dict[str, Any]] = [{"schema": SCHEMA}, {"regex": "[0-9]{4}"}, {}]
    with Scheduler(runtime) as scheduler:
        for i, form in enumerate(forms):
            settings = runtime.settings(None, max_new_tokens=100, **form)
            request = GenerationRequest(runtime.prompt_ids("hello"), None, settings)
            scheduler.submit(request, lambda event, i=i: done.update({i: event}))  # type: ignore[misc]
    assert all(isinstance(event, FinishedEvent) for event in done.values())
    assert fits(done[0].completion.text)
    assert re.fullmatch("[0-9]{4}", done[1].completion.text)
    assert done[2].completion.text == runtime.generate(["hello"], max_new_tokens=100)[0].text


def test_a_callers_form_replaces_the_adapters() -> None:
    defaults = {"schema": SCHEMA, "top_k": 3}
    assert settings_from(defaults, {}).schema == json.dumps(SCHEMA)
    chosen = settings_from(defaults, {"grammar": 'start: "a"'})
    assert (chosen.schema, chosen.grammar, chosen.top_k) == (None, 'start: "a"', 3)
