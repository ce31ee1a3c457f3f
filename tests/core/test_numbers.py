"""Numbers as people write them in tables."""

from __future__ import annotations

import pytest

from edgetune.core.numbers import number_of, point_of
from edgetune.core.templates import render_row


@pytest.mark.parametrize(
    ("text", "point", "number"),
    [
        ("3,5", ",", 3.5),
        ("1.234,50 €", ",", 1234.5),
        ("0,123", ",", 0.123),
        ("$1,234.50", ".", 1234.5),
        ("1'234.5", ".", 1234.5),
        ("12 %", ".", 12.0),
        ("−4", ".", -4.0),
        ("1e3", ".", 1000.0),
    ],
)
def test_numbers_in_other_spellings_are_read(text: str, point: str, number: float) -> None:
    assert number_of(text, point) == number
    assert float(render_row(f"{{{{ row['a'] | number({point!r}) }}}}", {"a": text})) == number


@pytest.mark.parametrize("value", ["", "n/a", "3 apples", "1.2.3", "nan", "inf", None, True, []])
def test_what_is_no_number_is_never_taken_for_zero(value: object) -> None:
    with pytest.raises(ValueError, match="is no number"):
        number_of(value)
    with pytest.raises((ValueError, LookupError)):
        render_row("{{ a | number / 10 }}", {"a": value})


@pytest.mark.parametrize(
    ("texts", "point"),
    [
        (["3,5", "4"], ","),
        (["1.234,5", "10"], ","),
        (["1,234", "5"], "."),
        (["1,234.5"], "."),
        (["12 €", "3"], "."),
        (["3,5", "many"], None),
        (["2024-01-02"], None),
        ([], None),
    ],
)
def test_what_stands_before_fractions_is_told_from_all_numbers(
    texts: list[str], point: str | None
) -> None:
    assert point_of(texts) == point
