"""What rows can be read as: texts with labels, pairs, tags, questions with answers, conversations,
preferences, plain text. The likeliest reading comes first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.messages import conversation_column
from edgetune.core.tasks import METHODS
from edgetune.core.text import has_entities
from edgetune.data.columns import as_lists, spelled_list
from edgetune.data.contrasts import POSITIVES
from edgetune.data.implicit_prompts import MARKS
from edgetune.data.label_sets import cell_labels
from edgetune.data.prompts import ASKED, TAG_COLUMNS, WORD_COLUMNS, first_column
from edgetune.data.rows import Rows
from edgetune.data.sentences import sentences
from edgetune.inspection.alike import NEGATIVE, alike, alike_by_label, any_two_texts
from edgetune.inspection.columns import LABEL_WORDS, LABELS, Column, Profile, likeliest, profile
from edgetune.inspection.reading import PAIRS, Given, Reading, quoted

ANSWERS = (
    ("prompt", "response"), ("prompt", "answer"), ("prompt", "output"), ("prompt", "target"),
    ("request", "response"), ("question", "response"), ("source", "target"), ("src", "tgt"),
    ("text", "summary"), ("article", "summary"), ("document", "summary"), ("user", "assistant"),
    ("text", "json"), ("text", "target"), ("text", "output"),
)  # fmt: skip
LABEL = ("label", "labels", "category", "class", "intent")


def readings(source: Rows, given: Given, task: str | None = None) -> list[Reading]:
    """All readings of a file that agree with what is given, the likeliest first.

    DataError where there is none: what was looked for, and what the file has.
    """
    table = profile(source)
    for key, name in given.items():
        if "{" not in name:
            table.named(name, option=f"--{key.replace('_', '-')}")
    found = list[Reading]()
    for builder in (*BUILDERS, *OTHERWISE):
        if builder in OTHERWISE and not task:
            if found:
                break
            _check_labels(table, given)
        for reading in builder(source, table, given):
            fits = set(given) <= {*METHODS[reading.method].columns} and task in (None, reading.task)
            found += [reading] if fits and reading not in found else []
    if not found:
        raise _nothing(table, given, task)
    return found


def _tagging(source: Rows, table: Profile, given: Given) -> Iterator[Reading]:
    words = given.get("tokens") or first_column(WORD_COLUMNS, table.columns)
    tags = given.get("tags") or first_column(TAG_COLUMNS, table.columns)
    if {words, tags} <= set(table.columns):
        rows = [as_lists(row, words, tags) for row in table.rows]
        fit = sum(
            isinstance(row.get(words), list)
            and isinstance(row.get(tags), list)
            and len(row[words]) == len(row[tags])
            for row in rows
        )
        if 2 * fit > len(rows):
            what = f'the words in "{words}", a tag for each in "{tags}"'
            yield Reading("token-classification", {"tokens": words, "tags": tags}, what)
        return
    try:
        turned = sentences(source)
    except DataError:
        return
    if turned is not source and _are_tags(turned):
        what = "a word and its tag a line" if set(table.columns) == {"text"} else "spans of a text"
        yield Reading("token-classification", {}, f"{what}, turned into words and tags")


def _are_tags(turned: Rows) -> bool:
    """Whether what ends the lines are tags, and not the words of a text."""
    tags = Counter(tag for row in turned.rows for tag in row.values.get("tags", ()))
    few = 1 < len(tags) <= sum(tags.values()) // 10
    return few or has_entities(sorted(tags))


def _preferences(source: Rows, table: Profile, given: Given) -> Iterator[Reading]:
    names = {key: given.get(key, key) for key in ("chosen", "rejected")}
    if set(names.values()) <= set(table.columns):
        asked = {"prompt": given["prompt"]} if "prompt" in given else {}
        named = {key: name for key, name in names.items() if name != key}
        what = f'the better answer in "{names["chosen"]}", the worse in "{names["rejected"]}"'
        yield Reading("dpo", asked | named, f"{what}; a policy learns to prefer")
        yield Reading("reward", asked | named, f"{what}; a model learns to score answers")


def _marked(source: Rows, table: Profile, given: Given) -> Iterator[Reading]:
    mark = next((name for name in MARKS if name in table.columns), None)
    if mark and "completion" in table.columns and table.columns[mark].holds == "bits":
        what = f'answers in "completion", marked good or bad in "{mark}"'
        yield Reading("dpo", {}, f"{what}, paired by their prompts")
        yield Reading("sft", {}, f"{what}; the good ones are learned")


def _conversations(source: Rows, table: Profile, given: Given) -> Iterator[Reading]:
    column = conversation_column(source.rows[0].values)
    if column and not {"prompt", "completion"} & set(given):
        yield Reading("sft", {}, f'conversations in "{column}", every answer is learned')


def _instructions(source: Rows, table: Profile, given: Given) -> Iterator[Reading]:
    """Columns whose names say what is asked and what is answered."""
    columns = table.columns
    if {"prompt", "completion"} & set(given):
        asked = given.get("prompt") or _first_text(table, without=given.get("completion"))
        answered = given.get("completion") or _first_text(table, without=asked)
        if asked and answered:
            yield _answering(table, asked, answered, {"prompt": asked, "completion": answered})
        return
    if {"prompt", "completion"} <= set(columns):
        yield _answering(table, "prompt", "completion", {})
    for asked, context, answered in ASKED:
        if {asked, answered} | ({context} if context else set()) <= set(columns):
            extra = f' with "{context}"' if context else ""
            yield _answering(table, f"{asked}", answered, {}, extra)
            return
    for asked, answered in ANSWERS:
        if {asked, answered} <= set(columns) and not columns[answered].repeats:
            yield _answering(table, asked, answered, {"prompt": asked, "completion": answered})
            return


def _answering(
    table: Profile, asked: str, answered: str, data: Mapping[str, str], extra: str = ""
) -> Reading:
    json_too = answered in table.columns and is_json(table.columns[answered])
    answers = "JSON answers" if json_too else "answers"
    return Reading("sft", data, f'prompts in "{asked}"{extra}, {answers} in "{answered}"')


def is_json(column: Column) -> bool:
    """Whether nearly all values are JSON objects or arrays."""
    looked = list(column.values)[:50]
    return bool(looked) and sum(map(parses, looked)) > 0.9 * len(looked)


def parses(value: str) -> bool:
    """Whether a text is a JSON object or array."""
    try:
        return isinstance(json.loads(value), (dict, list))
    except (ValueError, RecursionError):
        return False


def _labelled(source: Rows, table: Profile, given: Given) -> Iterator[Reading]:
    """A text, or two, and a label, several, or a number."""
    texts, pair = _texts_of(table, given)
    if texts is None:
        return
    read = {"text": texts} | ({"text_pair": pair} if pair else {})
    said = f'the text in "{texts}"' if pair is None else f'two texts in "{texts}" and "{pair}"'
    own = {key: name for key, name in read.items() if name != key or key in given}
    label = given.get("label")
    if label is not None:
        column = table.columns.get(label)
        if column is None:
            for task in ("sequence-classification", "regression"):
                yield Reading(task, own | {"label": label}, f"{said}, {label}")
            return
        yield from _of_label(table, column, own, said, chosen=True)
        return
    yield from _bits(table, read, own, said)
    rest = [column for column in table.columns.values() if column.name not in read.values()]
    for column in likeliest(rest, LABELS):
        if column.name in (POSITIVES[0], NEGATIVE) and column.words > 1:  # alike, and no label
            continue
        yield from _of_label(table, column, own, said, chosen=False)


def _of_label(
    table: Profile, column: Column, own: dict[str, str], said: str, *, chosen: bool
) -> Iterator[Reading]:
    """What this column can be: one label, several, or a number."""
    data = own | {"label": column.name}
    where = f'in "{column.name}"'
    if column.holds == "strings":
        yield Reading("multi-label", data, f"{said}, a list of labels {where}")
        return
    if column.is_identity and not chosen:
        return
    if (several := _labels_in_cells(column)) is not None:
        yield Reading("multi-label", data, f"{said}, some of {several} labels in a cell {where}")
    value = Reading("regression", data, f"{said}, a number {where}", column.point)
    if column.is_continuous:
        yield value
    usable = column.holds in ("text", "number", "bits") and column.repeats
    short = column.words <= LABEL_WORDS or column.name.casefold() in LABEL
    if usable and not column.has_fractions and (chosen or short):
        names = column.distinct
        yield Reading("sequence-classification", data, f"{said}, one of {names} labels {where}")
        if column.holds == "number" and names > 2 and not column.is_continuous:
            yield value
    elif chosen and column.holds != "number":
        raise _no_label(table, column)
    elif chosen and not column.is_continuous:
        yield value


def _labels_in_cells(column: Column) -> int | None:
    """How many labels a column's cells name, where they hold several; None where they do not."""
    if column.holds != "text" or column.distinct < 2:
        return None
    cells = [cell_labels(value) for value in column.values]
    labels = {str(label) for cell in cells for label in cell}
    if all(spelled_list(value) is not None for value in column.values):
        return len(labels)
    several = sum(len(cell) > 1 for cell in cells)
    long = any(len(label.split()) > 3 for label in labels)
    few = len(labels) < min(column.distinct, 2 + column.filled // 3)
    return len(labels) if several > len(cells) / 3 and few and not long else None


def _bits(
    table: Profile, read: Mapping[str, str], own: dict[str, str], said: str
) -> Iterator[Reading]:
    """Columns of 0 and 1, each a label."""
    bits = tuple(
        column.name
        for column in table.columns.values()
        if column.holds == "bits" and column.name not in read.values() and not column.is_identity
    )
    if len(bits) > 1:
        named = ", ".join(bits[:6]) + (f" and {len(bits) - 6} more" if len(bits) > 6 else "")
        yield Reading("multi-label", {**own, "label": bits}, f"{said}, 0 or 1 for each of {named}")


def _texts_of(table: Profile, given: Given) -> tuple[str | None, str | None]:
    """The column of the text, and of a second one that belongs to it."""
    if "text" in given:
        return given["text"], given.get("text_pair")
    label = given.get("label")
    for first, second in PAIRS:
        both = {first, second} <= set(table.columns) and label not in (first, second)
        if both and "text_pair" not in given:
            return first, second
    return _first_text(table, without=given.get("text_pair"), also=label), given.get("text_pair")


def _first_text(table: Profile, *, without: str | None, also: str | None = None) -> str | None:
    return next((c.name for c in table.texts() if c.name not in (without, also)), None)


def _two_texts(source: Rows, table: Profile, given: Given) -> Iterator[Reading]:
    """Two columns of text without a word what they are: the first asks, the second answers, or
    both are alike.
    """
    texts = [one.name for one in table.texts() if not one.could_be_label]
    ordered = [name for name in table.columns if name in texts]
    if len(ordered) >= 2 and not given:
        asked, answered = ordered[:2]
        yield _answering(table, asked, answered, {"prompt": asked, "completion": answered})
        yield from any_two_texts(source, table, given)


def _plain(source: Rows, table: Profile, given: Given) -> Iterator[Reading]:
    text = given.get("text") or _first_text(table, without=None)
    if text is None and "text" in table.columns:  # one document is one value
        text = "text"
    if text:
        own = {"text": text} if text != "text" or given else {}
        said = f'plain text in "{text}"'
        yield Reading("causal-lm", own, f"{said}; a decoder learns to go on with it")
        yield Reading("masked-lm", own, f"{said}; an encoder learns its words")


Builder = Callable[[Rows, Profile, Given], Iterator[Reading]]
BUILDERS: tuple[Builder, ...] = (
    _tagging,
    _preferences,
    _marked,
    _conversations,
    _instructions,
    _labelled,
    alike,
)
# where nothing of these fits, or a task is named
OTHERWISE: tuple[Builder, ...] = (_two_texts, any_two_texts, alike_by_label, _plain)


def _check_labels(table: Profile, given: Given) -> None:
    """DataError for a text beside a column that is called a label and can be none."""
    named = next((one for name, one in table.columns.items() if name.casefold() in LABEL), None)
    if named is not None and not named.repeats and table.texts() and not given:
        raise _no_label(table, named)


def _no_label(table: Profile, column: Column) -> DataError:
    """The error for a column that was named as the label and is none."""
    others = [
        f"{one.name} ({one.distinct})"
        for one in likeliest(table.columns.values(), LABELS)
        if one.repeats and not one.is_identity and one.name != column.name
    ]
    if not column.filled:
        what = "is empty"
    elif column.distinct < 2:
        what = "has the same value in every row"
    elif column.distinct == column.filled:
        what = "has another value in every row"
    else:
        what = f"has {column.distinct} values in {column.filled} rows"
    return DataError(
        f'the column "{column.name}" is no label: it {what}',
        where=table.source,
        expected="a column whose values repeat" + (f": {', '.join(others[:5])}" if others else ""),
        fix=f"Name it with --label {quoted(others[0].rpartition(' (')[0])}."
        if others
        else "Give rows with a label, or read the file otherwise (--task).",
    )


def _nothing(table: Profile, given: Given, task: str | None) -> DataError:
    """The error for a file that nothing can be made of as asked."""
    has = ", ".join(f"{one.name} ({_held(one)})" for one in table.columns.values())
    options = "".join(f" --{key.replace('_', '-')} {quoted(v)}" for key, v in given.items())
    asked = (f"--task {task}" if task else "") + options
    no_text = not table.texts()
    return DataError(
        (f"nothing fits {asked.strip()}" if asked else "nothing to learn from is found")
        + (": there is no column of text" if no_text and not asked else ""),
        where=table.source,
        expected="columns such as text and label, prompt and completion, messages, tokens and tags,"
        " chosen and rejected, or anchor and positive",
        got=f"the columns {has or '(none)'}",
        fix="Name them with --text and --label, or --prompt and --completion.",
    )


def _held(column: Column) -> str:
    names: dict[str, Any] = {
        "text": f"text, {column.distinct} values",
        "number": "numbers",
        "bits": "0 or 1",
        "strings": "lists",
        "list": "lists",
        "object": "objects",
        "nothing": "empty",
    }
    return str(names[column.holds])
