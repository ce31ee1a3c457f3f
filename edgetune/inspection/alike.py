"""Rows of texts that are alike, which an embedding learns from: pairs and triplets, pairs with a
number, any two columns of text, and texts with the same label.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgetune.data.contrasts import ANCHORS, POSITIVES, SCORES
from edgetune.data.rows import Rows
from edgetune.inspection.columns import LABELS, Profile, likeliest
from edgetune.inspection.reading import PAIRS, Given, Reading

TASK = "contrastive"
NEGATIVE = "negative"


def alike(source: Rows, table: Profile, given: Given) -> Iterator[Reading]:
    """Two columns whose names say that they belong together, and perhaps a third that does not, or
    a number that says how much.
    """
    named = [*PAIRS, *((first, second) for first in ANCHORS for second in POSITIVES)]
    both = next((pair for pair in named if {*pair} <= {*table.texts_by_name()}), None)
    if {"text", "text_pair"} <= set(given):
        both = given["text"], given["text_pair"]
    if both is not None:
        yield from _pairs(table, *both, given)


def any_two_texts(source: Rows, table: Profile, given: Given) -> Iterator[Reading]:
    """The first two columns of text, whatever they are called."""
    known = table.texts_by_name()
    texts = [n for n in table.columns if n in known and not known[n].could_be_label]
    asked = [given.get(key) for key in ("text", "text_pair", NEGATIVE)]
    left = [name for name in texts if name not in asked]
    first = asked[0] or next(iter(left), None)
    second = asked[1] or next((name for name in left if name != first), None)
    if first and second and "label" not in given:
        yield from _pairs(table, first, second, given)


def alike_by_label(source: Rows, table: Profile, given: Given) -> Iterator[Reading]:
    """Texts of which those with the same label are alike; said only where it is asked for."""
    text = given.get("text") or next((one.name for one in table.texts()), None)
    if text is None or {"text_pair", NEGATIVE} & set(given):
        return
    usable = [
        column.name
        for column in likeliest(table.columns.values(), LABELS)
        if column.repeats and column.name != text and not column.has_fractions
        if column.holds in ("text", "number", "bits") and not column.is_identity
    ]
    label = given.get("label") or next(iter(usable), None)
    if label is not None:
        what = f'the text in "{text}"; those with the same "{label}" are alike'
        yield Reading(TASK, {"text": text, "label": label}, what)


def _pairs(table: Profile, first: str, second: str, given: Given) -> Iterator[Reading]:
    """As a pair, or as one with a number; not where another column is a label of both."""
    data = {"text": first, "text_pair": second}
    said = f'two texts that are alike in "{first}" and "{second}"'
    negative = given.get(NEGATIVE, NEGATIVE)
    if negative in table.columns:
        yield Reading(TASK, data | {NEGATIVE: negative}, f'{said}, one that is not in "{negative}"')
        return
    score = _score(table, data, given)
    if score is not None:
        what = f'two texts in "{first}" and "{second}", a number in "{score}" how much alike'
        point = table.columns[score].point if score in table.columns else None
        yield Reading(TASK, data | {"label": score}, what, point)
    elif "label" not in given and ("text_pair" in given or not _labels(table, data)):
        yield Reading(TASK, data, f"{said}; an embedding learns to find one by the other")


def _score(table: Profile, data: Given, given: Given) -> str | None:
    """The column with a number how much alike the two texts are."""
    if "label" in given:
        return given["label"] if "{" in given["label"] else _number(table, given["label"])
    names = [one.name for one in likeliest(table.columns.values(), (*SCORES, *LABELS))]
    return next(
        (name for name in names if name not in data.values() and _number(table, name)), None
    )


def _number(table: Profile, name: str) -> str | None:
    column = table.columns.get(name)
    if column is None or column.is_identity or column.distinct < 2:
        return None
    says = name in SCORES and column.holds == "number"
    return name if says or column.is_continuous or column.holds == "bits" else None


def _labels(table: Profile, data: Given) -> bool:
    """Whether a column beside the texts could be a label of both."""
    return any(
        column.repeats and not column.is_identity
        for column in table.columns.values()
        if column.name not in data.values() and column.holds in ("text", "number", "bits")
    )
