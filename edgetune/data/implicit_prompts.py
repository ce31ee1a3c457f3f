"""Preference rows in the spellings of widespread sets: whole conversations with or without a
prompt, and answers that are each marked as good or bad.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.messages import Conversation, calls_text, read_messages, tools_in
from edgetune.core.settings import shown
from edgetune.core.templates import columns_of, referred_column
from edgetune.data.conversations import Prompt, row_answer, row_prompt, row_system
from edgetune.data.prompts import PromptFormat, render
from edgetune.data.row import Row
from edgetune.data.rows import Rows

TURN = re.compile(r"\n\n(Human|Assistant): ?")  # Anthropic's hh-rlhf
TRUTHS = {"true": True, "false": False}
MARKS = ("label", "kto_tag", "preferred")  # columns that say whether an answer is good


def row_pair(
    form: PromptFormat, values: Mapping[str, Any], *, where: str
) -> tuple[Prompt, str, str]:
    """Prompt, better and worse answer of a row.

    Where both answers are whole conversations, or there is no prompt, what they have in common at
    the beginning is the prompt (as TRL has it).
    """
    texts = [form.chosen or "{{ chosen }}", form.rejected or "{{ rejected }}"]
    fields = ["chosen", "rejected"]
    whole = [
        _turns(value, where=where, field=field)
        for value, field in zip((_value(text, values) for text in texts), fields, strict=True)
    ]
    implicit = form.prompt is None
    if None not in whole and (implicit or any(len(one or ()) > 1 for one in whole)):
        first, second = (one or Conversation([]) for one in whole)
        return _parted(first, second, form, values, where=where)
    answers = [
        row_answer(text, values, where=where, field=field)
        for text, field in zip(texts, fields, strict=True)
    ]
    if implicit and "prompt" not in values:
        return _common_text(*answers, where=where)
    return row_prompt(form, values, where=where), answers[0], answers[1]


def _value(template: str, values: Mapping[str, Any]) -> Any:
    column = referred_column(template)
    return values.get(column) if column is not None else None


def _turns(value: Any, *, where: str, field: str) -> Conversation | None:
    """The messages of an answer's column; None for a text that is only an answer."""
    if isinstance(value, list):
        return read_messages(value, where=where, field=field)
    if not isinstance(value, str) or not value.startswith("\n\nHuman:"):
        return None
    _, *parts = TURN.split(value)
    roles = {"Human": "user", "Assistant": "assistant"}
    return Conversation(
        {"role": roles[role], "content": text.strip()}
        for role, text in zip(parts[::2], parts[1::2], strict=True)
    )


def _parted(
    first: Conversation,
    second: Conversation,
    form: PromptFormat,
    values: Mapping[str, Any],
    *,
    where: str,
) -> tuple[Prompt, str, str]:
    same = 0
    while same < min(len(first), len(second)) - 1 and first[same] == second[same]:
        same += 1
    rest = [first[same:], second[same:]]
    for turns, field in zip(rest, ("chosen", "rejected"), strict=True):
        last = turns[-1]
        if len(turns) != 1 or last["role"] != "assistant" or not calls_text(last).strip():
            raise DataError(
                f"the {field} answer cannot be used",
                where=where,
                expected="a text, or a list of one message by the assistant, after the turns that"
                " both conversations have in common",
                got=f"{len(turns)} messages, the last by {last['role']}",
            )
    turns = first.until(same)
    given = None if form.prompt is None else _value(form.prompt, values)
    if isinstance(given, list):
        before = read_messages(given, where=where, field="prompt")
        turns = turns if turns[: len(before)] == before else Conversation([*before, *turns])
    if not turns or turns[-1]["role"] == "assistant":
        raise DataError(
            "there is nothing that both answers reply to",
            where=where,
            expected="a prompt, or conversations that begin alike, with a message by the user",
        )
    answers = [calls_text(one[-1]) for one in rest]
    if form.template == "plain":
        if len(turns) > 1:
            raise DataError(
                "the prompt is a conversation, but this stage uses plain prompts",
                where=where,
                expected="a string",
                fix="Choose a base with a chat template, or render the turns in data.prompt.",
            )
        return str(turns[0]["content"]), answers[0], answers[1]
    turns.tools = tools_in(values, where=where)
    turns = turns.with_system(row_system(form, values, where=where))
    return turns, answers[0], answers[1]


