"""The example script that swaps slot values: every row it makes is consistent."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
augment_slots = pytest.importorskip("augment_slots")


def row(text: str, intent: str, **slots: str) -> dict[str, object]:
    found = [
        {"slot": n, "value": v, "start": text.index(v), "end": text.index(v) + len(v)}
        for n, v in slots.items()
    ]
    return {
        "text": text,
        "intent": intent,
        "slots": found,
        "json": augment_slots.target(intent, found),
    }


ROWS = [
    row("play Ten Years by Sam Sparro", "PlayMusic", track="Ten Years", artist="Sam Sparro"),
    row("Annie Herring please", "PlayMusic", artist="Annie Herring"),
    row("rain in Rome?", "GetWeather", city="Rome"),
    row("play something", "PlayMusic"),
]


def test_every_made_row_holds_its_values_where_it_says() -> None:
    made = augment_slots.augment(ROWS, 20, seed=0)
    assert made[:4] == ROWS and len(made) == 4 + 3 * 20
    for each in made:
        for slot in each["slots"]:
            assert each["text"][slot["start"] : slot["end"]] == slot["value"]
        assert json.loads(each["json"]) == {
            "intent": each["intent"],
            **{s["slot"]: s["value"] for s in each["slots"]},
        }


def test_values_are_swapped_within_slot_and_intent() -> None:
    made = augment_slots.augment(ROWS, 20, seed=0)
    assert {r["text"] for r in made if r["intent"] == "GetWeather"} == {"rain in Rome?"}
    assert "play Ten Years by Annie Herring" in {r["text"] for r in made}


def test_a_slot_that_occurs_twice_holds_a_list() -> None:
    slots = [{"slot": "name", "value": value} for value in ("a", "b", "c")]
    assert json.loads(augment_slots.target("X", slots)) == {"intent": "X", "name": ["a", "b", "c"]}
