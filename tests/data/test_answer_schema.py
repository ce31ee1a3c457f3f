"""The schema that JSON answers have in common asks for what they all show, and for nothing that
they show by chance.
"""

from __future__ import annotations

import json
import random
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from edgetune.data.answer_schema import derive_schema, enumerated, key_order, outline


def derived(values: list[Any]) -> tuple[dict[str, Any], Any]:
    """The schema, which each of the values fits, and a validator of it."""
    schema = derive_schema(values)
    validator = jsonschema_rs.validator_for(schema)
    assert [value for value in values if not validator.is_valid(value)] == []
    return schema, validator


def home_actions(name: str) -> list[Any]:
    text = Path(str(resources.files("edgetune.quickstart.data").joinpath(name))).read_text()
    return [json.loads(json.loads(line)["action"]) for line in text.splitlines()]


def test_a_key_that_every_answer_has_is_required_and_no_other_may_stand_there() -> None:
    schema, validator = derived([{"on": True, "level": 3}, {"on": False}])
    assert schema == {
        "type": "object",
        "properties": {"on": {"type": "boolean"}, "level": {"type": "integer"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    assert not validator.is_valid({"on": True, "colour": "red"})


def test_whole_numbers_stay_whole_and_one_fraction_makes_numbers_of_all() -> None:
    schema, validator = derived([{"value": number} for number in (20, 40, 60)])
    assert schema["properties"]["value"] == {"type": "integer"}
    assert validator.is_valid({"value": 45}) and not validator.is_valid({"value": "45"})
    schema, _ = derived([{"value": number} for number in (20, 20.5)])
    assert schema["properties"]["value"] == {"type": "number"}
    assert derive_schema([1, 1.5, 2]) == {"type": "number"}


def test_null_lists_and_objects_inside_are_described_too() -> None:
    schema, validator = derived(
        [{"slots": [{"name": "room", "at": 3}]}, {"slots": []}, {"slots": None}]
    )
    slots, null = schema["properties"]["slots"]["anyOf"]
    assert slots["items"]["required"] == ["name", "at"] and null == {"type": "null"}
    assert not validator.is_valid({"slots": [{"name": "room"}]})
    assert derive_schema([[], []]) == {"type": "array", "maxItems": 0}


def test_a_text_is_of_a_list_where_it_repeats_few_values() -> None:
    assert enumerated(["on", "off", "on", "off", "on", "off"]) == ["on", "off"]
    assert enumerated(["on", "off", "on"]) is None, "too few rows to know all values"
    often = ["a"] * 60 + ["b"] * 60
    assert enumerated([*often, "c"]) == ["a", "b", "c"]
    assert enumerated([*often, "c", "d"]) is None, "1.6 % of the texts stand there once"
    assert enumerated([f"city {at % 300}" for at in range(3000)]) is None, "more than a list"


def test_keys_stand_in_the_order_of_most_answers() -> None:
    rows = [{"a": 1, "c": 2}, {"a": 1, "b": 2, "c": 3}, {"c": 1, "a": 2}, {"b": 1, "c": 2}]
    assert key_order(rows) == ["a", "b", "c"]
    assert list(derive_schema(rows)["properties"]) == ["a", "b", "c"]
    circle = [{"a": 1, "b": 1}, {"b": 1, "c": 1}, {"c": 1, "a": 1}]
    assert key_order(circle) == ["a", "b", "c"]


def test_keys_that_are_data_themselves_may_be_any() -> None:
    schema, validator = derived([{f"item {at}": at, f"item {at + 1}": 1} for at in range(60)])
    assert schema == {"type": "object", "additionalProperties": {"type": "integer"}}
    assert validator.is_valid({"never seen": 3})


def test_an_action_says_which_keys_follow_and_of_what_kind() -> None:
    schema, validator = derived(home_actions("home_train.jsonl"))
    assert len(schema["anyOf"]) == 5
    fits = {
        json.dumps(value): validator.is_valid(value)
        for value in (
            {"action": "dim", "room": "office", "value": 25},
            {"action": "dim", "value": "25"},
            {"action": "dim", "value": "jazz"},
            {"action": "dim", "device": "light"},
            {"action": "play", "value": "jazz"},
            {"action": "play", "value": 25},
            {"action": "lock", "device": "shed", "room": "office"},
            {"action": "turn_on"},
        )
    }
    assert list(fits.values()) == [True, False, False, False, True, False, False, False], fits
    assert all(map(validator.is_valid, home_actions("home_test.jsonl")))


def test_what_an_action_asks_of_few_rows_may_be_chance_and_is_not_asked() -> None:
    rows = [{"act": act, "room": "hall"} for act in ("on", "off", "on", "off", "on", "off")]
    del rows[0]["room"]
    schema, validator = derived(rows)
    assert "anyOf" not in schema and validator.is_valid({"act": "off"})


def test_an_intent_has_slots_of_its_own() -> None:
    rows = [{"intent": "play", "slots": {"artist": f"band {at}"}} for at in range(30)]
    rows += [{"intent": "timer", "slots": {"minutes": at}} for at in range(30)]
    _, validator = derived(rows)
    assert validator.is_valid({"intent": "timer", "slots": {"minutes": 90}})
    assert not validator.is_valid({"intent": "timer", "slots": {"artist": "band 1"}})


def test_kinds_of_value_are_told_apart_where_numbers_are_mixed() -> None:
    rows: list[Any] = [{"t": "a", "v": at} for at in range(40)]
    rows += [{"t": "b", "v": at + 0.5} for at in range(40)]
    rows += [{"t": "c", "v": f"w{at}"} for at in range(40)]
    _, validator = derived(rows)
    assert validator.is_valid({"t": "b", "v": 3}) and not validator.is_valid({"t": "a", "v": "w1"})


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_values_are_they_fit_the_schema_that_is_derived_of_them(seed: int) -> None:
    draw = random.Random(seed)

    def value(depth: int) -> Any:
        kind = draw.choice("oostniba" if depth < 3 else "stnib")
        if kind == "o":
            keys = draw.sample("abcd", draw.randint(0, 4))
            return {key: value(depth + 1) for key in keys}
        if kind == "a":
            return [value(depth + 1) for _ in range(draw.randint(0, 3))]
        leaves = {"s": draw.choice(["x", "y"]), "t": str(draw.random()), "n": None}
        return {**leaves, "i": draw.randint(-5, 5), "b": draw.random() < 0.5}[kind]

    derived([value(0) for _ in range(draw.choice([1, 5, 200]))])


def test_the_outline_names_keys_and_what_they_take() -> None:
    assert outline(derive_schema(home_actions("home_train.jsonl"))) == (
        "action (10 texts), device? (15 texts), room? (9 texts), value? (integer or 11 texts)"
    )
    assert outline(derive_schema([[1], [2]])) == "array"
    assert outline(derive_schema([{"on": None, "to": "a b"}])) == "on (null), to (text)"
