"""What a stage works with from its start to its end, beyond model and rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from edgetune.core.progress import Progress
from edgetune.data.batching import Batch, collate, split, split_by_prefix
from edgetune.data.examples import ExampleSet, Mask
from edgetune.models.base import Base
from edgetune.models.torch_device import Precision
from edgetune.recipe.schema import Stage
from edgetune.training.parallel.distributed import Group

# padded tokens in one forward pass (1.4 MB each in a 135M model); more are accumulated from parts
MAX_TOKENS_AT_ONCE = 1536
# different tokens, where rows begin alike and the model computes these once
DIFFERENT_AT_ONCE = 1024
Measure = Callable[..., dict[str, float]]  # (model, batches, *, precision) → metrics
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
    # examples that begin alike stand in one part; see `prefix_sharing.may_share`
    alike: bool = False

    def batch(self, examples: Sequence[Any], step: int) -> Batch:
        """One batch of optimizer step `step`; of step 0, for measuring."""
        batch = self.collate(examples, self.pad_id)
        return batch if self.mask is None else self.mask(batch, step)

    def parts(self, examples: Sequence[Any], step: int) -> list[Batch]:
        """The examples of a step in parts of at most MAX_TOKENS_AT_ONCE padded tokens, or
        DIFFERENT_AT_ONCE where they begin alike.
        """
        if self.alike:
            parts = split_by_prefix([example.input_ids for example in examples], DIFFERENT_AT_ONCE)
        else:
            parts = split(
                range(len(examples)),
                [self.length(example) for example in examples],
                MAX_TOKENS_AT_ONCE,
            )
        return [self.batch([examples[i] for i in part], step) for part in parts]


class Experience(Protocol):
    """Turns the rows of a step into what is learned from: grpo's prompts into scored answers."""

    def __call__(
        self, model: nn.Module, rows: Sequence[Any], *, step: int
    ) -> tuple[list[Batch], Mapping[str, float]]:
        """The step's parts, and its metrics."""

    def samples(self) -> Any:
        """What a checkpoint must hold so that the next step learns from the same; numbers in lists
        and dicts, or None.
        """


@dataclass(frozen=True)
class Kept:
    """What a stage in the middle cannot make again, because the weights have moved since. A
    checkpoint holds it.
    """

    reference: Mapping[str, Tensor] = field(default_factory=dict)  # see Prepared
    samples: Any = None  # see Experience; this process's own


@dataclass(frozen=True)
class Situation:
    """Where a stage starts, or goes on: then with what was `kept`."""

    model: Any
    stage: Stage
    examples: ExampleSet
    tokenizer: Any
    base: Base
    pad_id: int
    precision: Precision
    seed: int
    progress: Progress
    group: Group = field(default_factory=Group)
    kept: Kept | None = None


@dataclass(frozen=True)
class Prepared:
    """What a stage needs while it runs; see Method for the parts that are fixed."""

    measure: Measure
    experience: Experience | None = None
    reference: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # what refers to the stage's first weights

    def kept(self) -> Kept:
        """For a checkpoint, now."""
        return Kept(
            self.reference, self.experience.samples() if self.experience is not None else None
        )


@contextlib.contextmanager
def nothing_to_prepare(situation: Situation, measure: Measure) -> Iterator[Prepared]:
    """For methods whose rows are all they need."""
    yield Prepared(measure)


Prepare = Callable[[Situation, Measure], contextlib.AbstractContextManager[Prepared]]
