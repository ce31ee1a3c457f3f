"""Settings that fit a file: passes, rate, batch and longest example, from how many rows there are
and how long they are in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.core.tasks import METHODS
from edgetune.inspection.reading import Reading
from edgetune.recipe.schema import Stage
from edgetune.training.automatic import epochs_of, rate_of

FEW = 20  # rows a label: there the label's own name helps
LABELS_FROM = 10  # labels
MANY_ROWS = 2000  # from which a step takes more of them
STEP = 16  # max_length is a multiple of this
CUT = 0.99  # of the rows are read whole where the others may be cut
PACKED = 512  # tokens of a sequence that documents are packed into


@dataclass(frozen=True)
class Setting:
    """A key of the recipe, its value, and why."""

    key: str
    value: Any
    why: str = ""


@dataclass(frozen=True)
class Size:
    """What the settings are chosen by. `lengths`: tokens of every row, validation too."""

    rows: int  # that are learned
    examples: int  # that they give, the names of labels too
    labels: int
    lengths: Sequence[int]
    hidden: int
    positions: int  # tokens that the base has places for


def longest(reading: Reading, size: Size) -> Setting:
    """`max_length`: of texts that may be cut, where 99 % end; of answers, where all do."""
    most = size.positions
    if reading.method == "causal-lm":
        value = min(PACKED, most, _rounded(sum(size.lengths)))
        return Setting("max_length", value, "documents are packed into sequences of this length")
    lengths = sorted(size.lengths)
    whole = lengths[-1]
    usual = lengths[math.ceil(CUT * len(lengths)) - 1]
    if reading.method == "masked-lm":
        value = min(most, _rounded(min(whole, PACKED)))
        return Setting("max_length", value, f"the longest text has {whole} tokens")
    wanted = usual if can_be_cut(reading) and whole > 2 * usual else whole
    value = min(most, _rounded(wanted))
    over = sum(length > value for length in lengths)
    why = f"the longest row has {whole} tokens"
    if over:
        done = "cut" if can_be_cut(reading) else "left out"
        why += f"; {over} of {len(lengths)} rows are {done}"
    return Setting("max_length", value, why)


def can_be_cut(reading: Reading) -> bool:
    """Whether a row that is too long loses its end; otherwise it cannot be used."""
    return "encoder" in METHODS[reading.method].kinds


def _rounded(tokens: int) -> int:
    """With room for rows that are a little longer than those seen, as a multiple of STEP."""
    return max(2 * STEP, math.ceil(tokens * 1.1 / STEP) * STEP)


def few_rows_a_label(size: Size) -> bool:
    """Whether there are many labels with few rows each."""
    return size.labels >= LABELS_FROM and size.rows <= FEW * size.labels


def stage_settings(stage: Stage, size: Size) -> list[Setting]:
    """Passes, batch and rate: what the rule of `"auto"` comes to for these rows, said beside it."""
    batch = batch_of(stage.method, size.rows)
    epochs, rate = epochs_of(stage, size.examples), rate_of(stage, train="lora", width=size.hidden)
    steps = math.ceil(epochs * math.ceil(size.examples / batch))
    over = f"{size.examples:,} {'rows' if size.examples == size.rows else 'examples'}"
    return [
        Setting("epochs", "auto", f"{epochs:g} by rule: {steps:,} steps over {over}"),
        Setting("batch_size", batch),
        Setting("learning_rate", "auto", f"{rate:g} by rule; edgetune train --search 10m measures"),
    ]


def batch_of(method: str, rows: int) -> int:
    """Rows a step: more where a row is a text to label, and more where there are many. Of texts
    that are alike the others of a step are what each is told apart from.
    """
    if method == "contrastive":
        return 32 if rows < MANY_ROWS else 64
    if METHODS[method].kinds[0] == "encoder":  # type: ignore[index]
        return 16 if rows < MANY_ROWS else 32
    return 16 if method == "reward" else 8
