"""The stages of a run, one after the other on the same weights, and the measurements at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgetune.core.errors import TrainingError
from edgetune.core.progress import Progress
from edgetune.data.batching import VALIDATION_TOKENS, Batch
from edgetune.models.torch_device import device_of, generators_untouched
from edgetune.training.checkpoint import Position, State
from edgetune.training.confidence import measure_held_out
from edgetune.training.context import Kept, Prepared, ResolvedRun, ResolvedStage, StageStart
from edgetune.training.journal import Journal, StageLog
from edgetune.training.learner import Learner
from edgetune.training.loop import StageResult, train_stage
from edgetune.training.parallel.distributed import Group
from edgetune.training.parallel.shards import Stateful
from edgetune.training.stage_model import RunModel
from edgetune.training.validation import (
    EFFECT_TOKENS,
    adapter_effect,
    batches_for_measuring,
)

SaveStage = Callable[[Position, Stateful, Kept], None]


@dataclass
class Stages:
    """Trains a run's stages. What the last one opened stays open for `measure`, until the block is
    left.
    """

    settled: ResolvedRun
    model: RunModel
    journal: Journal
    progress: Progress
    group: Group
    _opened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _prepared: Prepared | None = None
    _kept_step: int | None = None  # of the last stage

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def run(self, index: int, *, resumed: State | None, save: SaveStage) -> StageResult:
        """Train stage `index`, from its beginning or from where a checkpoint left it."""
        stage = self.settled.stages[index]
        model = self.model.for_stage(stage, begins=resumed is None)
        prepared = self._prepare(stage, model, resumed)
        held_out = held_out_batches(stage) if self.group.leads else []
        result = train_stage(
            Learner(model, stage.precision, self.group, shard=self.settled.shard),
            stage,
            log=StageLog(self.journal, self.progress, index),
            validate=(
                (lambda trained: prepared.measure(trained, held_out, precision=stage.precision))
                if held_out
                else None
            ),
            experience=prepared.experience,
            resumed=resumed,
            save=lambda at, optimizer, watched: save(
                at, optimizer, replace(prepared.kept(), watched=watched)
            ),
        )
        self._kept_step = None if result.kept is None else result.kept["step"]
        return result

    def _prepare(self, stage: ResolvedStage, model: Any, resumed: State | None) -> Prepared:
        """Close what the stage before had open, and open this one's. Draws nothing: a resumed run
        does it once more.
        """
        self._opened.close()
        kept = (
            None if resumed is None else Kept(resumed.reference, resumed.samples[self.group.rank])
        )
        start = StageStart(stage, model, self.progress, self.group, kept)
        with generators_untouched(device_of(model)):
            self._prepared = self._opened.enter_context(stage.prepare(start))
        return self._prepared

    def measure(self) -> dict[str, Any]:
        """Final metrics, the base's, and the adapter's effect; on training rows when there are no
        others.
        """
        stage, before = self.settled.stages[-1], self.model.before
        examples, precision = stage.examples, stage.precision
        held_out = held_out_batches(stage)
        metrics = self.journal.validation(stage.index, self._kept_step)
        base_metrics = None
        if held_out and self.model.base_answers and self._prepared is not None:
            with before() as base_model:
                base_metrics = self._prepared.measure(base_model, held_out, precision=precision)
        sample = batches_for_measuring(
            examples.validation or examples.train, stage.batching, tokens=EFFECT_TOKENS
        )
        effect = adapter_effect(
            self.model.model, sample, stage.outputs, precision=precision, before=before
        )
        if effect["mean_logit_change"] == 0.0:
            raise TrainingError(
                "the trained adapter changes nothing",
                got="mean logit change 0",
                fix="Raise learning_rate or epochs.",
            )
        asked, generation = self.settled.recipe.confidence, self.settled.generation
        found = measure_held_out(self.model.model, stage, held_out, asked, generation)
        return {
            "metrics": metrics,
            "base_metrics": base_metrics,
            "effect": effect,
            "effect_rows": "validation" if examples.validation else "train",
            "confidence": found.fitted.facts,
            "analysis": found.analysis,
            "warnings": [*found.fitted.warnings],
        }


def held_out_batches(stage: ResolvedStage) -> Sequence[Batch]:
    """Those of the validation rows that are measured."""
    rows = stage.examples.validation
    return batches_for_measuring(rows, stage.batching, tokens=VALIDATION_TOKENS) if rows else []
