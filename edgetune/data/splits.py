"""The rows of a stage: its files read, brought into the shape that its method reads, and some of
them held out; one rule for training and for the proof of an export.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace

from edgetune.core.errors import DataError
from edgetune.core.tasks import TAGGING
from edgetune.data.prompts import PromptFormat, prompt_format, render
from edgetune.data.row import Row
from edgetune.data.rows import Rows, read_rows
from edgetune.data.sentences import sentences
from edgetune.data.tagging import tagged_rows
from edgetune.data.targets import multi_label_rows
from edgetune.recipe.schema import Stage

NamesOf = Callable[[Row], Collection[str]]


def stage_rows(stage: Stage, *, seed: int) -> dict[str, Rows]:
    """Rows of `train`, and of `validation` where the recipe has such a file or holds rows out."""
    data = stage.data
    found = {"train": _read(stage, data.train)}
    if data.validation is not None:
        found["validation"] = _read(stage, data.validation)
    elif data.hold_out is not None:
        found["train"], found["validation"] = hold_out(
            found["train"], data.hold_out, seed=seed, names_of=_names_of(stage, found["train"])
        )
    return found


def validation_rows(stage: Stage, *, seed: int) -> Rows:
    """The rows of a stage that has some for validation; `train` is read only to hold them out."""
    if stage.data.validation is not None:
        return _read(stage, stage.data.validation)
    return stage_rows(stage, seed=seed)["validation"]


def _read(stage: Stage, source: str | tuple[str, ...]) -> Rows:
    rows = read_rows(source, stage.data.skip_invalid, stage.data.encoding)
    return sentences(rows) if stage.task == TAGGING else rows


def hold_out(
    source: Rows, count: int, *, seed: int, names_of: NamesOf | None = None
) -> tuple[Rows, Rows]:
    """The rows without `count` drawn ones, and these; both in file order. The same seed draws the
    same rows.

    With `names_of`, the labels or tags of a row, every combination of them gives its share, and
    none of them is held out with all its rows.
    """
    total = len(source.rows)
    if count >= total:
        raise DataError(
            "data.hold_out leaves no row to train on",
            where=source.source,
            expected=f"less than {total}",
            got=str(count),
        )
    draw = random.Random(seed)
    if names_of is None:
        drawn = set(draw.sample(range(total), count))
    else:
        drawn = _stratified(source, count, [frozenset(names_of(row)) for row in source.rows], draw)
    kept = [row for at, row in enumerate(source.rows) if at not in drawn]
    held = [row for at, row in enumerate(source.rows) if at in drawn]
    validation = replace(source, rows=held, skipped=0, notes=[f"{count} rows held out of train"])
    return replace(source, rows=kept), validation


def _stratified(
    source: Rows, count: int, names: list[frozenset[str]], draw: random.Random
) -> set[int]:
    """Places of `count` rows: of each combination of names the same share, never all of a name."""
    sizes, seen = Counter(names), Counter[frozenset[str]]()
    order = list(range(len(names)))
    draw.shuffle(order)
    share = {}
    for at in order:  # the first of two rows is due at a quarter of the way, the second at three
        share[at] = (seen[names[at]] + 0.5) / sizes[names[at]]
        seen[names[at]] += 1
    left = Counter(name for row in names for name in row)
    drawn: set[int] = set()
    for at in sorted(order, key=lambda one: share[one]):
        if len(drawn) < count and all(left[name] > 1 for name in names[at]):
            drawn.add(at)
            left.subtract(names[at])
    if len(drawn) < count:
        raise DataError(
            "data.hold_out leaves some label without a row to train on",
            where=source.source,
            expected=f"at most {len(drawn)}",
            got=str(count),
        )
    return drawn


def _names_of(stage: Stage, source: Rows) -> NamesOf | None:
    """What must not vanish from training when rows are held out; None where there are no names."""
    if stage.method not in ("sequence-classification", "token-classification"):
        return None
    if stage.problem == "regression":
        return None
    form = prompt_format(
        stage.data, method=stage.method, chat_template=None, columns=source.rows[0].values
    )
    found = {row.line: _names(stage, replace(source, rows=[row]), form) for row in source.rows}
    return lambda row: found[row.line]


def _names(stage: Stage, one: Rows, form: PromptFormat) -> Collection[str]:
    """The labels or tags of a single row; none where it cannot be used."""
    (row,) = one.rows
    try:
        if stage.task == TAGGING:
            return {tag for tagged in tagged_rows(one, form)[0] for tag in tagged.tags}
        if stage.problem == "multi-label":
            return {label for found in multi_label_rows(one, form)[0] for label in found.target}
        return (render(form.label or "", row.values, where="", field="label").strip(),)
    except DataError:
        return ()
