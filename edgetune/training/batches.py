"""How the rows of an optimizer step become batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.data.batching import Batch, split, split_by_prefix
from edgetune.data.collation import collate
from edgetune.data.examples import Mask

# padded tokens in one forward pass (1.4 MB each in a 135M model); more are accumulated from parts
MAX_TOKENS_AT_ONCE = 1536
# distinct tokens, where rows share a prefix that the model computes once
DISTINCT_AT_ONCE = 1024
Collate = Callable[[Sequence[Any], int], Batch]  # (examples, pad_id)
Length = Callable[[Any], int]  # an example → the padded tokens it takes


def tokens_of(example: Any) -> int:
    """The length of an example that is one sequence."""
    return len(example.input_ids)


def padded_length(example: Any) -> int:
    """The length of an example that says it itself."""
    length: int = example.padded_length
    return length


@dataclass(frozen=True)
class Batching:
    """How examples become batches."""

    pad_id: int
    collate: Collate = collate
    length: Length = tokens_of
    mask: Mask | None = None  # hides tokens of every batch
    # examples that share a prefix stand in one part; see `shared_prefix.may_share`
    by_prefix: bool = False
    at_once: int = MAX_TOKENS_AT_ONCE  # padded tokens of a part
    # a step's examples are one batch, however many tokens: each is compared with all others
    whole: bool = False

    def batch(self, examples: Sequence[Any], step: int) -> Batch:
        """One batch of optimizer step `step`; of step 0, for measuring."""
        batch = self.collate(examples, self.pad_id)
        return batch if self.mask is None else self.mask(batch, step)

    def parts(self, examples: Sequence[Any], step: int) -> list[Batch]:
        """The examples of a step in parts of at most `at_once` padded tokens, or
        DISTINCT_AT_ONCE where they are put together by their prefix.
        """
        if self.whole:
            return [self.batch(examples, step)] if examples else []
        if self.by_prefix:
            parts = split_by_prefix([example.input_ids for example in examples], DISTINCT_AT_ONCE)
        else:
            parts = split(
                range(len(examples)),
                [self.length(example) for example in examples],
                self.at_once,
            )
        return [self.batch([examples[i] for i in part], step) for part in parts]
