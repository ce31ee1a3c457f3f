"""Slot F1 and ROUGE-L, by hand."""

from __future__ import annotations

import json

import pytest

from edgetune.metrics.text import rouge_l, slot_f1


def answer(**slots: object) -> str:
    return json.dumps({"intent": "PlayMusic", **slots})


def test_slots_are_counted_over_all_rows() -> None:
    predictions = [answer(year="1959", service="Spotify"), answer(artist="Bach")]
    references = [[answer(year="1959", service="Iheart", genre="pop")], [answer(artist="Bach")]]
    assert slot_f1(predictions, references) == pytest.approx(
        2 * 2 / (3 + 4)
    )  # 2 hits of 3 found and 4 wanted


def test_the_intent_is_no_slot_and_the_order_is_free() -> None:
    assert slot_f1(['{"room": "hall", "intent": "lights"}'], [[answer(room="hall")]]) == 1.0
    assert slot_f1([answer()], [[answer()]]) == 1.0  # no slots at all


def test_lists_and_objects_inside_are_paths() -> None:
    reference = '{"items": [{"name": "tea", "count": 2}, {"name": "cake", "count": 1}]}'
    assert (
        slot_f1(
            ['{"items": [{"name": "cake", "count": 1}, {"name": "tea", "count": 2}]}'],
            [[reference]],
        )
        == 1.0
    )
    assert slot_f1(['{"items": [{"name": "tea", "count": 2}]}'], [[reference]]) == pytest.approx(
        2 * 2 / (2 + 4)
    )
    assert slot_f1(['{"count": 2}'], [['{"count": "2"}']]) == 0.0  # a number is no string


def test_what_is_no_json_misses_every_slot() -> None:
    assert slot_f1(["sure, here you are", "[1"], [[answer(a="1")], [answer(b="2")]]) == 0.0


def test_the_nearest_reference_counts() -> None:
    assert slot_f1([answer(a="1")], [[answer(a="1", b="2"), answer(a="1")]]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # the quick brown jumps the: 5 words of 9 and 8
        (
            "The quick brown fox jumps over the lazy dog",
            "The quick brown dog jumps on the log.",
            2 * 5 / (9 + 8),
        ),
        (
            "police killed the gunman",
            "police kill the gunman",
            3 / 4,
        ),  # Lin 2004, section 3.1: S2 is 3/4
        ("the gunman kill police", "police kill the gunman", 2 / 4),  # and S3 is 2/4
        ("Hello, WORLD!", "hello world", 1.0),
        ("café", "caf", 1.0),  # letters beyond a-z part words, as in rouge_score
        ("", "something", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(
    prediction: str, reference: str, expected: float
) -> None:
    assert rouge_l([prediction], [[reference]]) == pytest.approx(expected)


def test_the_best_reference_counts_and_rows_are_averaged() -> None:
    assert rouge_l(["a b", "x"], [["c d", "a b"], ["y"]]) == 0.5
