"""What a user should know of the rows of a stage: rows that repeat or contradict each other, that
are measured although they are learned, that came through a wrong encoding; labels that are rare,
alike or nearly all there is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgetune.data.alike import alike_keys, equal_key
from edgetune.data.row import Row, RowTexts
from edgetune.data.rows import Rows

NAMED = 3  # labels that a line names
PLACES = 5  # lines that a finding keeps
MANY, FEW_CUT = 0.1, 0.02  # shares of the rows that are worth a warning
ONE_SIDED = 0.8  # of all rows one label: its share is what a model gets that learned nothing
# UTF-8 read as a one-byte encoding leaves Ã¼, â€™, Ð° or ï»¿; what is no character at all, U+FFFD
HIGH = "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in range(0x80, 0xC0))
TRAIL = f"[{re.escape(HIGH)}\x80-\x9f]"
MOJIBAKE = re.compile(f"\ufffd|[\xc2-\xdf]{TRAIL}|[\xe0-\xef]{TRAIL}{{2}}|[\xf0-\xf4]{TRAIL}{{3}}")
SINGLE_BYTES = {character: 0x80 + at for at, character in enumerate(HIGH)}
NOTHING = {"nan", "n/a", "#n/a", "null", "<na>", "nat", "undefined"}  # in small letters
SENTENCE = 3  # words
NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")
QUOTES = "”“’‘»…"  # which may stand behind a capital Ã or É for themselves


@dataclass(frozen=True)
class Finding:
    """Something found in `rows` of `of` rows (or labels); `line` says it in a sentence.

    `lines`: where the first of them stand. `matters`: worth a warning before a training.
    """

    kind: str
    rows: int
    of: int
    line: str
    matters: bool
    lines: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON; lines of several files as they are printed."""
        lines = [int(one) if type(one) is int else str(one) for one in self.lines]
        return asdict(self) | {"lines": lines}


def find(
    train: Sequence[RowTexts],
    validation: Sequence[RowTexts],
    *,
    labelled: bool,
    one_label: bool = False,
) -> list[Finding]:
    """What the rows of a stage show by themselves. `labelled`: a text has one right answer, a
    label, tags or a number; `one_label`: each row has one of several.
    """
    found: list[Finding | None] = [_repeated(train), _mojibake([*train, *validation])]
    if labelled:
        found.append(_contradicting(train))
    if validation:
        found += _leaked(train, validation, labelled=labelled)
    if one_label:
        found += [_rare(train), _one_sided(train)]
    found += [_alike_labels({name for row in train for name in row.names}), _no_labels(train)]
    return [one for one in found if one is not None and one.rows]


def without_names(sources: Mapping[str, Rows]) -> list[Finding]:
    """Tables whose first line seems to be a row, and was taken for the columns' names."""
    apart = dict[str, tuple[str, Rows]]()  # rows that are held out have the same first line
    for name, source in sources.items():
        apart.setdefault(source.source, (name, source))
    return [
        Finding(
            "first-line",
            1,
            len(source.rows) + 1,
            f"the first line of the {name} file is taken for the columns' names, and may be a row:"
            f' "{like}" is one of them. Put a line with names, such as text and label, above it',
            matters=True,
        )
        for name, source in apart.values()
        if (like := _value_as_name(source.rows)) is not None
    ]


def _value_as_name(rows: Sequence[Row]) -> str | None:
    """A column's name that is a number or a value of its column, beside one that is, too, or is a
    sentence.
    """
    names = [*rows[0].values] if rows else []
    again = [
        name
        for name in names
        if sum(_is_text(row.values.get(name), name) for row in rows) > 1 or NUMBER.fullmatch(name)
    ]
    sentence = any(len(name.split()) >= SENTENCE for name in names)
    words = [name for name in again if not NUMBER.fullmatch(name)]
    return again[-1] if again and (sentence or len(words) > 1) else None


def _is_text(value: Any, text: str) -> bool:
    return isinstance(value, str) and value.strip() == text


def unusable(skipped: Mapping[str, int]) -> list[Finding]:
    """Rows that were left out, by what they are for."""
    return [
        Finding("unusable", count, 0, f"{count} {name} rows skipped", matters=True)
        for name, count in skipped.items()
        if count
    ]


def cut(
    truncated: Mapping[str, int], rows: Mapping[str, Collection[int]], limit: int
) -> list[Finding]:
    """Rows whose end the model never sees, by what they are for."""
    return [
        Finding(
            "cut",
            count,
            len(rows[name]),
            f"{count} {name} rows truncated to {limit} tokens",
            matters=count > FEW_CUT * len(rows[name]),
        )
        for name, count in truncated.items()
        if count
    ]


def standing(measured: int, total: int) -> str:
    """That so many of the validation rows stand in train too."""
    share = "all" if measured == total else f"{measured} of"
    return (
        f"{share} {total} validation rows stand in train too: what is measured on them says nothing"
        " of other rows"
    )


def is_mojibake(text: str) -> bool:
    """Whether a text has characters that a wrong encoding leaves."""
    return _mojibake_at(text) is not None


def _mojibake_at(text: str) -> int | None:
    """Where the first of these characters is."""
    for one in MOJIBAKE.finditer(text):
        before = text[one.start() - 1 : one.start()]
        if one[0][1:] in QUOTES and one[0] != "\ufffd" and not before.islower():
            continue
        try:
            if one[0] != "\ufffd":
                bytes(SINGLE_BYTES.get(c, ord(c)) for c in one[0]).decode("utf-8")
        except (UnicodeDecodeError, ValueError):
            continue
        return one.start()
    return None


