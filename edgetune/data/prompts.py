"""A row becomes texts: the prompt, completion, text and label templates, and the chat template
around them.

The format is recorded with the adapter, so that a device renders the same prompt from
`tokenizer.json` and `chat_template.jinja` alone. Row templates are Jinja (`core.templates`).

System messages (chat only): `None` leaves it to the chat template, which may insert a default one;
`""` passes an explicit empty system message, which keeps the default out and so saves its tokens on
a device.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import jinja2

from edgetune.core.control_tokens import without_marks
from edgetune.core.errors import DataError, InputError, RecipeError
from edgetune.core.messages import conversation_column, tools_of
from edgetune.core.settings import shown
from edgetune.core.tasks import GENERATION, METHODS, MethodName
from edgetune.core.templates import (
    IDENTIFIER,
    column_reference,
    columns_of,
    referred_column,
    render_row,
)
from edgetune.core.text import Text
from edgetune.models.text_tokenizer import control_of
from edgetune.recipe.checks import column_name
from edgetune.recipe.schema import Data

BRACED = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")
# columns of widespread sets: what is asked, what goes with it, what is answered
ASKED = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("instruction", None, "output"),
    ("instruction", None, "response"),
    ("question", None, "answer"),
    ("question", None, "response"),
    ("query", None, "response"),
    ("input", None, "output"),
)


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
    system_column: str | None = None  # a row's own system message; `system` is the same for all

    control_tokens: Literal["text", "tokens"] = "text"  # what a row's spelling of one is
    positive: str | None = None  # contrastive: a text that is like `text`, and one that is not
    negative: str | None = None
    case_marks: bool = False  # a tagger's words are marked where they have capitals
    tag_scheme: str | None = None  # what its tags of a sentence are together; None: on their own

    def to_dict(self) -> dict[str, str | bool | None]:
        """As it is recorded in `edgetune_adapter.json`."""
        recorded = asdict(self)
        if self.control_tokens == "text":  # as every adapter before there was a choice
            del recorded["control_tokens"]
        for name in ("positive", "negative", "tag_scheme"):  # no other method's adapter has them
            if recorded[name] is None:
                del recorded[name]
        if not self.case_marks:
            del recorded["case_marks"]
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

    def template_of(key: str) -> str:
        return row_template(getattr(data, key), key, key=f"data.{key}", columns=columns)

    if read == ("text",):
        return PromptFormat(text=template_of("text"))
    if "tags" in read:
        return PromptFormat(
            tokens=column_name(data.tokens or first_column(WORD_COLUMNS, columns)),
            tags=column_name(data.tags or first_column(TAG_COLUMNS, columns)),
            case_marks=data.case_marks,
        )
    if "label" in read:
        pair = None if data.text_pair is None else template_of("text_pair")
        return PromptFormat(
            text=template_of("text"),
            text_pair=pair,
            label=_label_template(data, columns),
        )
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
    system, system_column = _system_of(data, columns) if template == "chat" else (None, None)
    if method == "sft" and _is_conversation(data, columns):
        if template == "plain":
            raise RecipeError(
                "rows with messages need a base with a chat template",
                fix="Choose an instruct model.",
            )
        return PromptFormat(template=template, system=system, system_column=system_column)
    asked, answered = _asked(data, columns)
    prompt = row_template(data.prompt or asked, "prompt", key="data.prompt", columns=columns)
    own = PromptFormat(template, system, prompt, system_column=system_column)
    if "chosen" in read:
        if data.prompt is None and asked is None and "prompt" not in columns:
            own = replace(own, prompt=None)  # what both answers have in common is the prompt
        chosen = template_of("chosen")
        # A policy is evaluated on what it should have answered; a reward answers nothing.
        completion = chosen if METHODS[method].task == GENERATION else None
        return replace(own, completion=completion, chosen=chosen, rejected=template_of("rejected"))
    completion = row_template(
        data.completion or answered, "completion", key="data.completion", columns=columns
    )
    return replace(own, completion=completion)


def _label_template(data: Data, columns: Mapping[str, Any]) -> str:
    """A label's template, or the JSON list of the columns that are a label each."""
    if isinstance(data.label, tuple):
        return json.dumps(list(data.label), ensure_ascii=False)
    template = row_template(data.label, "label", key="data.label", columns=columns)
    name = referred_column(template)
    if not data.normalise_labels or name is None:
        return template
    value = template.strip("{} ")
    return "{{ (" + value + " | string).split() | join(' ') | lower }}"


WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("tags", "ner_tags", "labels", "ner", "pos_tags")


def first_column(names: tuple[str, ...], columns: Mapping[str, Any]) -> str:
    """The first of the names that is a column, else the first of all."""
    return next((name for name in names if name in columns), names[0])


