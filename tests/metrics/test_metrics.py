"""Metrics against scikit-learn, sacrebleu and cases worked by hand."""

from __future__ import annotations

import random

import pytest

from edgetune.metrics.labels import accuracy, macro_f1
from edgetune.metrics.text import bleu, exact_match, is_json_task, json_exact_match, json_valid


def test_accuracy_and_macro_f1_are_scikit_learns() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    rng = random.Random(0)
    expected = [rng.choice("abcd") for _ in range(200)]
    predicted = [label if rng.random() < 0.6 else rng.choice("abcde") for label in expected]
    assert accuracy(predicted, expected) == pytest.approx(accuracy_score(expected, predicted))
    assert macro_f1(predicted, expected) == pytest.approx(
        f1_score(expected, predicted, average="macro", zero_division=0)
    )


def test_exact_match_takes_any_reference_and_ignores_white_space_around() -> None:
    assert exact_match(["yes\n", "no"], [["sure", "yes"], ["yes"]]) == 0.5


def test_json_matches_whatever_the_order_of_keys() -> None:
    assert json_exact_match(['{"b": 2, "a": 1}'], [['{"a": 1, "b": 2}']]) == 1.0


@pytest.mark.parametrize("prediction", ['{"a": 2}', '{"a": true}', '{"a": 1', "", "1"])
def test_other_values_and_broken_json_do_not_match(prediction: str) -> None:
    assert json_exact_match([prediction], [['{"a": 1}']]) == 0.0


def test_valid_json_is_counted() -> None:
    assert json_valid(['{"a": 1}', "{a: 1}"]) == 0.5


def test_a_json_task_is_one_whose_references_all_are_json() -> None:
    assert is_json_task([['{"a": 1}'], ["[1]"]])
    assert not is_json_task([['{"a": 1}'], ["plain text"]])
    assert not is_json_task([["42"]])


def test_bleu_is_sacrebleus_with_several_references() -> None:
    assert bleu(
        ["the cat sat on the mat"], [["a cat sat", "the cat sat on the mat"]]
    ) == pytest.approx(100.0)
    assert (
        bleu(
            ["the cat sat on the mat", "hello there my friend"],
            [["no"], ["x", "hello there my friend"]],
        )
        < 100
    )