def _first(rows: Iterable[RowTexts]) -> tuple[int, ...]:
    return tuple(row.line for _, row in zip(range(PLACES), rows, strict=False))


def _repeated(train: Sequence[RowTexts]) -> Finding:
    seen, again = set[tuple[str, str]](), list[RowTexts]()
    for row in train:
        key = row.asked.strip(), row.answered.strip()
        again += [row] if key in seen else []
        seen.add(key)
    return Finding(
        "repeated",
        len(again),
        len(train),
        f"{len(again)} of {len(train)} training rows repeat an earlier one",
        matters=len(again) > MANY * len(train),
        lines=_first(again),
    )


def _contradicting(train: Sequence[RowTexts]) -> Finding:
    answers: dict[str, dict[str, RowTexts]] = {}
    for row in train:
        answers.setdefault(equal_key(row.asked), {}).setdefault(row.answered, row)
    against = [[*found.values()] for found in answers.values() if len(found) > 1]
    lines = tuple(row.line for pair in against[:PLACES] for row in pair[:2])
    where = f" (the first in lines {lines[0]} and {lines[1]})" if against else ""
    return Finding(
        "contradicting",
        len(against),
        len(answers),
        f"texts with contradicting labels: {len(against)}{where}",
        matters=True,
        lines=lines,
    )


def _leaked(
    train: Sequence[RowTexts], validation: Sequence[RowTexts], *, labelled: bool
) -> list[Finding]:
    """Validation rows that stand in train: exactly, and nearly."""

    def exact(row: RowTexts) -> tuple[str, str]:
        return row.asked.strip(), "" if labelled else row.answered.strip()

    learned = {exact(row) for row in train}
    same = [row for row in validation if exact(row) in learned]
    keys = alike_keys([row.asked for row in [*train, *validation]])
    near_ones = set(keys[: len(train)])
    nearly = [
        row
        for row, key in zip(validation, keys[len(train) :], strict=True)
        if key in near_ones and exact(row) not in learned
    ]
    total = len(validation)
    like = "ask what a training row asks" if any(row.answered for row in nearly) else "are known"
    return [
        Finding(
            "validation-in-train",
            len(same),
            total,
            standing(len(same), total),
            matters=True,
            lines=_first(same),
        ),
        Finding(
            "validation-nearly-in-train",
            len(nearly),
            total,
            f"{len(nearly)} of {total} validation rows {like}, but for case, spaces, digits and"
            " punctuation",
            matters=len(nearly) > MANY * total,
            lines=_first(nearly),
        ),
    ]


def _mojibake(rows: Sequence[RowTexts]) -> Finding:
    odd = [row for row in rows if is_mojibake(f"{row.asked}\n{row.answered}")]
    shown = ""
    if odd:
        text = f"{odd[0].asked}\n{odd[0].answered}"
        at = _mojibake_at(text) or 0
        around = " ".join(text[max(0, at - 10) : at + 10].split())
        shown = f', the first in line {odd[0].line}: "{around}"'
    return Finding(
        "mojibake",
        len(odd),
        len(rows),
        f"{len(odd)} rows have characters that a wrong encoding leaves{shown} (data.encoding sets"
        " the right one)",
        matters=True,
        lines=_first(odd),
    )


def _rare(train: Sequence[RowTexts]) -> Finding:
    """Labels of one row."""
    counts = label_counts(train)
    rare = sorted(name for name, count in counts.items() if count == 1)
    named = ", ".join(repr(name) for name in rare[:NAMED])
    more = f" and {len(rare) - NAMED} more" if len(rare) > NAMED else ""
    return Finding(
        "rare-labels",
        len(rare),
        len(counts),
        f"labels with a single training row: {named}{more}",
        matters=True,
        lines=_first(row for row in train if set(row.names) & set(rare)),
    )


def _one_sided(train: Sequence[RowTexts]) -> Finding | None:
    counts = label_counts(train)
    if not counts:
        return None
    label, most = max(counts.items(), key=lambda one: one[1])
    share = most / max(1, len(train))
    return Finding(
        "one-sided",
        most if share >= ONE_SIDED else 0,
        len(train),
        f"{share:.0%} of the training rows are {label!r}: an accuracy of {share:.2f} is what always"
        " answering it gets; look at macro-F1",
        matters=True,
    )


def _alike_labels(labels: Iterable[str]) -> Finding | None:
    twins: dict[str, list[str]] = {}
    for label in sorted(labels):
        twins.setdefault(equal_key(label.replace("_", " ")), []).append(label)
    alike = [found for found in twins.values() if len(found) > 1]
    said = "; ".join(", ".join(repr(label) for label in found) for found in alike[:NAMED])
    return Finding(
        "alike-labels",
        len(alike),
        len(twins),
        f"labels that differ only in case or spaces: {said} (data.normalise_labels = true makes"
        " them one)",
        matters=True,
    )


def _no_labels(train: Sequence[RowTexts]) -> Finding:
    """Labels that programs write where there is none."""
    rows = [row for row in train if any(name.casefold() in NOTHING for name in row.names)]
    names = sorted({name for row in rows for name in row.names if name.casefold() in NOTHING})
    return Finding(
        "no-label",
        len(rows),
        len(train),
        f"{len(rows)} training rows have the label {' or '.join(map(repr, names))}, which usually"
        " stands where there is none: it is learned like any other",
        matters=True,
        lines=_first(rows),
    )


def label_counts(rows: Iterable[RowTexts]) -> Mapping[str, int]:
    """Label → rows that have it, the most frequent first."""
    return dict(Counter(name for row in rows for name in row.names).most_common())
