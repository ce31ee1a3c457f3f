"""Settings that fit a file: passes, rate, batch and longest example, from how many rows there are
and how long they are in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.core.tasks import METHODS
from edgetune.inspection.readings import Reading

FEW = 20  # rows a label: there the label's own name helps, and a small rate
LABELS_FROM = 10  # labels
WIDE = 1000  # hidden size of a body from which a smaller rate is the usual one
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


def parameters(reading: Reading, size: Size) -> list[Setting]:
    """`[parameters]`."""
    small = reading.method == "sft" or few_rows_a_label(size)
    rank = 8 if small else 16
    return [Setting("rank", rank, "of the adapter's matrices"), Setting("alpha", 2 * rank)]


def stage(reading: Reading, size: Size) -> list[Setting]:
    """The settings of `[[stage]]` after its method, without `max_length`."""
    found = {
        "sequence-classification": _classifier,
        "multi-label": _classifier,
        "regression": _classifier,
        "token-classification": _tagger,
        "sft": lambda size: _decoder(size, rate=5e-4, passes=3000, most=3),
        "dpo": lambda size: _decoder(size, rate=1e-4, passes=2000, most=2),
        "reward": lambda size: _decoder(size, rate=2e-4, passes=2000, most=2, batch=16),
        "causal-lm": lambda size: _decoder(size, rate=5e-4, passes=2000, most=3),
        "masked-lm": lambda size: _passes(size, 10_000, 10, batch=32, rate=5e-4),
    }[reading.task](size)
    if reading.task == "regression":
        found = [one for one in found if one.key != "label_smoothing"]
    return found


def few_rows_a_label(size: Size) -> bool:
    """Whether there are many labels with few rows each."""
    return size.labels >= LABELS_FROM and size.rows <= FEW * size.labels


def _classifier(size: Size) -> list[Setting]:
    if few_rows_a_label(size):
        head = Setting("head_learning_rate", 1e-3)
        return [*_passes(size, 40_000, 10, batch=16, rate=5e-4), head]
    return _passes(size, 40_000, 10, batch=16 if size.rows < 2000 else 32, rate=1e-3)


def _tagger(size: Size) -> list[Setting]:
    head = Setting("head_learning_rate", 2e-3)
    return [*_passes(size, 20_000, 10, batch=16 if size.rows < 1000 else 32, rate=1e-3), head]


def _decoder(size: Size, *, rate: float, passes: int, most: int, batch: int = 8) -> list[Setting]:
    return _passes(size, passes, most, batch=batch, rate=rate)


def _passes(size: Size, rows: int, most: int, *, batch: int, rate: float) -> list[Setting]:
    """About `rows` rows in all, in at most `most` passes."""
    epochs = min(most, max(1, round(rows / max(1, size.rows))))
    steps = epochs * math.ceil(size.rows / batch)
    rate = rate / 2.5 if size.hidden > WIDE else rate
    return [
        Setting("epochs", epochs, f"{steps:,} steps over {size.rows:,} rows"),
        Setting("batch_size", batch),
        Setting("learning_rate", rate),
    ]
