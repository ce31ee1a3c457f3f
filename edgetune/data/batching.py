"""Examples → batches: rows of like length together, padded to the longest row of the batch, in an
order the seed fixes.

The order is a pure function of (lengths, batch size, seed, epoch), so a position in the data is a
step number.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100  # the label of a position without loss, as in torch's cross entropy
# rows are sorted by length within pools of this many batches: less than 3 % of the tokens of the
# E2E data are padding, and the order is still random
POOL_BATCHES = 32
# padded tokens for each distinct one, where rows share a prefix: attention and the projection onto
# the vocabulary compute a repeated prefix every time
PADDED_AT_MOST = 2
# of more, a validation takes rows at equal distances; `edgetune eval` takes them all
VALIDATION_TOKENS = 50_000


class Example(Protocol):
    """What batching needs of a tokenised row."""

    @property
    def input_ids(self) -> list[int]: ...
    @property
    def labels(self) -> list[int] | int: ...
    @property
    def row(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows."""

    input_ids: Tensor  # (batch, seq) int64
    attention_mask: Tensor  # (batch, seq) int64, 1 where there is a token
    labels: Tensor  # (batch, seq) with IGNORE where there is no loss, or (batch,) classes
    rows: tuple[int, ...]  # line numbers in the data file
    tokens: int  # real tokens, padding not counted
    targets: int  # positions (or rows) that carry loss
    # what they count together where labels are weighted; None: `targets`
    weight: float | None = None
    # (batch, seq), starting again at 0 with each packed document
    position_ids: Tensor | None = None
    features: Tensor | None = None  # (batch, hidden) pooled states that stand for the tokens
    # (batch, seq), 1 from the second text of a row on; None where no row has two
    token_type_ids: Tensor | None = None


def epoch_order(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int
) -> list[list[int]]:
    """Every row once, in batches of like length, in a random order of batches.

    Rows are shuffled, cut into pools of POOL_BATCHES batches, and sorted by length within a pool;
    the last batch of the epoch may be smaller.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool = batch_size * POOL_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=lambda index: lengths[index])
        batches += [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
    rng.shuffle(batches)
    return batches


def steps(
    lengths: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    total: int,
    start: int = 0,
    repeat: int = 1,
) -> Iterator[list[int]]:
    """The rows of steps `start` … `total - 1`, epoch after epoch; `repeat` steps in succession have
    the same rows.
    """
    per_epoch = steps_per_epoch(len(lengths), batch_size)
    epoch, order = -1, list[list[int]]()
    for step in range(start, total):
        batch = step // repeat
        if batch // per_epoch != epoch:
            epoch = batch // per_epoch
            order = epoch_order(lengths, batch_size, seed=seed, epoch=epoch)
        yield order[batch % per_epoch]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps that see every row once."""
    return -(-rows // batch_size)


def split(indices: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut one step's rows into parts of at most `max_tokens` padded tokens, for gradient
    accumulation.

    A row longer than that is a part of its own.
    """
    parts: list[list[int]] = []
    for index in sorted(indices, key=lambda index: lengths[index]):
        if parts and lengths[index] * (len(parts[-1]) + 1) <= max_tokens:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def split_by_prefix(rows: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Cut rows of token ids into parts in which those that share a prefix stand together.

    A part has at most `max_tokens` distinct tokens, where a prefix that a row shares with the one
    before it counts once (the model computes it once), and at most PADDED_AT_MOST times as many
    padded ones. A row longer than that is a part of its own.
    """
    parts: list[list[int]] = []
    distinct = longest = 0
    before: Sequence[int] = ()
    for index in sorted(range(len(rows)), key=lambda index: list(rows[index])):
        row = rows[index]
        new = len(row) - _shared_prefix(before, row)
        padded = max(longest, len(row)) * (len(parts[-1]) + 1) if parts else 0
        if parts and distinct + new <= max_tokens and padded <= PADDED_AT_MOST * max_tokens:
            parts[-1].append(index)
            distinct, longest = distinct + new, max(longest, len(row))
        else:
            parts.append([index])
            distinct, longest = len(row), len(row)
        before = row
    return parts


def _shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """The length in tokens of the longest prefix that both rows share."""
    return next(
        (at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )


def in_order_of_length(
    lengths: Sequence[int], max_tokens: int, *, batch_size: int
) -> list[list[int]]:
    """Batches for measuring: every row once, shortest first, at most `max_tokens` padded tokens
    each.
    """
    parts = split(range(len(lengths)), lengths, max_tokens)
    return [part[at : at + batch_size] for part in parts for at in range(0, len(part), batch_size)]


def rows_within(lengths: Sequence[int], tokens: int) -> list[int]:
    """All rows, or evenly spaced ones when there are more than `tokens` tokens; the same every
    time.
    """
    rows = len(lengths)
    keep = min(rows, max(1, rows * tokens // max(1, sum(lengths))))
    return [at * rows // keep for at in range(keep)]


def last_answer(labels: Sequence[int]) -> tuple[int, list[int]]:
    """How many positions carry loss, and which of them are the last that follow one another: of a
    conversation its last answer.
    """
    learned = [at for at, label in enumerate(labels) if label != IGNORE]
    begins = len(learned) - 1
    while begins > 0 and learned[begins - 1] == learned[begins] - 1:
        begins -= 1
    return len(learned), learned[begins:]
