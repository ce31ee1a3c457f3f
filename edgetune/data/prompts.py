"""A row becomes texts: the prompt, completion, text and label templates, and the chat template
around them.

The format is recorded with the adapter, so that a device renders the same prompt from
`tokenizer.json` and `chat_template.jinja` alone. Row templates are Jinja (`core.templates`).

System messages (chat only): `None` leaves it to the chat template, which may insert a default one;
`""` passes an explicit empty system message, which keeps the default out and so saves its tokens on
a device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jinja2

from edgetune.core.control_tokens import without_marks
from edgetune.core.errors import DataError, InputError, RecipeError
from edgetune.core.settings import shown
from edgetune.core.tasks import GENERATION, METHODS, MethodName
from edgetune.core.templates import columns_of, render_row
from edgetune.core.text import Text
from edgetune.models.text_tokenizer import control_of
from edgetune.recipe.checks import column_name
from edgetune.recipe.schema import Data

NAME = re.compile(r"[A-Za-z_]\w*")
COLUMN = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class PromptFormat:
    """How rows are rendered; every template is Jinja over the row. `prompt` is None for rows with
    `messages`.
    """

    template: Literal["chat", "plain"] = "plain"
    system: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    text_pair: str | None = None  # the second of two texts that are classified together
    label: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    tokens: str | None = None  # columns, not templates: they hold lists
    tags: str | None = None

    control_tokens: Literal["text", "tokens"] = "text"  # what a row's spelling of one is

    def to_dict(self) -> dict[str, str | None]:
        """As it is recorded in `edgetune_adapter.json`."""
        recorded = asdict(self)
        if self.control_tokens == "text":  # as every adapter before there was a choice
            del recorded["control_tokens"]
        return recorded


def prompt_format(
    data: Data, *, method: MethodName, chat_template: str | None, columns: Mapping[str, Any]
) -> PromptFormat:
    """The format of a stage; `columns` is a row, by which `messages` is told from `prompt` +
    `completion`.

    Raises RecipeError for a template that is not valid Jinja or uses no column, or `chat` without a
    template.
    """
    read = METHODS[method].columns
    if read == ("text",):
        return PromptFormat(text=row_template(data.text, "text", key="data.text"))
    if "tags" in read:
        return PromptFormat(
            tokens=column_name(data.tokens or "tokens"), tags=column_name(data.tags or "tags")
        )
    if "label" in read:
        text, label = (
            row_template(data.text, "text", key="data.text"),
            row_template(data.label, "label", key="data.label"),
        )
        pair = (
            None
            if data.text_pair is None
            else row_template(data.text_pair, "text_pair", key="data.text_pair")
        )
        return PromptFormat(text=text, text_pair=pair, label=label)
    if data.template == "chat" and not chat_template:
        fix = 'Set data.template = "plain", or choose an instruct model.'
        raise RecipeError(
            'data.template = "chat", but the base\'s tokenizer has no chat template', fix=fix
        )
    template: Literal["chat", "plain"] = (
        "chat" if chat_template and data.template != "plain" else "plain"
    )
    if template == "plain" and data.system is not None:
        fix = "Write it into data.prompt instead."
        raise RecipeError(
            "data.system needs a chat template; this stage uses plain prompts", fix=fix
        )
    is_conversation = (
        data.prompt is None
        and data.completion is None
        and "messages" in columns
        and "prompt" not in columns
    )
    if method == "sft" and is_conversation:
        if template == "plain":
            raise RecipeError(
                "rows with messages need a base with a chat template",
                fix="Choose an instruct model.",
            )
        return PromptFormat(template=template, system=data.system)
    prompt = row_template(data.prompt, "prompt", key="data.prompt")
    if "chosen" in read:
        chosen = row_template(data.chosen, "chosen", key="data.chosen")
        rejected = row_template(data.rejected, "rejected", key="data.rejected")
        # A policy is evaluated on what it should have answered; a reward answers nothing.
        completion = chosen if METHODS[method].task == GENERATION else None
        return PromptFormat(
            template, data.system, prompt, completion, chosen=chosen, rejected=rejected
        )
    completion = row_template(data.completion, "completion", key="data.completion")
    return PromptFormat(template=template, system=data.system, prompt=prompt, completion=completion)


def render(template: str, values: Mapping[str, Any], *, where: str, field: str) -> str:
    """A row template filled in. A missing, null or mistyped column or an empty result is a
    DataError naming `field`.
    """
    _check_type(template, values, where=where, field=field)
    try:
        text = render_row(template, values)
    except LookupError as error:
        raise _missing(template, values, where=where, field=field, reason=str(error)) from error
    except ValueError as error:
        raise DataError(
            f"data.{field} cannot be rendered: {error}", where=where, got=template
        ) from error
    try:
        text.encode()
    except (
        UnicodeEncodeError
    ) as error:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        raise DataError(
            f"the {field} is not valid Unicode",
            where=where,
            expected="UTF-8 text",
            got=repr(text)[:60],
        ) from error
    if not text.strip():
        raise DataError(
            f"the {field} is empty",
            where=where,
            expected="text",
            got=repr(text[:20]),
            fix="Fill it in, or leave such rows out with data.skip_invalid = true.",
        )
    return text


def row_text(form: PromptFormat, values: Mapping[str, Any], *, where: str) -> Text:
    """What a classifier reads of a row: a text, or two."""
    text = render(form.text or "{{ text }}", values, where=where, field="text")
    return (
        text
        if form.text_pair is None
        else (text, render(form.text_pair, values, where=where, field="text_pair"))
    )


def apply_chat_template(tokenizer: Any, messages: list[dict[str, str]], *, where: str = "") -> str:
    """Messages as the tokenizer's chat template writes them, up to where the assistant's answer
    starts; control tokens that a message spells are none (`control_tokens.Rendered`).
    """
    control = control_of(tokenizer)
    try:
        text: str = tokenizer.apply_chat_template(
            messages if control is None else control.marked(messages),
            tokenize=False,
            add_generation_prompt=True,
        )
    except jinja2.TemplateError as error:
        fix = "If it refuses the system role, remove data.system."
        raise DataError(
            f"the base's chat template refuses these messages: {error}", where=where, fix=fix
        ) from error
    return without_marks(text)


def split_messages(
    values: Mapping[str, Any], *, system: str | None, where: str
) -> tuple[list[dict[str, str]], str]:
    """A row's `messages` as (all turns before the last, the last assistant's text)."""
    messages = values.get("messages")
    expected = 'a list of {"role", "content"}, the last one by the assistant'
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(
            'the column "messages" cannot be used',
            where=where,
            expected=expected,
            got=shown(messages),
        )
    for number, message in enumerate(messages):
        usable = (
            isinstance(message, dict)
            and isinstance(message.get("content"), str)
            and message.get("role") in ROLES
        )
        if not usable:
            raise DataError(
                f"messages[{number}] cannot be used",
                where=where,
                expected=expected,
                got=shown(message),
            )
    *turns, last = [{"role": m["role"], "content": m["content"]} for m in messages]
    if last["role"] != "assistant" or not last["content"].strip():
        raise DataError(
            "the last message is no answer", where=where, expected=expected, got=shown(last)
        )
    if system is not None and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return turns, last["content"]


def row_template(given: str | None, column: str, *, key: str) -> str:
    """Explicit Jinja: a bare column name becomes `{{ name }}`; None the column of the field's own
    name.
    """
    source = given if given is not None else column
    if NAME.fullmatch(source.strip()):
        return "{{ " + source.strip() + " }}"
    try:
        used = columns_of(source)
    except InputError as error:
        raise RecipeError(f"{key} is {error.what}", got=error.got) from error
    if not used:
        fix = "Write {{ column }} where the row's text belongs."
        raise RecipeError(f"{key} uses no column of the row", got=repr(source), fix=fix)
    return source


def _check_type(template: str, values: Mapping[str, Any], *, where: str, field: str) -> None:
    """A column that is taken as it is must be a string; a label may be an integer too."""
    column = COLUMN.fullmatch(template)
    if column is None or column.group(1) not in values:
        return
    value = values[column.group(1)]
    usable = isinstance(value, str) or (field == "label" and type(value) is int)
    if not usable:
        kind = "null" if value is None else f"{type(value).__name__} {shown(value)}"
        raise DataError(
            f'the column "{column.group(1)}" has the wrong type',
            where=where,
            expected="a string or an integer" if field == "label" else "a string",
            got=kind,
            fix="Correct the row, or leave such rows out with data.skip_invalid = true.",
        )


def _missing(
    template: str, values: Mapping[str, Any], *, where: str, field: str, reason: str
) -> DataError:
    missing = sorted(set(columns_of(template)) - set(values))
    what = (
        f'there is no column "{missing[0]}"'
        if missing
        else f"data.{field} cannot be rendered: {reason}"
    )
    return DataError(
        what,
        where=where,
        expected=f"for the {field}, {template}",
        got="the columns " + (", ".join(values) or "(none)"),
        fix=f"Correct the row, or set data.{field} to a column or template that fits.",
    )
