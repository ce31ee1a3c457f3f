"""Sentences with tags as people have them (CoNLL files, spans of characters, IOB1 and IOBES) as
rows of words with a tag in IOB2 each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.settings import shown
from edgetune.core.text import OUTSIDE, entities, has_entities, split_words
from edgetune.data.row import LineOf, Row
from edgetune.data.rows import Rows

SPANS = ("entities", "spans", "label", "labels", "annotations", "ner")
STARTS, ENDS = ("start", "start_offset", "begin"), ("end", "end_offset", "stop")
KINDS = ("label", "labels", "type", "entity", "tag", "entity_group")
LabelledSpan = tuple[int, int, str]


def sentences(source: Rows) -> Rows:
    """Rows with `tokens` and `tags`, where the source holds a CoNLL file or texts with spans; other
    sources as they are.
    """
    first = source.rows[0].values
    if set(first) == {"text"}:
        found = [row for one in source.rows for row in _conll(one, several=len(source.rows) > 1)]
        if not found:
            return source
        source.note("CoNLL: a word a line, the last field is its tag")
        return replace(source, rows=found)
    if _spans_of(first) is None:
        return source
    cut = 0
    rows = []
    for row in source.rows:
        values, misfits = _from_spans(row, where=f"{source.source}, line {row.line}")
        cut += misfits
        rows.append(Row(row.line, values))
    source.note("spans of characters, turned into words and tags")
    if cut:
        source.note(f"{cut} spans begin or end inside a word, which counts as theirs")
    return replace(source, rows=rows)


def to_iob2(tags: Sequence[str]) -> list[str]:
    """The same entities in IOB2: B- begins one, I- goes on."""
    found = [OUTSIDE] * len(tags)
    for kind, start, end in entities(tags):
        separator = tags[start][1]
        for at in range(start, end):
            found[at] = ("B" if at == start else "I") + separator + kind
    return found


def scheme_of(rows: Sequence[Sequence[str]]) -> str | None:
    """The name of the scheme of entity tags that are not IOB2; None for IOB2 and for other tags."""
    names = {tag for tags in rows for tag in tags}
    if not has_entities(sorted(names)):
        return None
    prefixes = {tag[0] for tag in names if tag != OUTSIDE}
    if prefixes & set("LU"):
        return "BILOU"
    if prefixes & set("ES"):
        return "IOBES"
    return "IOB1" if any(list(tags) != to_iob2(tags) for tags in rows) else None


def _conll(row: Row, *, several: bool) -> list[Row]:
    """The sentences of a CoNLL file: a word a line, fields between tabs or spaces, a blank line
    between sentences. Empty where the text is no such file.
    """
    lines = str(row.values["text"]).splitlines()
    words: list[tuple[int, list[str]]] = []
    widths = set()
    for number, line in enumerate(lines, start=1):
        if line.startswith(("-DOCSTART-", "# ")) and (line[0] == "-" or "\t" not in line):
            fields: list[str] = []
        else:
            fields = line.split("\t") if "\t" in line else line.split()
        fields = [field for field in fields if field]
        widths |= {len(fields)} if fields else set()
        words.append((number, fields))
    if not widths or len(widths) != 1 or min(widths) < 2:
        return []
    found: list[Row] = []
    begin, current = 0, list[list[str]]()
    for number, fields in [*words, (0, [])]:
        if fields:
            begin = begin or number
            current.append(fields)
        elif current:
            values = {"tokens": [one[0] for one in current], "tags": [one[-1] for one in current]}
            name = row.line.file if isinstance(row.line, LineOf) else f"file {row.line}"
            place = LineOf.of(begin, name, row.line * 10**7 + begin) if several else begin
            found.append(Row(place, values))
            begin, current = 0, []
    return found


def _spans_of(values: Mapping[str, Any]) -> tuple[str, list[Any]] | None:
    """A row's text and its spans, in the spelling of spaCy, Doccano, Prodigy or Label Studio."""
    data = values.get("data")
    if isinstance(data, Mapping) and isinstance(values.get("annotations"), list):  # Label Studio
        text = data.get("text") or next((v for v in data.values() if isinstance(v, str)), None)
        results = [one for made in values["annotations"][:1] for one in made.get("result", ())]
        spans = [one["value"] for one in results if isinstance(one.get("value"), Mapping)]
        return (text, spans) if isinstance(text, str) else None
    text = values.get("text", values.get("data"))
    if not isinstance(text, str) or _words(values.get("tokens")):
        return None
    found = next((values[key] for key in SPANS if isinstance(values.get(key), list)), None)
    return None if found is None else (text, found)


def _words(tokens: Any) -> bool:
    return isinstance(tokens, list) and all(isinstance(one, str) for one in tokens)


def _from_spans(row: Row, *, where: str) -> tuple[dict[str, Any], int]:
    """The row with `tokens` and `tags`, and how many spans do not fit its words."""
    found = _spans_of(row.values)
    if found is None:
        raise DataError(
            "the row has no spans",
            where=where,
            expected='"text" and "entities", a list of [start, end, label]',
            got="the columns " + ", ".join(row.values),
        )
    text, given = found
    spans = [_span(one, text, where=where) for one in given]
    words = split_words(text)
    tags, misfits = [OUTSIDE] * len(words), 0
    for start, end, kind in sorted(spans, key=lambda one: (one[0], one[0] - one[1])):
        inside = [at for at, (begin, stop) in enumerate(words) if begin < end and stop > start]
        if any(tags[at] != OUTSIDE for at in inside):
            raise DataError(
                "two spans overlap",
                where=where,
                expected="at most one tag for a word",
                got=repr(text[start:end]),
            )
        if not inside:
            continue
        stretch = text[words[inside[0]][0] : words[inside[-1]][1]]
        misfits += stretch != text[start:end].strip()
        for at in inside:
            tags[at] = ("B-" if at == inside[0] else "I-") + kind
    tokens = [text[begin:stop] for begin, stop in words]
    return {**row.values, "tokens": tokens, "tags": tags}, misfits


def _span(given: Any, text: str, *, where: str) -> LabelledSpan:
    if isinstance(given, list) and len(given) >= 3:
        start, end, kind = given[:3]
    elif isinstance(given, Mapping):
        start, end, kind = (
            next((given[key] for key in keys if given.get(key) is not None), None)
            for keys in (STARTS, ENDS, KINDS)
        )
    else:
        start = end = kind = None
    if isinstance(kind, list) and len(kind) == 1:
        kind = kind[0]
    fits = type(start) is int and type(end) is int and isinstance(kind, str) and kind
    if not fits or not 0 <= start < end <= len(text):
        raise DataError(
            "a span cannot be used",
            where=where,
            expected=f"start, end and label, within the text's {len(text)} characters",
            got=shown(given),
        )
    return start, end, str(kind)
