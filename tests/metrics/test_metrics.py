"""Metrics of labels and texts: cases worked by hand."""

from __future__ import annotations

import warnings

import pytest

from edgetune.metrics.labels import (
    accuracy,
    macro_f1,
    multi_label_metrics,
    regression_metrics,
    tag_metrics,
)
from edgetune.metrics.text import (
    bleu,
    exact_match,
    is_json_task,
    json_exact_match,
    json_valid,
    rouge_l,
)


def test_every_label_that_occurs_weighs_the_same() -> None:
    expected, predicted = list("aaab"), list("aabc")
    assert accuracy(predicted, expected) == 0.5
    # F1 of a is 2·2/(2 + 3); of b and of c, which only the prediction has, 0
    assert macro_f1(predicted, expected) == pytest.approx(4 / 5 / 3)


def test_of_no_rows_every_metric_is_0() -> None:
    found = {
        **multi_label_metrics([], []),
        **regression_metrics([], []),
        **tag_metrics([], [], ["B-a", "O"]),
        "accuracy": accuracy([], []),
        "macro": macro_f1([], []),
        "rouge_l": rouge_l([], []),
    }
    assert found == dict.fromkeys(found, 0.0)


@pytest.mark.filterwarnings("error")
def test_a_single_label_and_labels_never_right_are_counted_without_a_warning() -> None:
    assert multi_label_metrics([["a"], []], [["a"], ["a"]]) == {
        "micro_f1": pytest.approx(2 / 3),
        "macro_f1": pytest.approx(2 / 3),
        "exact_match": 0.5,
    }
    assert multi_label_metrics([[], []], [[], []])["exact_match"] == 1.0
    assert macro_f1([f"l{i}" for i in range(40)], ["other"] * 40) == 0.0
    assert regression_metrics([0.1, 0.1, 0.1], [1.0, 2.0, 3.0])["pearson"] == 0.0


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


def test_few_rows_of_many_labels_warn_nobody() -> None:
    names = [f"label {number}" for number in range(20)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert macro_f1(names, names) == 1.0
