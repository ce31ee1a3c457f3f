"""What every kind of example shares: the example itself, a stage's set of them, reading and
choosing rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from edgetune.core.errors import DataError
from edgetune.data.batching import Batch
from edgetune.data.prompts import PromptFormat
from edgetune.data.rows import Row, Rows
from edgetune.models.base import Base
from edgetune.recipe.schema import Stage

IGNORED = -100  # a position without loss, as in torch's cross_entropy
T = TypeVar("T")
Mask = Callable[
    [Batch, int], Batch
]  # hides tokens of the batch of an optimizer step; of step 0, for measuring


@dataclass(slots=True)
class Example:
    """`labels`: per token, IGNORED where there is no loss, or one class index. `row`: line in the
    file.

    `position_ids` only where several documents share the example: it starts again at 0 with each.
    """

    input_ids: list[int]
    labels: list[int] | int
    row: int
    position_ids: list[int] | None = None
    # (hidden,) pooled states of a frozen body, where only the head learns
    features: Tensor | None = None


@dataclass(frozen=True)
class ExampleSet:
    """A stage's examples. `digests`, `skipped` and `truncated` have the keys `train` and
    `validation`.
    """

    train: list[Example]
    validation: list[Example]
    labels: tuple[str, ...] | None
    digests: dict[str, str]
    prompt_format: PromptFormat
    max_length: int
    skipped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    # what an answer may take; None: as the longest completion says
    max_new_tokens: int | None = None
    mask: Mask | None = None
    unseen_words: dict[str, dict[str, int]] = field(
        default_factory=dict
    )  # of tagged rows: {"cut", "no_sub_word"}


@dataclass(frozen=True)
class Loading:
    """What a loader works on: the opened files and how their rows are read. `labels` fixes the
    classes.
    """

    sources: dict[str, Rows]
    form: PromptFormat
    stage: Stage
    tokenizer: Any
    labels: Sequence[str] | None
    limit: int  # tokens an example may have
    seed: int

    def example_set(
        self,
        examples: dict[str, list[Any]],
        *,
        labels: tuple[str, ...] | None = None,
        skipped: dict[str, int],
        truncated: dict[str, int] | None = None,
        max_new_tokens: int | None = None,
        mask: Mask | None = None,
    ) -> ExampleSet:
        """The finished set; the dictionaries have the keys of `sources`."""
        return ExampleSet(
            train=examples["train"],
            validation=examples.get("validation", []),
            labels=labels,
            digests={name: source.digest for name, source in self.sources.items()},
            prompt_format=self.form,
            max_length=self.limit,
            skipped=skipped,
            truncated=truncated or {},
            max_new_tokens=max_new_tokens,
            mask=mask,
        )


def token_limit(max_length: int, tokenizer: Any, base: Base) -> int:
    """Tokens an example may have: what the recipe says, or less where the base has fewer
    positions.
    """
    return min(max_length, base.max_length, int(min(tokenizer.model_max_length, 2**31)))


def convert_rows(
    source: Rows, convert: Callable[[Row, str], T], *, skip_invalid: bool
) -> tuple[list[T], int]:
    """Every row converted; the first bad one raises, or all bad ones are counted. None left is an
    error.
    """
    converted: list[T] = []
    first: DataError | None = None
    for row in source.rows:
        try:
            converted.append(convert(row, f"{source.source}, line {row.line}"))
        except DataError as error:
            if not skip_invalid:
                raise
            first = first or error
    skipped = len(source.rows) - len(converted)
    if not converted and first is not None:
        raise DataError(
            f"none of {skipped} rows can be used; the first: {first}", where=source.source
        ) from first
    return converted, skipped


def subset(source: Rows, limit: int | None, *, seed: int) -> Rows:
    rows = sample(source.rows, limit, seed=seed)
    return Rows(source=source.source, rows=rows, skipped=source.skipped, digest=source.digest)


def hold_out(source: Rows, count: int, *, seed: int) -> tuple[Rows, Rows]:
    """The rows without `count` random ones, and these; both in file order. The same seed draws the
    same rows.
    """
    if count >= len(source.rows):
        raise DataError(
            "data.hold_out leaves no row to train on",
            where=source.source,
            expected=f"less than {len(source.rows)}",
            got=str(count),
        )
    drawn = set(random.Random(seed).sample(range(len(source.rows)), count))
    kept = [row for at, row in enumerate(source.rows) if at not in drawn]
    held = [row for at, row in enumerate(source.rows) if at in drawn]
    return replace(source, rows=kept), replace(source, rows=held, skipped=0)


def sample(rows: list[T], limit: int | None, *, seed: int) -> list[T]:
    """A random subset in file order; the same seed draws the same rows."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), limit))]
