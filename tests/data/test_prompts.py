"""Rows become prompts: row templates, chat templates, system messages, recorded formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.core.errors import DataError, RecipeError
from edgetune.core.templates import chat_messages
from edgetune.data.conversations import split_messages
from edgetune.data.prompts import apply_chat_template, prompt_format, render
from edgetune.models.load import load_tokenizer
from edgetune.models.resolve import resolve_base
from edgetune.recipe.schema import Data

WHERE = "a.jsonl, line 3"


def data(**values: Any) -> Data:
    return Data(train="t.jsonl", **values)


def test_columns_by_convention_become_explicit_templates() -> None:
    form = prompt_format(
        data(), method="sft", chat_template=None, columns={"prompt": "", "completion": ""}
    )
    assert (form.template, form.prompt, form.completion) == (
        "plain",
        "{{ prompt }}",
        "{{ completion }}",
    )
    form = prompt_format(
        data(label="intent"), method="sequence-classification", chat_template=None, columns={}
    )
    assert (form.text, form.label) == ("{{ text }}", "{{ intent }}")


def test_auto_uses_the_chat_template_when_there_is_one() -> None:
    columns = {"prompt": "", "completion": ""}
    assert (
        prompt_format(data(), method="sft", chat_template="{{ x }}", columns=columns).template
        == "chat"
    )
    plain = prompt_format(
        data(template="plain"), method="sft", chat_template="{{ x }}", columns=columns
    )
    assert plain.template == "plain"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"template": "chat"}, "tokenizer has no chat template"),
        ({"system": "Be brief."}, "data.system needs a chat template"),
        ({"prompt": "{{ mr"}, r"data.prompt is not a valid Jinja template"),
        (
            {"prompt": "Answer this:"},
            r"data.prompt uses no column of the row .*Write \{\{ column \}\}",
        ),
    ],
)
def test_a_format_that_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        prompt_format(data(**values), method="sft", chat_template=None, columns={"prompt": ""})


def test_a_template_is_filled_from_the_row() -> None:
    row = {"a": "x<&>", "n": 3, "tags": ["é", {"k": 1}]}
    assert render("{{ a }} {{ n + 1 }}\n", row, where=WHERE, field="prompt") == "x<&> 4\n"
    assert render("{{ tags | tojson }}", row, where=WHERE, field="prompt") == '["é", {"k": 1}]'


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            "{{ mr }}",
            {"ref": 1},
            r'line 3: there is no column "mr" \(expected for the prompt, .*got the columns ref\)',
        ),
        (
            "x {{ mr.name }}",
            {"mr": {}},
            r"data.prompt cannot be rendered: .*has no attribute 'name'",
        ),
        (
            "{{ mr }}",
            {"mr": 5},
            r'the column "mr" has the wrong type \(expected a string, got int 5\)',
        ),
        (
            "{{ mr }}",
            {"mr": None},
            r'the column "mr" has the wrong type \(expected a string, got null\)',
        ),
        ("x {{ mr }}", {"mr": None}, r"a column it uses is null"),
        ("x {{ mr }}", {"mr": [1]}, r"write \{\{ column \| tojson \}\}"),
        ("{{ mr }}", {"mr": " \n"}, r"the prompt is empty"),
        ("{{ 1 / n }}", {"n": 0}, r"data.prompt cannot be rendered: division by zero"),
        ("{{ mr.__class__.__mro__ }}", {"mr": "x"}, r"data.prompt cannot be rendered"),
    ],
)
def test_a_row_that_does_not_fit_is_named(template: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        render(template, row, where=WHERE, field="prompt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("label", "name"), [(3, "3"), (True, "true"), (False, "false"), (2.0, "2"), (2.5, "2.5")]
)
def test_labels_may_be_numbers_and_truth_values(label: Any, name: str) -> None:
    assert render("{{ label }}", {"label": label}, where=WHERE, field="label") == name


@pytest.mark.parametrize("label", [None, float("nan"), ["a"]])
def test_what_is_no_label_is_refused(label: Any) -> None:
    with pytest.raises(DataError, match="expected a string, a number or true or false"):
        render("{{ label }}", {"label": label}, where=WHERE, field="label")


def test_system_none_leaves_the_default_and_empty_replaces_it(tiny_decoder: Path) -> None:
    tokenizer = load_tokenizer(resolve_base(str(tiny_decoder)))
    default = apply_chat_template(tokenizer, chat_messages("hi", system=None))
    empty = apply_chat_template(tokenizer, chat_messages("hi", system=""))
    assert default.startswith(
        "<|im_start|>system\nYou are a tiny model.<|im_end|>\n<|im_start|>user\nhi"
    )
    assert empty.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nhi")
    assert empty.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_messages_are_split_before_the_last_answer() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert split_messages({"messages": turns}, system=None, where=WHERE) == (turns[:1], "b")
    with_system, _ = split_messages({"messages": turns}, system="S", where=WHERE)
    assert with_system == [{"role": "system", "content": "S"}, turns[0]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, 'the column "messages" cannot be used'),
        ([{"role": "user", "content": "a"}], 'the column "messages" cannot be used'),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant"}],
            r"messages\[1\] cannot be used",
        ),
        (
            [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}],
            r"messages\[0\] cannot be used",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
            "the last message is no answer",
        ),
    ],
)
def test_messages_that_cannot_be_used_are_named(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_messages({"messages": messages}, system=None, where=WHERE)
