"""The columns of a file: what each holds, how often values repeat, how long its texts are."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from edgetune.core.errors import DataError
from edgetune.core.numbers import number_of, point_of
from edgetune.core.settings import nearest
from edgetune.data.label_sets import BIT_VALUES
from edgetune.data.rows import Rows, spread

LABEL_WORDS = 5  # of a label, on the mean, at most
LOOKED_AT = 5000  # rows, at equal distances
MEASURED = 0.9  # of a column's values are numbers where it holds some
NEAR = 10  # times as far apart as there are rows
DATE = re.compile(r"\d{1,4}([-./])\d{1,2}\1\d{1,4}([T ]+\d.*)?")
Holds = Literal["text", "number", "bits", "strings", "list", "object", "nothing"]
# by name: what a person means by a column; the first of these that is there is taken
TEXTS = (
    "text", "texts", "sentence", "utterance", "message", "content", "body", "comment", "review",
    "tweet", "post", "ticket", "email", "mail", "request", "query", "question", "sms", "document",
    "article", "abstract", "description", "summary", "title", "headline", "subject", "name",
)  # fmt: skip
LABELS = (
    "label", "labels", "label_text", "category", "categories", "class", "classes", "intent",
    "intents", "target", "sentiment", "topic", "topics", "genre", "department", "queue", "type",
    "tag", "tags", "emotion", "language", "priority", "urgency", "polarity", "score", "rating",
    "stars", "grade", "price", "value", "y", "output", "gold", "annotation", "code",
)  # fmt: skip
SEVERAL = {"labels", "categories", "classes", "intents", "topics", "tags"}  # 1,2 are two of them
IDENTITY = re.compile(
    r"(.*_)?(id|ids|idx|index|uuid|guid|key|row|nr|no|number|date|time|timestamp|created.*|"
    r"updated.*|url|link|split|fold|source|author|user|username)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Column:
    """What a column holds. `words`: of its texts, on the mean. `point`: what stands before the
    fractions of numbers that are not written plainly; their `values` are.
    """

    name: str
    holds: Holds
    filled: int  # rows that have something in it
    values: Counter[str]
    words: float
    point: str | None = None

    @property
    def distinct(self) -> int:
        """How many different values."""
        return len(self.values)

    @property
    def is_identity(self) -> bool:
        """Whether it names its row, or where it comes from, and says nothing about its text."""
        if IDENTITY.fullmatch(self.name.strip().replace(" ", "_").replace("-", "_")):
            return True
        if _place(self.name, TEXTS) < len(TEXTS):
            return False
        if self.holds == "text" and self.values and all(map(DATE.fullmatch, self.values)):
            return True
        short = self.holds in ("text", "number") and self.words < 2 and not self.has_fractions
        differ = short and self.filled > 20 and self.distinct == self.filled
        return differ and not (self.holds == "number" and self._is_spread)

    @property
    def _is_spread(self) -> bool:
        """Whether different whole numbers measure something: those that count rows go up or down,
        are near each other or have as many digits each.
        """
        numbers = [int(float(one)) for one in self.values]
        ordered = numbers in (sorted(numbers), sorted(numbers, reverse=True))
        near = max(numbers) - min(numbers) < NEAR * len(numbers)
        return not (ordered or near or len({len(str(one)) for one in numbers}) == 1)

    @property
    def repeats(self) -> bool:
        """Whether its values are few enough to be labels: at least two, two rows each."""
        return 2 <= self.distinct <= max(2, self.filled // 2)

    @property
    def could_be_label(self) -> bool:
        """Whether its texts repeat and are short."""
        return self.repeats and self.words <= LABEL_WORDS

    @property
    def is_continuous(self) -> bool:
        """Whether its numbers are measured, and not those of classes: with fractions, or many that
        are not simply 0, 1, 2 …
        """
        if self.holds != "number" or self.has_fractions or self.point is not None:
            return self.holds == "number"
        numbers = {int(float(one)) for one in self.values}
        in_a_row = min(numbers) in (0, 1) and max(numbers) - min(numbers) + 1 == len(numbers)
        return self.distinct > 20 and not (in_a_row and self.repeats)

    @property
    def has_fractions(self) -> bool:
        """Whether some of its numbers are not whole."""
        whole = all(re.fullmatch(r"[+-]?\d+(\.0*)?", one) for one in self.values)
        return self.holds == "number" and not whole


@dataclass(frozen=True)
class Profile:
    """A file's columns by name, and some of its rows."""

    source: str
    columns: Mapping[str, Column]
    rows: Sequence[Mapping[str, Any]]

    def named(self, name: str, *, option: str) -> Column:
        """The column of this name, which the user has given. DataError where there is none."""
        if name in self.columns:
            return self.columns[name]
        hint = nearest(name, list(self.columns))
        raise DataError(
            f'there is no column "{name}"',
            where=f"{self.source}, {option}",
            expected=hint["expected"] or "the columns " + ", ".join(self.columns),
            got=f'"{name}"',
            fix=hint["fix"] or f"Name one of them with {option}.",
        )

    def texts(self) -> list[Column]:
        """Columns of text that a model could read, the likeliest first: by name, then by length."""
        found = [
            column
            for column in self.columns.values()
            if column.holds == "text" and not column.is_identity and column.distinct > 1
        ]
        return sorted(found, key=lambda one: (_place(one.name, TEXTS), -one.words))

    def texts_by_name(self) -> dict[str, Column]:
        """The same by name."""
        return {one.name: one for one in self.texts()}


