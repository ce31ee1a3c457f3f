"""What rows show by themselves: repetitions, contradictions, leaks, odd characters, odd labels."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from edgetune.data.findings import Finding, find, is_mojibake, without_names
from edgetune.data.row import Row, RowTexts
from edgetune.data.rows import Rows


def rows(*texts: str | tuple[str, str]) -> list[RowTexts]:
    """Texts, or texts with a label."""
    pairs = [(one, "") if isinstance(one, str) else one for one in texts]
    return [
        RowTexts(line, asked, answered, (answered,) if answered else ())
        for line, (asked, answered) in enumerate(pairs, start=1)
    ]


def kinds(found: Sequence[Finding]) -> dict[str, int]:
    return {one.kind: one.rows for one in found}


def test_validation_rows_in_train_are_found_exactly_and_nearly() -> None:
    train = rows("where is my parcel?", "cancel order 12")
    validation = rows("where is my parcel?", "Cancel  order 13!", "something else")
    found = find(train, validation, labelled=True)
    assert kinds(found) == {"validation-in-train": 1, "validation-nearly-in-train": 1}
    assert [(one.lines, one.of) for one in found] == [((1,), 3), ((2,), 3)]
    assert find(train, rows("quite another"), labelled=True) == []


def test_a_prompt_with_another_answer_stands_in_train_nearly() -> None:
    found = find(rows(("hi", "hello")), rows(("hi", "good day"), ("hi", "hello")), labelled=False)
    assert kinds(found) == {"validation-in-train": 1, "validation-nearly-in-train": 1}


def test_labels_that_are_rare_alike_or_nearly_all_are_named() -> None:
    train = rows(*((f"{'x' * n}", "usual") for n in range(9)), ("one", "Rare"), ("two", "rare"))
    found = find(train, [], labelled=True, one_label=True)
    assert kinds(found) == {"rare-labels": 2, "one-sided": 9, "alike-labels": 1}
    assert "an accuracy of 0.82 is what always answering it gets" in found[1].line
    assert all(one.matters for one in found)


@pytest.mark.parametrize(
    ("names", "values", "suspicious"),
    [
        (("where is my parcel", "shipping"), ("the bill is wrong", "shipping"), True),
        (("a fine film", "4,5"), ("a dull film", "2"), True),
        (("lost parcel", "shipping"), ("lost parcel", "shipping"), True),
        (("Text of the ticket", "Queue"), ("the bill is wrong", "shipping"), False),
        (("message", "spam"), ("the bill is wrong", "spam"), False),
        (("0", "1"), ("the bill is wrong", "spam"), False),
    ],
)
def test_a_first_line_that_is_a_row_is_told(
    names: tuple[str, str], values: tuple[str, str], suspicious: bool
) -> None:
    source = Rows("a.csv", [Row(n, dict(zip(names, values, strict=True))) for n in (2, 3)], 0, "")
    found = without_names({"train": source, "validation": source})  # held out of the same file
    assert [one.kind for one in found] == ["first-line"] * suspicious
    said = f'of the train file .* "{names[1]}" is one of them'
    assert all(one.matters and re.search(said, one.line) for one in found)


def test_a_label_that_says_that_there_is_none_is_told() -> None:
    found = find(rows(("a", "NaN"), ("b", "bill"), ("c", "NaN"), ("d", "bill")), [], labelled=True)
    assert kinds(found) == {"no-label": 2} and found[0].lines == (1, 3)
    assert find(rows(("a", "none of these"), ("b", "None")), [], labelled=True) == []


def test_a_few_repeated_rows_do_not_matter_and_many_do() -> None:
    few = find(rows(*"abcdefghijkla"), [], labelled=False)
    many = find(rows(*"aabb"), [], labelled=False)
    assert [(one.rows, one.matters) for one in (*few, *many)] == [(1, False), (2, True)]


@pytest.mark.parametrize(
    "text",
    [
        "MÃ¼ller, fÃ¼r",
        "it isnâ€™t here",
        "it isnâ\x80\x99t here",
        "25 Â°C",
        "Ð¿Ñ€Ð¸Ð²ÐµÑ‚",
        "ï»¿text",
        "a \ufffd b",
        "ðŸ˜€",
    ],
)
def test_what_a_wrong_encoding_leaves_is_found(text: str) -> None:
    assert is_mojibake(text)


@pytest.mark.parametrize(
    "text",
    [
        "Müller, für, naïve café",
        "“CAFÉ” and “AMANHÔ",
        "Ünal’s Ångström – 25 °C",
        "São Paulo, AÇÃO",
        "привет, мир",
        "日本語 😀",
        "«À LA CARTE»",
    ],
)
def test_text_in_its_own_letters_is_not(text: str) -> None:
    assert not is_mojibake(text)


def test_the_line_shows_where_and_what() -> None:
    (found,) = find(rows("fine", "the MÃ¼ller family"), [], labelled=False)
    assert found.lines == (2,) and 'the first in line 2: "the MÃ¼ller fa' in found.line
