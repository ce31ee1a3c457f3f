"""Rows of a `.jsonl` file → requests → answered rows: what `edgetune predict` does with a file."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.errors import AdapterError, InputError
from edgetune.files import whole_file
from edgetune.runtime.prompts import check_messages, columns_of, render_columns
from edgetune.runtime.runtime import Prompt, Runtime

BATCH = 8
"""Rows that are answered in one batch."""


@dataclass(frozen=True)
class Request:
    """One row made ready: its place (file and line), its adapter, and its prompt or text."""

    where: str
    row: dict[str, Any]
    adapter: str | None
    content: Prompt
    tokens: int
    """length of the prompt, by which rows are batched"""


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line, row) of a `.jsonl` or `.jsonl.gz` file. InputError names file, line, expected and got."""
    if not path.is_file():
        raise InputError("no such file", where=str(path), expected="a .jsonl file, one JSON object a line")
    rows = []
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append((number, _row(line, where=f"{path}, line {number}")))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"the file cannot be unpacked: {error}", where=str(path), expected="gzip") from error
    if not rows:
        raise InputError("the file has no rows", where=str(path), expected="one JSON object a line")
    return rows


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
    runtime: Runtime, requests: Sequence[Request], *, truncate: bool = False, **settings: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, answered row) in the order of finishing: rows of like length share a batch, whatever their adapter."""
    labelled = [runtime.labels(request.adapter) is not None for request in requests]
    for kind in (True, False):  # classified rows and embedded ones (or generated, which have no labels) apart
        order = sorted((i for i, has in enumerate(labelled) if has is kind), key=lambda i: requests[i].tokens)
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            batch = [requests[i] for i in places]
            answers = _answer(runtime, batch, truncate=truncate, settings=settings)
            for i, request, answer in zip(places, batch, answers, strict=True):
                yield i, {**request.row, **answer}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a `.jsonl` (or `.jsonl.gz`) file whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    content = gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode()
    with whole_file(path) as partial:
        partial.write_bytes(content)


def _row(line: bytes, *, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        shown = line.decode(errors="replace").strip()
        raise InputError(
            f"not valid JSON: {error}", where=where, expected="a JSON object", got=repr(shown[:40])
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            "a row is a JSON object", where=where, expected="an object", got=type(value).__name__
        )
    return value


def _request(
    runtime: Runtime, row: dict[str, Any], *, where: str, adapter: str | None, truncate: bool
) -> Request:
    chosen = row.get("adapter", adapter)
    if chosen is not None and not isinstance(chosen, str):
        raise InputError("`adapter` has a wrong type", where=where, expected="a name", got=repr(chosen))
    try:
        form = None if chosen is None else runtime.adapter(chosen).prompt_format
        if runtime.manifest.is_decoder:
            content: Prompt = prompt_of(row, form, where=where)
            tokens = len(runtime.prompt_ids(content, chosen))
        else:
            content = text_of(row, form, where=where)
            tokens = len(runtime.text_ids(content, chosen, truncate=truncate))
    except InputError as error:
        raise (
            error
            if error.where
            else InputError(error.what, where=where, expected=error.expected, got=error.got, fix=error.fix)
        ) from error
    except AdapterError as error:
        if error.where:
            raise
        raise AdapterError(error.what, where=where, expected=error.expected, got=error.got) from error
    return Request(where, row, chosen, content, tokens)


def prompt_of(row: Mapping[str, Any], form: Mapping[str, Any] | None, *, where: str = "") -> Prompt:
    """A generation row: `messages`, else the columns of the adapter's prompt template, else `prompt`."""
    if row.get("messages") is not None:
        return check_messages(row["messages"], where=where)
    template = (form or {}).get("prompt")
    if template is not None and set(columns_of(template)) <= set(row):
        return render_columns(template, row, where=where)
    return _text(row, "prompt", also=("messages",), template=template, where=where)


def text_of(row: Mapping[str, Any], form: Mapping[str, Any] | None, *, where: str = "") -> str:
    """A classification row: the columns of the adapter's text template, else `text`."""
    template = (form or {}).get("text")
    if template is not None and set(columns_of(template)) <= set(row):
        return render_columns(template, row, where=where)
    return _text(row, "text", also=(), template=template, where=where)


def _text(row: Mapping[str, Any], key: str, *, also: Sequence[str], template: str | None, where: str) -> str:
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
    runtime: Runtime, batch: Sequence[Request], *, truncate: bool, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    names, contents = [request.adapter for request in batch], [request.content for request in batch]
    if runtime.manifest.is_decoder:
        done = runtime.generate(contents, adapters=names, **settings)
        return [{"completion": c.text, "finish_reason": c.finish_reason} for c in done]
    texts = [str(content) for content in contents]
    if all(runtime.labels(name) is not None for name in names):
        found = runtime.classify(texts, adapters=names, truncate=truncate)
        return [{"label": c.label, "score": round(c.score, 6)} for c in found]
    embeddings = runtime.embed(texts, adapters=names, truncate=truncate)
    return [{"embedding": row.tolist()} for row in embeddings]
