"""Confusions, figures a class and worst rows, against scikit-learn."""

from __future__ import annotations

import random

import pytest
from sklearn.metrics import (
    classification_report,
    multilabel_confusion_matrix,
)
from sklearn.metrics import (
    confusion_matrix as reference_matrix,
)
from sklearn.preprocessing import MultiLabelBinarizer

from edgetune.metrics.error_analysis import (
    JudgedRow,
    class_figures,
    confusion_matrix,
    confusions,
    error_analysis,
    label_figures,
    score_metrics,
    set_analysis,
    wrong_first,
)

LABELS = ("card", "fee", "loan")


def judged(count: int = 200) -> list[JudgedRow]:
    draw = random.Random(0)
    return [
        JudgedRow(
            at,
            f"text {at}",
            wanted := draw.choice(LABELS),
            wanted if draw.random() < 0.7 else draw.choice(LABELS),
            draw.random(),
        )
        for at in range(count)
    ]


def test_the_matrix_and_the_figures_are_scikit_learns() -> None:
    rows = judged()
    wanted, got = [one.wanted for one in rows], [one.got for one in rows]
    matrix = confusion_matrix(rows)
    assert tuple(matrix["labels"]) == LABELS
    assert matrix["rows"] == reference_matrix(wanted, got, labels=LABELS).tolist()
    report = classification_report(wanted, got, output_dict=True)
    for one in class_figures(rows):
        theirs = report[one["label"]]
        assert one["precision"] == pytest.approx(theirs["precision"])
        assert one["recall"] == pytest.approx(theirs["recall"])
        assert one["f1"] == pytest.approx(theirs["f1-score"])
        assert one["support"] == theirs["support"]


def test_the_largest_confusion_is_the_largest_cell_off_the_diagonal() -> None:
    rows = judged()
    matrix = confusion_matrix(rows)["rows"]
    off = {(i, j): n for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j}
    first = confusions(rows)[0]
    assert first["rows"] == max(off.values())
    assert off[LABELS.index(first["wanted"]), LABELS.index(first["got"])] == first["rows"]
    assert sum(one["rows"] for one in confusions(rows)) == sum(not one.right for one in rows)


def test_labels_of_rows_that_have_several_are_decisions() -> None:
    draw = random.Random(1)
    rows = [[{x for x in LABELS if draw.random() < 0.5} for _ in range(2)] for _ in range(80)]
    ours, theirs = zip(*rows, strict=True)
    binarise = MultiLabelBinarizer(classes=LABELS).fit(theirs)
    matrices = multilabel_confusion_matrix(binarise.transform(theirs), binarise.transform(ours))
    for one, ((_, false), (missed, true)) in zip(
        label_figures(ours, theirs), matrices, strict=True
    ):
        assert one["precision"] == pytest.approx(true / (true + false))
        assert one["recall"] == pytest.approx(true / (true + missed))


def test_of_many_labels_there_is_no_matrix() -> None:
    rows = [JudgedRow(at, "", str(at), str(at + 1), 0.5) for at in range(30)]
    assert error_analysis(rows)["matrix"] is None and len(error_analysis(rows)["confusions"]) == 20
    assert error_analysis(rows)["wrong"] == 30 and len(error_analysis(rows)["worst"]) == 25


def test_the_surest_wrong_row_comes_first_and_a_rejected_one_got_nothing() -> None:
    rows = [
        JudgedRow(1, "a", "x", "y", 0.4, rejected=True),
        JudgedRow(2, "b", "x", "y", 0.9),
        JudgedRow(3, "c", "x", "x", 0.8),
        JudgedRow(4, "d", "x", "y"),
    ]
    assert [one.line for one in wrong_first(rows)] == [2, 1, 4]
    assert rows[0].to_dict()["got"] is None and rows[0].to_dict()["rejected"] == "y"
    assert rows[3].to_dict() == {
        "line": 4,
        "text": "d",
        "wanted": "x",
        "got": "y",
    }


def test_what_a_threshold_gives_by_hand() -> None:
    inside = [
        JudgedRow(1, "", "x", "x", 0.9),
        JudgedRow(2, "", "x", "y", 0.8),
        JudgedRow(3, "", "x", "x", 0.3, rejected=True),
        JudgedRow(4, "", "x", "x", 0.7),
    ]
    outside = [JudgedRow(5, "", "", "x", 0.2, rejected=True), JudgedRow(6, "", "", "x", 0.6)]
    found = score_metrics(inside, outside, threshold=0.5)
    assert (found["answered"], found["accuracy_answered"]) == (0.75, pytest.approx(2 / 3))
    assert found["out_of_scope_recall"] == 0.5
    # the threshold that answers 95 % of four rows answers all: nothing is rejected
    assert found["out_of_scope_recall_at_95"] == 0.0
    assert "answered" not in score_metrics(inside, threshold=None)


def test_a_set_is_as_sure_as_its_least_certain_label() -> None:
    found = set_analysis([(1, "t", ["fee"], {"card": 0.45, "fee": 0.9})])
    assert found["wrong"] == 0
    found = set_analysis([(1, "t", ["fee"], {"card": 0.55, "fee": 0.9})])
    assert found["worst"][0]["score"] == pytest.approx(0.55)
    assert found["worst"][0]["got"] == '["card", "fee"]'