def profile(source: Rows) -> Profile:
    """The columns of all rows."""
    rows = [row.values for row in spread(source.rows, LOOKED_AT)]
    names = dict.fromkeys(name for values in rows for name in values)
    columns = {name: _column(name, [values.get(name) for values in rows]) for name in names}
    return Profile(source.source, columns, rows)


def likeliest(columns: Iterable[Column], names: Sequence[str]) -> list[Column]:
    """Columns in the order of these names; those of other names after them, fewest values first."""
    return sorted(columns, key=lambda one: (_place(one.name, names), one.distinct))


def _place(name: str, names: Sequence[str]) -> int:
    """Where a name stands among usual ones, also as a part of it ("Ticket Text")."""
    plain = re.sub(r"[^a-z]+", " ", name.casefold()).strip()
    if plain.replace(" ", "_") in names:
        return names.index(plain.replace(" ", "_"))
    parts = [names.index(part) for part in plain.split() if part in names]
    return len(names) + min(parts, default=len(names))


def _column(name: str, values: Sequence[Any]) -> Column:
    filled = [value for value in values if value is not None and value != ""]
    texts = [one for one in filled if isinstance(one, str)]
    words = sum(len(text.split()) for text in texts) / max(1, len(texts))
    holds = _holds(filled)
    if holds == "text" and (measured := _measured(name, filled, words)) is not None:
        return measured
    counted = Counter(one.strip() if isinstance(one, str) else _spelled(one) for one in filled)
    return Column(name, holds, len(filled), counted, words)


def _measured(name: str, filled: Sequence[Any], words: float) -> Column | None:
    """A column of numbers that are not written plainly, or of which a few are none ("n/a"); None
    where these are too many, or may be the names of classes.
    """
    texts = [_spelled(one) for one in filled]
    point = point_of(texts, share=MEASURED)
    if point is None or (point == "," and name.casefold() in SEVERAL):
        return None
    numbers = Counter[str]()
    for one in filled:
        with suppress(ValueError):
            numbers[f"{number_of(one, point):.10g}"] += 1
    plain = point == "." and all(map(_is_number, (t for t in texts if point_of([t]))))
    column = Column(name, "number", numbers.total(), numbers, words, None if plain else point)
    return column if column.is_continuous else None


def _holds(filled: Sequence[Any]) -> Holds:
    if not filled:
        return "nothing"
    if all(isinstance(one, list) for one in filled):
        items = [item for one in filled for item in one]
        return "strings" if all(isinstance(item, (str, int)) for item in items) else "list"
    if all(isinstance(one, dict) for one in filled):
        return "object"
    if all(_spelled(one).strip().lower() in BIT_VALUES for one in filled):
        return "bits"
    if all(_is_number(one) for one in filled):
        return "number"
    return "text"


def _is_number(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return True
    try:
        return isinstance(value, str) and abs(float(value)) < float("inf")
    except ValueError:
        return False


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
