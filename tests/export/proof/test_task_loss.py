"""What a task loses row by row, and what chance allows."""

from __future__ import annotations

from typing import Any

import pytest

from edgetune.data.row import Row
from edgetune.export.proof.task_loss import SCORES, TaskLoss, task_loss
from edgetune.export.proof.task_metric import METRICS


def answered(labels: str) -> list[dict[str, Any]]:
    """A letter a row; what is wanted is always a."""
    return [{"line": at + 1, "prediction": one, "label": "a"} for at, one in enumerate(labels)]


def lost(in_torch: str, in_bundle: str) -> TaskLoss:
    rows = [Row(at + 1, {"text": f"text {at + 1}", "label": "a"}) for at in range(len(in_torch))]
    found = task_loss("accuracy", answered(in_torch), answered(in_bundle), rows)
    assert found is not None
    return found


def test_a_third_of_a_hundred_rows_is_no_chance() -> None:
    assert lost("a" * 86 + "b" * 14, "a" * 58 + "b" * 42).beyond_chance


def test_five_lost_rows_of_five_are_chance_and_six_are_not() -> None:
    assert not lost("a" * 60, "b" * 5 + "a" * 55).beyond_chance
    assert lost("a" * 60, "b" * 6 + "a" * 54).beyond_chance


def test_rows_that_get_better_count_against_those_that_get_worse() -> None:
    both = lost("b" * 6 + "a" * 60, "a" * 6 + "b" * 8 + "a" * 52)
    assert (both.worse, both.better, both.beyond_chance) == (8, 6, False)


def test_a_gain_is_no_loss() -> None:
    assert not lost("b" * 40, "a" * 40).beyond_chance


def test_lost_rows_stand_first_with_text_and_both_answers() -> None:
    found = lost("aaba", "acdb")
    assert (found.answered, found.changed, found.worse, found.better) == (4, 3, 2, 0)
    assert found.lines == ("2", "4") and [row.line for row in found.rows] == ["2", "4", "3"]
    first = found.rows[0]
    assert (first.text, first.wanted, first.torch, first.bundle) == ("text 2", "a", "a", "c")
    assert str(first) == "row 2 'text 2': wanted 'a', torch 'a', bundle 'c'"


def test_every_metric_of_an_export_is_compared_row_by_row_but_perplexity() -> None:
    assert set(METRICS) - set(SCORES) == {"perplexity"}


ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "json_exact_match": (
        {"prediction": '{"a": 1}', "references": ['{"a":1}']},
        {"prediction": '{"a": 2}'},
    ),
    "rouge_l": (
        {"prediction": "one two three", "references": ["one two three"]},
        {"prediction": "four five six"},
    ),
    "preference_accuracy": ({"chosen": 2.0, "rejected": 1.0}, {"chosen": 0.5}),
    "entity_f1": (
        {"prediction": ["B-x", "O"], "tags": ["B-x", "O"]},
        {"prediction": ["O", "B-x"]},
    ),
    "micro_f1": ({"prediction": ["x", "y"], "labels": ["x", "y"]}, {"prediction": ["z"]}),
    "token_accuracy": ({"prediction": ["n", "v"], "tags": ["n", "v"]}, {"prediction": ["v", "n"]}),
}


@pytest.mark.parametrize("metric", ROWS)
def test_many_lost_rows_are_beyond_chance_by_every_metric_and_none_are_not(metric: str) -> None:
    right, change = ROWS[metric]
    in_torch = [{"line": line, **right} for line in range(40)]
    in_bundle = [{**one, **change} if one["line"] < 12 else one for one in in_torch]
    found, same = (task_loss(metric, in_torch, side, []) for side in (in_bundle, in_torch))
    assert found is not None and same is not None
    assert (found.changed, found.worse, found.better) == (12, 12, 0) and found.beyond_chance
    assert (same.changed, same.worse, same.better) == (0, 0, 0) and not same.beyond_chance


def test_numbers_that_lose_their_order_are_beyond_chance_and_small_shifts_are_not() -> None:
    in_torch = [
        {"line": line, "prediction": float(line), "value": float(line)} for line in range(50)
    ]
    shuffled = [{**one, "prediction": float(one["line"] * 17 % 50)} for one in in_torch]
    shifted = [{**one, "prediction": one["prediction"] + 1e-4} for one in in_torch]
    lost_order = task_loss("spearman", in_torch, shuffled, [])
    same = task_loss("spearman", in_torch, shifted, [])
    assert lost_order is not None and lost_order.beyond_chance and lost_order.changed > 40
    assert same is not None and not same.beyond_chance and same.changed == 0
