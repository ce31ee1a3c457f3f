"""What a run and its stages are, settled before the model is built; and what a stage has while it
runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgetune.adapters.warm_start import StartAdapter
from edgetune.core.progress import Progress
from edgetune.core.tasks import MethodName, Problem, Task
from edgetune.data.batching import Batch
from edgetune.data.examples import ExampleSet
from edgetune.models.base import Base
from edgetune.models.torch_device import Precision
from edgetune.objectives.language import Objective
from edgetune.recipe.schema import Forgetting, Parameters, Recipe
from edgetune.training.batches import Batching
from edgetune.training.parallel.distributed import Group
from edgetune.training.replay import ReplayText

Measure = Callable[..., dict[str, float]]  # (model, batches, *, precision) → metrics
# (model, batch) → logits (n, classes), targets (n,)
Logits = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ResolvedStage:
    """A stage with nothing left open: what runs it asks neither the recipe nor the base again.

    Steps are optimizer steps. A name that `recipe.schema.Stage` has too means the same here.
    """

    index: int
    method: MethodName
    task: Task
    problem: Problem
    learned: str  # the method, or the problem where that is another than single-label
    settings: Any  # the table that only this method has; None where there is none
    adapter: str | None  # of its own, that of a judge; None: the run's
    precision: Precision
    seed: int  # of the stage's own draws
    # the rows
    examples: ExampleSet
    digests: Mapping[str, str]  # of everything that the stage reads, by what it is for
    max_length: int  # as asked for; `examples.max_length` is what the base has positions for
    replay: ReplayText | None
    tokenizer: Any
    base: Base
    batching: Batching
    # what the method means to this base
    objective: Objective
    measure: Measure
    outputs: Logits
    prepare: Prepare
    # the steps
    batch_size: int
    iterations: int  # steps on the same rows
    total_steps: int
    validate_every: int
    keep: str  # "best" or "last"
    patience: int | None
    save_every: int  # steps between two checkpoints
    # the optimizer
    learning_rate: float
    head_learning_rate: float | None
    weight_decay: float
    warmup_ratio: float
    max_grad_norm: float
    fit_head: bool  # by regression on the frozen features, where the head is new
    class_weights: Tensor | None  # (labels,) fp32; None: every row counts alike

    @property
    def pad_id(self) -> int:
        """The token that fills a batch's rows."""
        return self.batching.pad_id


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run with nothing left open, made before its model is."""

    recipe: Recipe  # every "auto" replaced, so that it repeats the run exactly; to be written down
    base: Base  # as training sees it
    tokenizer: Any
    pad_id: int
    device: torch.device
    threads: int
    seed: int
    task: Task
    train: str  # which weights: "lora", "head" or "full"
    shard: bool  # spread them over the processes
    parameters: Parameters
    start: StartAdapter | None  # to go on from
    head: str | None  # transformers' own layers, or None; see `models.load.new_head`
    generation: Mapping[str, Any] | None  # how the adapter answers where a request does not say
    forgetting: Forgetting | None
    chosen: Mapping[str, Any]  # what the recipe had left open, by dotted key
    stages: tuple[ResolvedStage, ...]

    @property
    def first(self) -> ResolvedStage:
        """The first stage of the run's own task."""
        return next(stage for stage in self.stages if stage.task == self.task)

    @property
    def own_stages(self) -> tuple[ResolvedStage, ...]:
        """Those that train the run's own weights, no judge."""
        return tuple(stage for stage in self.stages if stage.adapter is None)

    @property
    def frozen_precision(self) -> Precision:
        """The format in which frozen weights of linear layers are held: bf16 where no stage needs
        more.
        """
        return "bf16" if all(stage.precision == "bf16" for stage in self.own_stages) else "fp32"


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
    watched: Mapping[str, Any] | None = None  # see `keeping.Keeping`


@dataclass(frozen=True)
class StageStart:
    """A stage where it starts, or goes on: then with what was `kept`."""

    stage: ResolvedStage
    model: Any
    progress: Progress
    group: Group = field(default_factory=Group)
    kept: Kept | None = None


@dataclass(frozen=True)
class Prepared:
    """What a stage needs while it runs beyond what is settled; `measure` is its validation."""

    measure: Measure
    experience: Experience | None = None
    # what refers to the stage's first weights
    reference: Mapping[str, Tensor] = field(default_factory=dict)

    def kept(self) -> Kept:
        """For a checkpoint, now."""
        return Kept(
            self.reference, self.experience.samples() if self.experience is not None else None
        )


Prepare = Callable[[StageStart], contextlib.AbstractContextManager[Prepared]]


@contextlib.contextmanager
def nothing_to_prepare(start: StageStart) -> Iterator[Prepared]:
    """For methods whose rows are all they need."""
    yield Prepared(start.stage.measure)
