"""Rows of a file → requests → answered rows: what `edgetune predict` does with a file."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from edgetune.core.errors import AdapterError, InputError
from edgetune.core.files import whole_file
from edgetune.core.messages import conversation_column, read_messages, tools_in
from edgetune.core.tasks import CLASSIFICATION, REWARD, TAGGING
from edgetune.core.templates import chat_messages, columns_of, render_columns
from edgetune.core.text import Text
from edgetune.runtime.tasks.answers import Classification
from edgetune.runtime.tasks.decoder import Prompt
from edgetune.runtime.tasks.runtime import Runtime
from edgetune.runtime.tasks.scoring import Answered, answered_ids, answered_of
from edgetune.runtime.tasks.tagging import Tagging, Words, check_words, read_words

BATCH = 8
"""Rows that are answered in one batch."""


@dataclass(frozen=True)
class Request:
    """One row made ready: its place (file and line), its adapter, and its prompt or text."""

    where: str
    row: dict[str, Any]
    adapter: str | None
    content: Prompt | Words | Answered | Text  # a list of strings: words to be tagged
    tokens: int
    """length of the prompt, by which rows are batched"""


def requests_of(
    runtime: Runtime,
    rows: Sequence[tuple[int, dict[str, Any]]],
    *,
    path: str,
    adapter: str | None,
    truncate: bool = False,
) -> list[Request]:
    """Every row checked before the first is answered; `adapter` serves rows that name none."""
    return [
        _request(runtime, row, where=f"{path}, line {line}", adapter=adapter, truncate=truncate)
        for line, row in rows
    ]


def answer_rows(
    runtime: Runtime,
    requests: Sequence[Request],
    *,
    truncate: bool = False,
    threshold: float | None = None,
    **settings: Any,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, answered row) in the order of finishing: rows of like length share a batch, whatever
    their adapter. `threshold`: see `Runtime.classify`.
    """
    kinds = [_kind(runtime, request.adapter) for request in requests]
    for kind in dict.fromkeys(kinds):  # tagged, classified and embedded (or generated) rows apart
        order = sorted(
            (i for i, one in enumerate(kinds) if one == kind), key=lambda i: requests[i].tokens
        )
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            batch = [requests[i] for i in places]
            answers = _answer(
                runtime, batch, truncate=truncate, threshold=threshold, settings=settings
            )
            for i, request, answer in zip(places, batch, answers, strict=True):
                yield i, {**request.row, **answer}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a `.jsonl` or `.csv` file (or either with `.gz`) whole or not at all."""
    packed = path.suffix == ".gz"
    is_table = path.with_suffix("").suffix == ".csv" if packed else path.suffix == ".csv"
    content = (_table(rows) if is_table else "".join(map(row_line, rows))).encode()
    with whole_file(path) as partial:
        partial.write_bytes(gzip.compress(content, mtime=0) if packed else content)


def row_line(row: Mapping[str, Any]) -> str:
    """A row as a line of a `.jsonl` file."""
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV with the columns of all rows; what is no text, number or truth value stands as JSON."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in names])
    return text.getvalue()


def _cell(value: Any) -> Any:
    nested = isinstance(value, (list, tuple, dict))
    return json.dumps(value, ensure_ascii=False, default=str) if nested else value


def _request(
    runtime: Runtime, row: dict[str, Any], *, where: str, adapter: str | None, truncate: bool
) -> Request:
    chosen = row.get("adapter", adapter)
    chosen = adapter if chosen == "" else chosen  # a table's empty cell
    if chosen is not None and not isinstance(chosen, str):
        raise InputError(
            "`adapter` has a wrong type", where=where, expected="a name", got=repr(chosen)
        )
    try:
        chosen = runtime.chosen(chosen)
        form = None if chosen is None else runtime.adapter(chosen).prompt_format
        if runtime.task(chosen) == REWARD:
            answered = answered_of(row, form, where=where)
            content: Prompt | Words | Answered | Text = answered
            tokens = len(answered_ids(runtime.opened, answered, chosen, truncate=truncate))
        elif runtime.manifest.is_decoder and runtime.task(chosen) != CLASSIFICATION:
            prompt = prompt_of(row, form, where=where)
            content = prompt
            tokens = len(runtime.prompt_ids(prompt, chosen))
        elif runtime.task(chosen) == TAGGING:
            words = words_of(row, form, where=where)
            content, tokens = (
                words,
                len(read_words(runtime.opened, words, chosen, truncate=truncate).ids),
            )
        else:
            text = text_of(row, form, where=where)
            content, tokens = text, len(runtime.text_ids(text, chosen, truncate=truncate))
    except InputError as error:
        raise (
            error
            if error.where
            else InputError(
                error.what, where=where, expected=error.expected, got=error.got, fix=error.fix
            )
        ) from error
    except AdapterError as error:
        if error.where:
            raise
        raise AdapterError(
            error.what, where=where, expected=error.expected, got=error.got, fix=error.fix
        ) from error
    return Request(where, row, chosen, content, tokens)


def prompt_of(row: Mapping[str, Any], form: Mapping[str, Any] | None, *, where: str = "") -> Prompt:
    """A generation row: `messages`, else the columns of the adapter's prompt template, else
    `prompt`.
    """
    template = (form or {}).get("prompt")
    known = template is not None and set(columns_of(template)) <= set(row)
    column = "messages" if row.get("messages") is not None else conversation_column(row)
    if column is not None and (column == "messages" or not known):
        messages = read_messages(row[column], where=where, field=column)
        messages.tools = tools_in(row, where=where)
        return messages
    if template is not None and known:
        return with_own_system(render_columns(template, row, where=where), row, form, where=where)
    text = _text(row, "prompt", also=("messages",), template=template, where=where)
    return with_own_system(text, row, form, where=where)


def with_own_system(
    prompt: str, row: Mapping[str, Any], form: Mapping[str, Any] | None, *, where: str = ""
) -> Prompt:
    """The prompt, as a conversation where the adapter was trained with system messages of the rows'
    own and this row has one.
    """
    template = (form or {}).get("system_column")
    if template is None or not all(row.get(name) for name in columns_of(template)):
        return prompt
    return chat_messages(prompt, system=render_columns(template, row, where=where))


def text_of(row: Mapping[str, Any], form: Mapping[str, Any] | None, *, where: str = "") -> Text:
    """A classification row: the columns of the adapter's text template, else `text`; two texts
    where it reads two.
    """
    first = _column_text(row, "text", form, where=where)
    return (
        first
        if (form or {}).get("text_pair") is None
        else (first, _column_text(row, "text_pair", form, where=where))
    )


def _column_text(
    row: Mapping[str, Any], key: str, form: Mapping[str, Any] | None, *, where: str
) -> str:
    template = (form or {}).get(key)
    if template is not None and set(columns_of(template)) <= set(row):
        return render_columns(template, row, where=where)
    return _text(row, key, also=(), template=template, where=where)


def words_of(row: Mapping[str, Any], form: Mapping[str, Any] | None, *, where: str = "") -> Words:
    """A row to be tagged: the column of words that the adapter was trained on, else `tokens`, else
    the plain `text`.
    """
    for column in dict.fromkeys([(form or {}).get("tokens") or "tokens", "tokens"]):
        if row.get(column) is not None:
            return check_words(row[column], where=where)
    return _text(row, "text", also=("tokens",), template=None, where=where)


def _kind(runtime: Runtime, adapter: str | None) -> str:
    if (task := runtime.task(adapter)) in (TAGGING, REWARD):
        return "tag" if task == TAGGING else "score"
    return "classify" if runtime.labels(adapter) is not None else "other"


def _text(
    row: Mapping[str, Any], key: str, *, also: Sequence[str], template: str | None, where: str
) -> str:
    value = row.get(key)
    if isinstance(value, str) and value:
        return value
    if key in row:
        raise InputError(
            f"`{key}` has a wrong value",
            where=where,
            expected="a text that is not empty",
            got=repr(value)[:60],
        )
    names = [key, *also, *([f"the columns {', '.join(columns_of(template))}"] if template else [])]
    raise InputError(
        f"the row has no `{key}`",
        where=where,
        expected=" or ".join(names),
        got=f"columns {', '.join(row) or 'none'}",
    )


def _answer(
    runtime: Runtime,
    batch: Sequence[Request],
    *,
    truncate: bool,
    threshold: float | None,
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    names, contents = [request.adapter for request in batch], [request.content for request in batch]
    if _kind(runtime, names[0]) == "score":
        scores = runtime.score(cast(list[Answered], contents), adapters=names, truncate=truncate)
        return [{"score": round(score, 6)} for score in scores]
    if runtime.manifest.is_decoder and _kind(runtime, names[0]) != "classify":
        done = runtime.generate(cast(list[Prompt], contents), adapters=names, **settings)
        return [
            {"completion": c.text, "finish_reason": c.finish_reason}
            | ({} if c.confidence is None else {"confidence": round(c.confidence, 6)})
            for c in done
        ]
    if _kind(runtime, names[0]) == "tag":
        rows: list[Any] = contents
        tagged = runtime.tag(rows, adapters=names, truncate=truncate)
        return [_tagged(row, one) for row, one in zip(rows, tagged, strict=True)]
    texts = cast(list[Text], contents)
    if all(runtime.labels(name) is not None for name in names):
        found = runtime.classify(texts, adapters=names, truncate=truncate, threshold=threshold)
        return [_classified(c) for c in found]
    embeddings = runtime.embed(texts, adapters=names, truncate=truncate)
    return [{"embedding": row.tolist()} for row in embeddings]


def _classified(found: Classification) -> dict[str, Any]:
    """One label with its score (null, and what was rejected, where that is too low); several labels
    with every label's score; or a number.
    """
    if found.value is not None:
        return {"value": found.value}
    if found.labels is not None:
        return {
            "labels": list(found.labels),
            "scores": {name: round(score, 6) for name, score in found.scores.items()},
        }
    answer = {"label": found.label, "score": round(found.score, 6)}
    return answer if found.rejected is None else {**answer, "rejected": found.rejected}


def _tagged(row: Any, found: Tagging) -> dict[str, Any]:
    """`tags` and `spans` (characters) of the words, which `tokens` names where a plain text was
    split, and the entities.

    Spans count in the row's `text`, or in its words with a space between each two.
    """
    split = {"tokens": [word.word for word in found.words]} if isinstance(row, str) else {}
    entities = [
        {"type": e.type, "text": e.text, "start": e.start, "end": e.end, "score": round(e.score, 6)}
        for e in found.entities
    ]
    return {
        **split,
        "tags": found.tags,
        "spans": [[word.start, word.end] for word in found.words],
        "entities": entities,
    }