def _common_text(chosen: str, rejected: str, *, where: str) -> tuple[str, str, str]:
    """Prompt and answers of two texts that begin alike; the space before what differs is no part
    of the prompt.
    """
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    while same and not chosen[same - 1].isspace():  # no word is cut
        same -= 1
    prompt = chosen[:same].rstrip()
    if not prompt:
        raise DataError(
            'there is no column "prompt", and the answers have no beginning in common',
            where=where,
            expected="a prompt, or texts that begin with the same one",
            fix="Set data.prompt to the column that holds it.",
        )
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def well_answered(source: Rows, form: PromptFormat) -> Rows:
    """Of rows of one answer each, marked good or bad (as for KTO), the good ones; other rows as
    they are.
    """
    mark = _mark_of(source)
    if mark is None or mark in columns_of(" ".join(filter(None, (form.prompt, form.completion)))):
        return source
    rows = [row for row in source.rows if _is_good(source, row, mark)]
    if not rows:
        raise DataError(
            "no answer is marked as good",
            where=source.source,
            expected=f'rows with "{mark}": true, which are what sft learns',
            got=f"{len(source.rows)} rows with false",
            fix='Learn from both kinds with method = "dpo", or name other columns.',
        )
    if len(rows) < len(source.rows):
        source.note(
            f'answers marked by "{mark}": the {len(rows)} good ones of {len(source.rows)} are'
            " learned (dpo learns from both kinds)"
        )
    return replace(source, rows=rows)


def _mark_of(source: Rows) -> str | None:
    """The column that says whether a row's only answer is good; None where there is none."""
    first = source.rows[0].values
    mark = next((name for name in MARKS if _truth(first.get(name)) is not None), None)
    return None if {"chosen", "rejected"} & set(first) else mark


def _truth(value: Any) -> bool | None:
    """True or false, as a table spells it too; None for anything else."""
    return TRUTHS.get(str(value).strip().lower()) if isinstance(value, (bool, str)) else None


def _is_good(source: Rows, row: Row, mark: str) -> bool:
    found = _truth(row.values.get(mark))
    if found is None:
        raise DataError(
            f'the column "{mark}" does not say whether the answer is good',
            where=f"{source.source}, line {row.line}",
            expected="true or false",
            got=shown(row.values.get(mark)),
        )
    return found


def paired(source: Rows, form: PromptFormat) -> Rows:
    """Rows of one answer each, marked good or bad (as for KTO), as rows with `chosen` and
    `rejected`; other rows as they are.
    """
    mark = _mark_of(source)
    if mark is None or "completion" not in source.rows[0].values:
        return source
    answers: dict[str, tuple[list[Row], list[Row]]] = {}
    prompt = form.prompt or "{{ prompt }}"
    for row in source.rows:
        asked = _value(prompt, row.values)
        key = (
            json.dumps(asked, sort_keys=True, default=str)
            if isinstance(asked, list)
            else render(
                prompt, row.values, where=f"{source.source}, line {row.line}", field="prompt"
            )
        )
        answers.setdefault(key, ([], []))[0 if _is_good(source, row, mark) else 1].append(row)
    rows = [
        Row(
            good.line,
            good.values
            | {"chosen": good.values["completion"], "rejected": bad.values["completion"]},
        )
        for goods, bads in answers.values()
        for good, bad in zip(goods, bads, strict=False)
    ]
    if not rows:
        raise DataError(
            "no prompt has both a good and a bad answer",
            where=source.source,
            expected=f'rows of the same prompt with "{mark}": true and false',
        )
    left = len(source.rows) - 2 * len(rows)
    source.note(
        f'answers marked by "{mark}", paired by their prompts ({left} without a counterpart)'
    )
    return replace(source, rows=rows)
