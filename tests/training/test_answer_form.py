"""`[generation]` and the answers that are learned: a schema that is derived of them, or that they
must fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from seq2seq_helpers import make_seq2seq
from training_helpers import action_rows, recipe, sft_recipe, silent, write_rows

from edgetune.core.errors import DataError, EdgetuneError, RecipeError
from edgetune.recipe.schema import Generation, Recipe
from edgetune.runtime.generation.structured import FormCheck
from edgetune.training import run_recipe
from edgetune.training.inputs import read_inputs

Make = Callable[..., Recipe]


@pytest.fixture
def make(tiny_decoder: Path, tmp_path: Path) -> Make:
    """A recipe over rows with these answers, bound by `schema`."""

    def made(answers: list[str], schema: Any = "auto", method: str = "sft") -> Recipe:
        rows = [{"prompt": f"row {at}", "completion": text} for at, text in enumerate(answers)]
        path = write_rows(tmp_path / "rows.jsonl", rows)
        if schema != "auto":
            (tmp_path / "form.json").write_text(json.dumps(schema))
            schema = str(tmp_path / "form.json")
        found = recipe(tiny_decoder, method, path, None)
        return replace(found, generation=Generation(schema=schema))

    return made


def derived(made: Recipe) -> tuple[dict[str, Any], list[str]]:
    inputs = read_inputs(made)
    return dict(inputs.answer_schema or {}), inputs.sets[-1].notes.get("answers", [])


def test_the_derived_schema_goes_with_the_adapter(tiny_decoder: Path, tmp_path: Path) -> None:
    made = replace(sft_recipe(tiny_decoder, tmp_path), generation=Generation(schema="auto"))
    run_recipe(made, out=tmp_path / "run", progress=silent())
    metadata = json.loads((tmp_path / "run" / "adapter" / "edgetune_adapter.json").read_text())
    schema = metadata["generation"]["schema"]
    assert list(schema["properties"]) == ["intent", "room"]
    form = FormCheck("schema", json.dumps(schema))
    assert [form.departure(row["completion"]) for row in action_rows()] == [None] * 12
    assert form.departure('{"intent": "lights", "room": "cellar"}') is not None
    assert 'schema = "auto"' in (tmp_path / "run" / "recipe.toml").read_text()
    said = json.loads((tmp_path / "run" / "summary.json").read_text())["data"][0]["taken_for"]
    assert said["answers"] == [
        "held to a JSON schema of their own: intent (lights|heat|music), room (4 texts)"
    ]


def test_answers_keep_the_white_space_that_all_training_answers_have(make: Make) -> None:
    tight, spaced, mixed = '{"a":1,"b":2}', '{"a": 1, "b": 2}', '{"a": 1,"b": 2}'
    for answers, fitting in (
        ([tight, tight], [tight]),
        ([spaced, spaced], [spaced]),
        ([tight, spaced], [tight, spaced, mixed]),
    ):
        form = FormCheck("schema", json.dumps(derived(make(answers))[0]))
        assert [t for t in (tight, spaced, mixed) if form.departure(t) is None] == fitting


def test_keys_in_another_order_and_validation_answers_that_do_not_fit_are_said(
    make: Make, tmp_path: Path
) -> None:
    made = make(['{"a": 1, "b": 2}', '{"a": 1, "b": 3}', '{"b": 2, "a": 1}', ' {"a": 1, "b": 2}'])
    dev = write_rows(tmp_path / "dev.jsonl", [{"prompt": "p", "completion": '{"a": "x", "b": 1}'}])
    stage = made.stage[0]
    made = replace(made, stage=(replace(stage, data=replace(stage.data, validation=str(dev))),))
    schema, notes = derived(made)
    assert list(schema["properties"]) == ["a", "b"]
    assert notes[1:] == [
        f"1 of 4 have their keys in another order than most (the first: {tmp_path}/rows.jsonl,"
        " line 3); the schema keeps the order of most",
        "1 of 4 have white space around the JSON, which is left out",
        f'1 of 1 validation answers do not fit it (the first: {dev}, line 1, at "x", "b": 1}})',
    ]


def test_every_answer_of_a_conversation_counts(tiny_decoder: Path, tmp_path: Path) -> None:
    turns = [("user", "q"), ("assistant", '{"a": 1}'), ("user", "q"), ("assistant", '{"a": null}')]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    path = write_rows(tmp_path / "chats.jsonl", rows)
    made = replace(recipe(tiny_decoder, "sft", path, None), generation=Generation(schema="auto"))
    assert derived(made)[0]["properties"]["a"] == {"anyOf": [{"type": "integer"}, {"type": "null"}]}


def test_a_schema_file_that_the_answers_fit_is_taken_as_it_is(make: Make) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert derived(make(['{"a": 1}', '{"a": 2, "b": 1}'], schema)) == ({}, [])


NUMBER = {
    "type": "object",
    "properties": {"to": {"type": "integer"}, "at": {"enum": ["home", "work"]}},
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("answers", "schema", "message"),
    [
        (
            ['{"to": 1}', "to 1"],
            "auto",
            r"rows\.jsonl, line 2: the answer is no JSON \(Expecting value.*expected a JSON value"
            r" and nothing else, got to 1\)",
        ),
        (['{"to": NaN}'], "auto", r"line 1: the answer is no JSON \(NaN is no JSON\)"),
        (['{"to": 1, "to": 2}'], "auto", r"line 1: .*\(it has the key 'to' twice\)"),
        (["[" * 40 + "]" * 40], "auto", r"line 1: .*\(it has more than 32 levels\)"),
        (
            ['{"to": "caf\\u00e9"}'],
            "auto",
            r"line 1: the answer is not of the form of the JSON .*ensure_ascii=False",
        ),
        (
            ['{"to": 1}', '{"to": "one", "at": "home"}'],
            NUMBER,
            r"rows\.jsonl, line 2: the answer is not of the form of generation\.schema \(1 of 2\)"
            r' \(expected - 0-9 after \{"to": , got "one", "at": "home"\}\)',
        ),
        (
            ['{"at": "home", "to": 1}', '{"at": "work", "to": 1}'],
            NUMBER,
            r"line 1: .*\(no training answer fits it\) \(expected",
        ),
    ],
)
def test_answers_that_do_not_fit_are_named_by_their_row(
    make: Make, answers: list[str], schema: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        read_inputs(make(answers, schema))
    assert "\n" not in str(error.value)


def test_auto_needs_answers_to_derive_a_schema_from(tiny_decoder: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "text.jsonl", [{"text": "some words " * 20}] * 3)
    made = recipe(tiny_decoder, "causal-lm", path, None)
    with pytest.raises(RecipeError, match=r'schema = "auto" .* answers of an sft stage'):
        read_inputs(replace(made, generation=Generation(schema="auto")))


def test_auto_does_not_fit_an_encoder_decoder(tmp_path: Path) -> None:
    tiny_seq2seq = make_seq2seq("t5", tmp_path / "base")
    made = replace(sft_recipe(tiny_seq2seq, tmp_path), generation=Generation(schema="auto"))
    with pytest.raises(EdgetuneError, match="does not fit an encoder-decoder"):
        read_inputs(made)
