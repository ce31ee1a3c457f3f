"""A row or a conversation → text, in jinja2's sandbox: the same for training and on the device.

Row templates: unknown columns are errors, a trailing newline is kept, `tojson` writes plain JSON
(nothing escaped for HTML), `number` reads one as people write it (`core.numbers`). Chat templates
come with models from elsewhere; they are set up as transformers does.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from edgetune.core.control_tokens import marked_value, without_marks
from edgetune.core.errors import InputError
from edgetune.core.numbers import number_of

Message = Mapping[str, Any]
ROW = "row"  # what a template calls the whole row, for columns whose names are no identifiers
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
TAKEN_AS_IT_IS = re.compile(
    r"\s*\{\{\s*(?:([A-Za-z_]\w*)|row\[(\"(?:[^\"\\]|\\.)*\"|'[^'\\]*')\])\s*\}\}\s*"
)


def chat_text(
    template: str,
    messages: Sequence[Message],
    *,
    special_tokens: Mapping[str, Any],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Render a conversation as `PreTrainedTokenizer.apply_chat_template(tokenize=False)` does."""
    from jinja2 import TemplateError

    try:
        plain = json.loads(
            json.dumps(list(messages), default=str)
        )  # a template sees JSON types, never live objects
        return _compiled(template).render(
            messages=plain,
            tools=None if tools is None else json.loads(json.dumps(list(tools))),
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except (TemplateError, TypeError) as error:
        raise InputError(f"the chat template refuses these messages: {error}") from error
    except RecursionError as error:
        raise InputError("the messages are nested too deeply for the chat template") from error


def chat_messages(prompt: str, *, system: str | None) -> list[dict[str, str]]:
    """One user turn; `system` None leaves the template's own default, a text (also an empty one)
    replaces it.
    """
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def with_system(messages: Sequence[Message], *, system: str | None) -> list[Message]:
    """A conversation that has no system message of its own gets the one the adapter was trained
    with.
    """
    own = system is None or (messages and messages[0].get("role") == "system")
    return list(messages) if own else [{"role": "system", "content": system}, *messages]


def check_messages(value: Any, *, where: str = "") -> list[Message]:
    """A row's `messages`: a non-empty list of objects with `role` and `content`."""
    fits = (
        isinstance(value, (list, tuple))
        and value
        and all(isinstance(m, Mapping) and "role" in m for m in value)
    )
    if not fits:
        raise InputError(
            "`messages` is no conversation",
            where=where,
            expected='[{"role": …, "content": …}, …]',
            got=repr(value)[:60],
        )
    return list(value)


def render_row(template: str, row: Mapping[str, Any]) -> str:
    """A row template filled in.

    LookupError where the row lacks a column, ValueError where the template cannot be rendered;
    both with the reason in one line. Where the template writes more than columns, the result says
    which parts are theirs (`control_tokens.Rendered`).
    """
    from jinja2 import TemplateError, UndefinedError

    try:
        made = without_marks(_compiled_row(template).render({ROW: dict(row), **row}))
        # a block that a filter was put over saw the marks too
        if (
            "{%" in template
            and (plain := _plain_row(template).render({ROW: dict(row), **row})) != made
        ):
            return str(plain)
        return str(made) if made.texts == ((0, len(made)),) else made
    except UndefinedError as error:
        raise LookupError(str(error.message)) from error
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ValueError(str(error)) from error


def render_columns(template: str, row: Mapping[str, Any], *, where: str = "") -> str:
    """An adapter's recorded template over a request's row; an InputError names the template and the
    reason.
    """
    try:
        return render_row(template, row)
    except LookupError as error:
        got = f"columns {', '.join(row)}"
        raise InputError(
            f"the adapter's prompt {template!r}: {error}", where=where, got=got
        ) from error
    except ValueError as error:
        raise InputError(f"the adapter's prompt {template!r}: {error}", where=where) from error


@functools.lru_cache(maxsize=256)
def columns_of(template: str) -> tuple[str, ...]:
    """The columns a row template reads, by name or as `row["a name"]`, sorted. InputError where it
    is not valid Jinja.
    """
    from jinja2 import TemplateSyntaxError, meta, nodes

    try:
        parsed = _rows().parse(template)
    except TemplateSyntaxError as error:
        raise InputError(
            f"not a valid Jinja template: {error.message}", got=repr(template)
        ) from error
    names = meta.find_undeclared_variables(parsed)
    items = {
        str(item.arg.value)
        for item in parsed.find_all(nodes.Getitem)
        if isinstance(item.node, nodes.Name)
        and item.node.name == ROW
        and isinstance(item.arg, nodes.Const)
    }
    return tuple(sorted((names - {ROW}) | items if items else names))


def column_reference(column: str) -> str:
    """The template that is a column as it stands: `{{ name }}`, or `{{ row["a name"] }}`."""
    quoted = json.dumps(column, ensure_ascii=False)
    return "{{ " + (column if IDENTIFIER.fullmatch(column) else f"{ROW}[{quoted}]") + " }}"


def referred_column(template: str) -> str | None:
    """The column that the template is, as it stands; None for any other template."""
    found = TAKEN_AS_IT_IS.fullmatch(template)
    if found is None:
        return None
    if found[1]:
        return found[1]
    return str(json.loads(found[2])) if found[2].startswith('"') else found[2][1:-1]


@functools.lru_cache(maxsize=256)
def _compiled_row(template: str) -> Any:
    return _rows(mark=True).from_string(template)


@functools.lru_cache(maxsize=256)
def _plain_row(template: str) -> Any:
    return _rows().from_string(template)


@functools.lru_cache(maxsize=2)
def _rows(*, mark: bool = False) -> Any:
    """The sandbox of row templates, with marks around what columns give where asked for."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=_marked if mark else _printable,
    )
    environment.filters["tojson"] = lambda value, indent=None: _tojson(value, indent=indent)
    environment.filters["number"] = number_of
    return environment


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> Any:
    """A chat template, compiled once; trim_blocks and lstrip_blocks as in transformers."""
    from jinja2 import TemplateSyntaxError, ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise InputError(f"the bundle's chat template is not valid Jinja: {error}") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML; a prompt must not."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _printable(value: Any) -> Any:
    """Python's spelling of null, lists and objects must not end up in a prompt."""
    if value is None:
        raise ValueError("a column it uses is null")
    if isinstance(value, (dict, list, tuple)):
        raise ValueError("a column it uses is a list or an object; write {{ column | tojson }}")
    return value


def _marked(value: Any) -> str:
    return marked_value(str(_printable(value)))


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002  (templates may call it by keyword)
    return datetime.now().strftime(format)


@functools.lru_cache(maxsize=1)
def _generation_tag() -> Any:
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; here it is only its
    content.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012  (jinja2 reads it as a class attribute)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return GenerationTag