def _is_conversation(data: Data, columns: Mapping[str, Any]) -> bool:
    """Whether a row's messages are what is learned: it has some, and the recipe names nothing
    else.
    """
    named = data.prompt is not None or data.completion is not None
    paired = "prompt" in columns and "completion" in columns
    has = conversation_column(columns) is not None or "messages" in columns
    return not named and not paired and has


def _system_of(data: Data, columns: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The system message of all rows, and the template of each row's own: one of them is None."""
    if data.system is None:
        own = isinstance(columns.get("system"), str)
        return None, column_reference("system") if own else None
    if data.system in columns:
        return None, column_reference(data.system)
    if "{{" in data.system or "{%" in data.system:
        return None, row_template(data.system, "system", key="data.system", columns=columns)
    return data.system, None


def _asked(data: Data, columns: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Templates of prompt and answer for the columns of widespread sets (Alpaca, Dolly, …); None
    where prompt and completion have these names.
    """
    if "prompt" in columns or (data.prompt is not None and data.completion is not None):
        return None, None
    for asked, context, answered in ASKED:
        others = {answered} if context is None else {answered, context}
        pairs = "chosen" in columns and asked != "input" and context is None
        if asked in columns and (others <= set(columns) or pairs):
            extra = (
                ""
                if context is None
                else "{% if " + context + " %}\n\n{{ " + context + " }}{% endif %}"
            )
            return column_reference(asked) + extra, (
                column_reference(answered) if "completion" not in columns else None
            )
    return None, None


def render(template: str, values: Mapping[str, Any], *, where: str, field: str) -> str:
    """A row template filled in. A missing, null or mistyped column or an empty result is a
    DataError naming `field`.
    """
    _check_type(template, values, where=where, field=field)
    try:
        text = _as_label(template, values) if field == "label" else None
        text = render_row(template, values) if text is None else text
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


def apply_chat_template(
    tokenizer: Any, messages: list[dict[str, Any]], *, where: str = "", answered: bool = False
) -> str:
    """Messages, and the tools of a `Conversation`, as the tokenizer's chat template writes them, up
    to where the assistant's answer starts; `answered`: the last message is one. Control tokens that
    a message spells are none (`control_tokens.Rendered`).
    """
    control = control_of(tokenizer)
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages) if control is None else control.marked(messages),
            tools=tools_of(messages),
            tokenize=False,
            add_generation_prompt=not answered,
        )
    except jinja2.TemplateError as error:
        fix = "If it refuses the system role, remove data.system."
        raise DataError(
            f"the base's chat template refuses these messages: {error}", where=where, fix=fix
        ) from error
    return without_marks(text)


def row_template(
    given: str | None, column: str, *, key: str, columns: Mapping[str, Any] | None = None
) -> str:
    """Explicit Jinja: a column's name becomes `{{ name }}` or `{{ row["a name"] }}`; None the
    column of the field's own name. `columns` is a row, whose names may be no identifiers.
    """
    source = given if given is not None else column
    known = columns or {}
    if source in known or IDENTIFIER.fullmatch(source.strip()):
        return column_reference(source if source in known else source.strip())

    def named(found: re.Match[str]) -> str:
        inner = found[1]
        is_name = inner in known and not IDENTIFIER.fullmatch(inner)
        return column_reference(inner) if is_name else found[0]

    source = BRACED.sub(named, source)
    try:
        used = columns_of(source)
    except InputError as error:
        raise RecipeError(
            f"{key} is {error.what}",
            got=error.got,
            fix='Write {{ row["a column"] }} for a name with spaces.' if " " in source else "",
        ) from error
    if not used:
        fix = "Write {{ column }} where the row's text belongs, or a column's name as it is."
        has = f"; the columns are {', '.join(known)}" if known else ""
        raise RecipeError(f"{key} uses no column of the row", got=repr(source) + has, fix=fix)
    return source


def _check_type(template: str, values: Mapping[str, Any], *, where: str, field: str) -> None:
    """A column that is taken as it is must be a string; a label may be an integer too."""
    column = referred_column(template)
    if column is None or column not in values:
        return
    value = values[column]
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    usable = isinstance(value, str) or (field == "label" and is_number)
    if not usable:
        kind = "null" if value is None else f"{type(value).__name__} {shown(value)}"
        raise DataError(
            f'the column "{column}" has the wrong type',
            where=where,
            expected="a string, a number or true or false" if field == "label" else "a string",
            got=kind,
            fix="Correct the row, or leave such rows out with data.skip_invalid = true.",
        )


def _as_label(template: str, values: Mapping[str, Any]) -> str | None:
    """A truth value as JSON writes it, a whole float as an integer; None for any other label."""
    column = referred_column(template)
    value = values.get(column) if column is not None else None
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else None


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
