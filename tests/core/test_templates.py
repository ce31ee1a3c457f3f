"""Row templates: one sandbox, whether a row is trained on or asked about on the device."""

from __future__ import annotations

from typing import Any

import pytest

from edgetune.core.errors import DataError, InputError
from edgetune.core.templates import columns_of, render_columns
from edgetune.data.prompts import render


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        ("{{ mr }}", {"mr": "name[Alimentum]"}, "name[Alimentum]"),
        (
            "Ask: {{ a }}\n{% if b %}{{ b | upper }}{% endif %}\n",
            {"a": "ä <b>", "b": "x"},
            "Ask: ä <b>\nX\n",
        ),
        ("{{ tags | tojson }} {{ n }}", {"tags": ["ü", 1], "n": 3}, '["ü", 1] 3'),
        ("{{ tags | tojson(1) }}", {"tags": ["<ü>"]}, '[\n "<ü>"\n]'),
    ],
)
def test_a_row_reads_the_same_in_training_and_on_the_device(
    template: str, row: dict[str, Any], text: str
) -> None:
    assert render(template, row, where="", field="prompt") == text
    assert render_columns(template, row) == text


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        ("{{ a }}", {"b": 1}, "'a' is undefined"),
        ("{{ a }}", {"a": None}, "a column it uses is null"),
        ("{{ a }}", {"a": [1]}, "is a list or an object"),
        ("{{ 1 / a }}", {"a": 0}, "division by zero"),
        ("{{ a + 1 }}", {"a": "x"}, "can only concatenate str"),
        ("{{ a.__class__.__mro__ }}", {"a": "x"}, "access to attribute '__class__'"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_its_place(
    template: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        render_columns(template, row, where="rows.jsonl, line 3")
    assert str(caught.value).startswith("rows.jsonl, line 3: ")
    with pytest.raises(DataError):
        render(template, row, where="", field="prompt")


def test_the_columns_of_a_template_are_known_before_it_is_filled() -> None:
    assert columns_of("{{ b }} {% if a %}{{ a.x }}{% endif %}") == ("a", "b")
    with pytest.raises(InputError, match="not a valid Jinja template"):
        columns_of("{{ b")
