"""Entity F1 against published examples and cases worked by hand."""

from __future__ import annotations

import pytest

from edgetune.metrics.labels import entity_metrics, tag_metrics

# The example of seqeval's README: one of two entities is found whole (F1 0.50), the macro mean is
# over MISC and PER.
EXPECTED = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
PREDICTED = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]


def test_the_example_of_seqeval() -> None:
    assert entity_metrics(PREDICTED, EXPECTED) == {
        "entity_f1": 0.5,
        "macro_entity_f1": 0.5,
        "entity_precision": 0.5,
        "entity_recall": 0.5,
    }
    assert tag_metrics(PREDICTED, EXPECTED, ["B-MISC", "I-MISC", "B-PER", "I-PER", "O"])[
        "token_accuracy"
    ] == pytest.approx(0.8)


def test_a_type_counts_as_much_as_another_in_the_macro_mean() -> None:
    expected, predicted = [["B-a"], ["B-a"], ["B-a"], ["B-b"]], [["B-a"], ["B-a"], ["B-a"], ["B-c"]]
    metrics = entity_metrics(predicted, expected)
    assert metrics["entity_f1"] == pytest.approx(0.75) and metrics[
        "macro_entity_f1"
    ] == pytest.approx(1 / 3)


def test_a_right_boundary_with_a_wrong_type_is_wrong() -> None:
    assert entity_metrics([["B-a", "I-a"]], [["B-b", "I-b"]])["entity_f1"] == 0.0


def test_neighbours_of_one_type_are_two_entities_in_bilou() -> None:
    expected, predicted = [["U-a", "U-a", "B-a", "L-a"]], [["U-a", "U-a", "O", "O"]]
    metrics = entity_metrics(predicted, expected)  # seqeval finds one entity in each, and no hit
    assert (metrics["entity_precision"], metrics["entity_recall"]) == (1.0, pytest.approx(2 / 3))


def test_without_entities_nothing_is_found() -> None:
    assert entity_metrics([["O"]], [["O"]]) == dict.fromkeys(
        ("entity_f1", "macro_entity_f1", "entity_precision", "entity_recall"), 0.0
    )


def test_a_sentence_is_right_with_all_its_entities_and_no_others() -> None:
    expected = [["B-a", "I-a", "O"], ["O", "O"], ["B-a"], ["O", "B-a"]]
    predicted = [
        ["I-a", "I-a", "O"],
        ["O", "O"],
        ["B-b"],
        ["B-a", "B-a"],
    ]  # the first is the same entity in another notation
    assert tag_metrics(predicted, expected, ["B-a", "B-b", "I-a", "O"])["exact_match"] == 0.5


def test_classes_of_words_have_accuracy_and_macro_f1() -> None:
    expected, predicted = [["NOUN", "VERB", "NOUN"], ["DET"]], [["NOUN", "NOUN", "NOUN"], ["DET"]]
    metrics = tag_metrics(predicted, expected, ["DET", "NOUN", "VERB"])
    assert metrics == {
        "token_accuracy": 0.75,
        "exact_match": 0.5,
        "macro_f1": pytest.approx((1 + 4 / 5 + 0) / 3),  # DET, NOUN, VERB
    }
