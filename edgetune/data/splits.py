"""The rows of a stage: its files read, brought into the shape that its method reads, and some of
them held out; one rule for training and for the proof of an export.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgetune.core.errors import DataError
from edgetune.core.tasks import TAGGING
from edgetune.data.alike import alike_keys
from edgetune.data.row import RowTexts
from edgetune.data.row_texts import row_texts
from edgetune.data.rows import Rows, read_rows
from edgetune.data.sentences import sentences
from edgetune.recipe.schema import Stage

# without a word in the recipe: a tenth of the rows, at least and at most so many; of less than
# ENOUGH rows none, for LEAST of them would be missed
SHARE, LEAST, MOST, ENOUGH = 10, 20, 1000, 100
BINS = 5  # of numbers, each of which gives its share
NAMED = 4  # labels that a line names


def stage_rows(stage: Stage, *, seed: int) -> dict[str, Rows]:
    """Rows of `train`, and of `validation` where the recipe has such a file or rows are held
    out.
    """
    data = stage.data
    found = {"train": _read(stage, data.train)}
    if data.validation is not None:
        found["validation"] = _read(stage, data.validation)
    elif data.hold_out != 0:
        held_out = hold_out(stage, found["train"], seed=seed)
        if held_out is not None:
            found["train"], found["validation"] = held_out
    return found


def as_run(stage: Stage) -> Stage:
    """The stage of a run's recipe, which says how many rows it held out; one that does not is of
    before, when none were.
    """
    if stage.data.validation is not None or stage.data.hold_out is not None:
        return stage
    return replace(stage, data=replace(stage.data, hold_out=0))


def validation_rows(stage: Stage, *, seed: int) -> Rows:
    """The rows of a stage that has some for validation; `train` is read only to hold them out."""
    if stage.data.validation is not None:
        return _read(stage, stage.data.validation)
    return stage_rows(stage, seed=seed)["validation"]


def _read(stage: Stage, source: str | tuple[str, ...]) -> Rows:
    rows = read_rows(source, stage.data.skip_invalid, stage.data.encoding)
    return sentences(rows) if stage.task == TAGGING else rows


def usual_hold_out(rows: int) -> int:
    """How many of so many rows are held out where the recipe does not say."""
    return 0 if rows < ENOUGH else min(MOST, max(LEAST, rows // SHARE))


def hold_out(stage: Stage, source: Rows, *, seed: int) -> tuple[Rows, Rows] | None:
    """The rows without those that are held out, and these; both in file order, the same for the
    same seed. None where none are, which is noted.

    Rows that ask the same or nearly so stay together. Every label (or combination of labels or
    tags) gives its share, and of each some row is left to train on. Rows that cannot be used are
    not held out.
    """
    asked = stage.data.hold_out
    total = len(source.rows)
    if asked is not None and asked >= total:
        raise DataError(
            "data.hold_out leaves no row to train on",
            where=source.source,
            expected=f"less than {total}",
            got=str(asked),
        )
    texts, _ = row_texts(stage, source)
    count = usual_hold_out(min(len(texts), stage.data.limit or len(texts)))
    count = count if asked is None else asked
    if not count:
        source.note(
            f"nothing is held out of less than {ENOUGH} rows (data.hold_out = N draws N of them)"
        )
        return None
    groups = _groups(_binned(texts) if stage.problem == "regression" else texts)
    drawn = _drawn(groups, count, random.Random(seed))
    if not drawn and asked is None:
        source.note("nothing is held out: all rows ask the same, or no label has a second text")
        return None
    if not drawn:
        raise DataError(
            "data.hold_out can draw no row",
            where=source.source,
            expected="rows that ask something else than others, of labels with several rows",
            got=f"{total} rows",
            fix="Name a file with data.validation.",
        )
    lines = {text.line for group in drawn for text in group.rows}
    kept = [row for row in source.rows if row.line not in lines]
    held = [row for row in source.rows if row.line in lines]
    notes = _notes(groups, drawn, len(held), asked)
    return replace(source, rows=kept), replace(source, rows=held, skipped=0, notes=notes)


@dataclass(frozen=True)
class _Group:
    """Rows that stay on one side, and the labels in them."""

    rows: list[RowTexts]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for row in self.rows for name in row.names)

    @property
    def counts(self) -> Counter[str]:
        """Label → rows that have it."""
        return Counter(name for row in self.rows for name in row.names)


def _binned(texts: Sequence[RowTexts]) -> list[RowTexts]:
    """The rows with the fifth of all numbers that theirs lies in for a name, so that small and
    large ones are held out alike.
    """
    order = sorted(range(len(texts)), key=lambda at: float(texts[at].answered))
    fifth = {at: str(BINS * place // len(texts)) for place, at in enumerate(order)}
    return [replace(row, names=(fifth[at],)) for at, row in enumerate(texts)]


def _groups(texts: Sequence[RowTexts]) -> list[_Group]:
    """Rows that ask nearly the same; where half of all do, those that are answered so, too."""
    keys = alike_keys([row.asked for row in texts])
    if texts and 2 * max(Counter(keys).values()) > len(texts):
        keys = alike_keys([f"{row.asked}\n{row.answered}" for row in texts])
    found: dict[str, list[RowTexts]] = {}
    for key, row in zip(keys, texts, strict=True):
        found.setdefault(key, []).append(row)
    return [_Group(rows) for rows in found.values()]


def _drawn(groups: Sequence[_Group], count: int, draw: random.Random) -> list[_Group]:
    """Groups of `count` rows together (or less): of each combination of names the same share, never
    all of a name.
    """
    names = [group.names for group in groups]
    sizes, seen = Counter[frozenset[str]](), Counter[frozenset[str]]()
    for group, combination in zip(groups, names, strict=True):
        sizes[combination] += len(group.rows)
    order = list(range(len(groups)))
    draw.shuffle(order)
    share = {}
    for at in order:  # the first of two rows is due at a quarter of the way, the second at three
        size = len(groups[at].rows)
        share[at] = (seen[names[at]] + size / 2) / sizes[names[at]]
        seen[names[at]] += size
    left = Counter(name for group in groups for name in group.counts.elements())
    drawn, room = list[_Group](), count
    for at in sorted(order, key=lambda one: share[one]):
        group = groups[at]
        if len(group.rows) <= room and all(left[n] > k for n, k in group.counts.items()):
            drawn.append(group)
            room -= len(group.rows)
            left.subtract(group.counts)
    return drawn


def _notes(
    groups: Sequence[_Group], drawn: Sequence[_Group], held: int, asked: int | None
) -> list[str]:
    """What is said of a hold-out."""
    said = f"{held} rows held out of train" + ("" if asked is None else " by data.hold_out")
    if asked is not None and held < asked:
        said += f", not {asked}, for rows that ask the same stay together and each label keeps one"
    sizes = [len(group.rows) for group in groups]
    too_many = sum(size for size in sizes if size > held and SHARE * size >= sum(sizes))
    learned = [f"{too_many} rows that ask the same are all learned: nothing is measured on them"]
    every, measured = ({name for one in some for name in one.names} for some in (groups, drawn))
    alone = sorted(every - measured)
    notes = [said, *(learned if too_many else [])]
    if alone:
        named = ", ".join(repr(name) for name in alone[:NAMED])
        more = f" and {len(alone) - NAMED} more" if len(alone) > NAMED else ""
        notes.append(f"no row is held out of {named}{more}, which have too few")
    return notes
