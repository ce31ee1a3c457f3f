"""Examples, and the one loop that makes a stage's rows into them.

A method brings three functions to the loop (`load`): one reads rows as texts, one encodes them, one
says why an example cannot be used, which is mostly that it is too long. What can be told apart
(`Labels`) is found on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from edgetune.core.errors import DataError
from edgetune.data.batching import Batch
from edgetune.data.findings import Finding
from edgetune.data.prompts import PromptFormat
from edgetune.data.rows import Rows, sample
from edgetune.models.base import Base
from edgetune.recipe.schema import Stage

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R")  # a row as texts
E = TypeVar("E")  # an example
T = TypeVar("T")
Names = tuple[str, ...]
# hides tokens of the batch of an optimizer step; of step 0, for measuring
Mask = Callable[[Batch, int], Batch]


@dataclass(slots=True)
class Example:
    """`labels`: per token, IGNORE where there is no loss, or one class index. `row`: line in the
    file.

    `position_ids` only where several documents share the example: it starts again at 0 with each.
    """

    input_ids: list[int]
    labels: list[int] | int
    row: int
    position_ids: list[int] | None = None
    # (hidden,) pooled states of a frozen body, where only the head learns
    features: Tensor | None = None


def rows_behind(examples: Sequence[Example]) -> int:
    """How many rows examples are made of: one row may give several, and what stands in no file,
    such as a label's name, is none. Of packed text, sequences.
    """
    packed = any(getattr(one, "position_ids", None) is not None for one in examples)
    return len(examples) if packed else len({one.row for one in examples if one.row})


@dataclass(frozen=True)
class ExampleSet:
    """A stage's examples. `digests`, `skipped` and `truncated` have the keys `train` and
    `validation`.
    """

    train: list[Example]
    validation: list[Example]
    labels: Names | None
    digests: dict[str, str]
    prompt_format: PromptFormat
    max_length: int
    skipped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    # what an answer may take; None: as the longest completion says
    max_new_tokens: int | None = None
    mask: Mask | None = None
    # of tagged rows: {"cut", "no_sub_word"}
    unseen_words: dict[str, dict[str, int]] = field(default_factory=dict)
    # validation rows that are none of the labels; their class is not read
    out_of_scope: list[Example] = field(default_factory=list)
    # what each file was taken for, and what its rows show (of packed text, the documents)
    notes: dict[str, list[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    held_out: int | None = None  # rows drawn from train; None where a file has those to measure on


@dataclass(frozen=True)
class Loading:
    """What a loader works on: the opened files and how their rows are read. `labels` fixes the
    classes.
    """

    sources: dict[str, Rows]  # "train" first, then perhaps "validation"
    form: PromptFormat
    stage: Stage
    tokenizer: Any
    labels: Sequence[str] | None
    limit: int  # tokens an example may have
    seed: int

    def too_long(
        self, what: str, where: str, tokens: int, *, raise_or_skip: str = ", or"
    ) -> DataError:
        """The error for an example of so many tokens: `what` says which text is too long."""
        skip = "leave such rows out with data.skip_invalid = true."
        if self.limit < self.stage.max_length:
            fix = f"Shorten the row: the base has no more positions. Or {skip}"
        else:
            fix = f"Set max_length = {tokens} or more{raise_or_skip} {skip}"
        return DataError(
            what, where=where, expected=f"at most {self.limit} tokens", got=str(tokens), fix=fix
        )


class Read(Protocol[R]):
    """Rows as texts, and how many cannot be read so; the first of these raises a DataError unless
    `skip_invalid`.
    """

    def __call__(
        self, source: Rows, form: PromptFormat, *, skip_invalid: bool
    ) -> tuple[list[R], int]: ...


Refuse = Callable[[T, str], DataError | None]  # (row or example, its file) → why not, or None


@dataclass
class Labels(Generic[R]):
    """What a head tells apart: the names that an adapter has already, else those of the whole
    training file.
    """

    names: Names
    # (rows, their file) → names; asked when there are none
    find: Callable[[Sequence[R], str], Names]
    # (row, its file, names) → why the row's labels are not among them, or None
    unknown: Callable[[R, str, Names], DataError | None]

    def known(self, rows: list[R], source: str, *, skip_invalid: bool) -> tuple[list[R], int]:
        """The rows whose labels are known, and how many others there are."""
        self.names = self.names or self.find(rows, source)
        return keep(
            rows,
            lambda row, file: self.unknown(row, file, self.names),
            source,
            skip_invalid=skip_invalid,
        )


def load(
    loading: Loading,
    read: Read[R],
    encode: Callable[[str, list[R]], list[E]],
    *,
    refuse: Refuse[E] = lambda example, source: None,
    labels: Labels[R] | None = None,
) -> ExampleSet:
    """The examples of all files of a stage, and how many rows were left out.

    `encode` gets "train" or "validation" and the rows to encode. A row that cannot be read, has
    unknown `labels`, or whose example `refuse` gives a reason against, raises a DataError; with
    `data.skip_invalid` it is counted, and an error is raised only where no row is left.
    """
    data = loading.stage.data
    examples: dict[str, list[Any]] = {}
    skipped = {}
    for name, source in loading.sources.items():
        limit = data.limit if name == "train" else None
        if labels is None:
            drawn = replace(source, rows=sample(source.rows, limit, seed=loading.seed))
            rows, unread = read(drawn, loading.form, skip_invalid=data.skip_invalid)
            unknown = 0
        else:  # of the whole file, so that data.limit never changes the head's shape
            rows, unread = read(source, loading.form, skip_invalid=data.skip_invalid)
            rows, unknown = labels.known(rows, source.source, skip_invalid=data.skip_invalid)
            rows = sample(rows, limit, seed=loading.seed)
        examples[name], refused = keep(
            encode(name, rows), refuse, source.source, skip_invalid=data.skip_invalid
        )
        skipped[name] = source.skipped + unread + unknown + refused
    return ExampleSet(
        train=examples["train"],
        validation=examples.get("validation", []),
        labels=labels.names if labels is not None else None,
        digests={name: source.digest for name, source in loading.sources.items()},
        prompt_format=loading.form,
        max_length=loading.limit,
        skipped=skipped,
        notes={name: [*source.notes] for name, source in loading.sources.items()},
    )


def keep(
    items: list[T], refuse: Refuse[T], source: str, *, skip_invalid: bool
) -> tuple[list[T], int]:
    """The rows or examples that there is no reason against, and how many others there are.

    The first reason is raised, unless `skip_invalid` and something is left.
    """
    reasons = [refuse(item, source) for item in items]
    kept = [item for item, reason in zip(items, reasons, strict=True) if reason is None]
    first = next((reason for reason in reasons if reason is not None), None)
    if first is not None and not (skip_invalid and kept):
        raise first
    return kept, len(items) - len(kept)


def token_limit(max_length: int, tokenizer: Any, base: Base) -> int:
    """Tokens an example may have: what the recipe says, or less where the base has fewer
    positions.
    """
    return min(max_length, base.max_length, int(min(tokenizer.model_max_length, 2**31)))
