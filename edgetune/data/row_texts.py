"""Rows as bare texts, without a tokenizer: what each asks, what it shall be answered, and its
labels. What rows are compared, grouped and looked at by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.messages import calls_text
from edgetune.core.tasks import EMBEDDING, GENERATION, METHODS, REWARD, TAGGING
from edgetune.core.text import Text
from edgetune.data.columns import number_in
from edgetune.data.contrasts import contrasted, stage_format
from edgetune.data.conversations import Prompt, row_answer, row_prompt, turns_and_answer
from edgetune.data.implicit_prompts import row_pair
from edgetune.data.label_sets import label_reader
from edgetune.data.prompts import PromptFormat, render, row_text
from edgetune.data.row import Row, RowTexts
from edgetune.data.rows import Rows
from edgetune.data.tagging import tagged_rows
from edgetune.recipe.schema import Stage

Read = Callable[[Row, str], tuple[str, str, tuple[str, ...]]]


def row_texts(
    stage: Stage, source: Rows, form: PromptFormat | None = None
) -> tuple[list[RowTexts], dict[int, DataError]]:
    """The texts of every row that can be used, and why the others (by line) cannot.

    `form`: how they are read; not given: as with a base that has a chat template, which these texts
    are without.
    """
    form = form or stage_format(stage, chat_template="chat", columns=source.rows[0].values)
    read = _reader(stage, source, form)
    found, refused = list[RowTexts](), dict[int, DataError]()
    for row in source.rows:
        try:
            found.append(RowTexts(row.line, *read(row, f"{source.source}, line {row.line}")))
        except DataError as error:
            refused[row.line] = error
    return found, refused


def _reader(stage: Stage, source: Rows, form: PromptFormat) -> Read:
    """(row, place) → asked, answered, names."""
    if stage.task == TAGGING:
        return _tags(source, form)
    if stage.task == EMBEDDING:
        return lambda row, where: contrasted(row, form, where)
    if "label" in METHODS[stage.method].columns:
        return _labels(stage, source, form)
    if stage.task in (GENERATION, REWARD) and "prompt" in METHODS[stage.method].columns:
        return lambda row, where: (*_answer(stage, form, row.values, where), ())
    text = form.text or "{{ text }}"
    return lambda row, where: (render(text, row.values, where=where, field="text"), "", ())


def _tags(source: Rows, form: PromptFormat) -> Read:
    """Tags in the scheme that the whole file is turned into."""
    rows, _ = tagged_rows(source, form, skip_invalid=True)
    found = {row.line: row for row in rows}

    def read(row: Row, where: str) -> tuple[str, str, tuple[str, ...]]:
        if row.line not in found:
            tagged_rows(Rows(source.source, [row], 0, ""), form)
        tagged = found[row.line]
        return " ".join(tagged.words), " ".join(tagged.tags), tuple(dict.fromkeys(tagged.tags))

    return read


def _labels(stage: Stage, source: Rows, form: PromptFormat) -> Read:
    def text(row: Row, where: str) -> str:
        return _joined(row_text(form, row.values, where=where))

    if stage.problem == "regression":
        label = form.label or "{{ label }}"
        return lambda row, where: (
            text(row, where),
            f"{number_in(row, label, where=where):g}",
            (),
        )
    if stage.problem == "multi-label":
        labels, _ = label_reader(source, form)

        def several(row: Row, where: str) -> tuple[str, str, tuple[str, ...]]:
            names = labels(row, where)
            return text(row, where), ", ".join(sorted(names)), names

        return several

    def one(row: Row, where: str) -> tuple[str, str, tuple[str, ...]]:
        template = form.label or "{{ label }}"
        label = render(template, row.values, where=where, field="label").strip()
        return text(row, where), label, (label,)

    return one


def _answer(
    stage: Stage, form: PromptFormat, values: Mapping[str, Any], where: str
) -> tuple[str, str]:
    """The prompt, and the answer or both answers; no answer where a row alone does not tell it."""
    if "chosen" in METHODS[stage.method].columns and "chosen" in values:
        prompt, chosen, rejected = row_pair(form, values, where=where)
        return _turns(prompt), f"{chosen}\n{rejected}"
    if form.prompt is None:
        messages, last = turns_and_answer(values, system=form.system, where=where)
        return _turns(messages), calls_text(last)
    prompt = row_prompt(form, values, where=where)
    if form.completion is None or stage.method != "sft":
        return _turns(prompt), ""
    return _turns(prompt), row_answer(form.completion, values, where=where, field="completion")


def _turns(prompt: Prompt) -> str:
    """A prompt as one text, a conversation turn by turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {calls_text(turn)}" for turn in prompt)


def _joined(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(text)
