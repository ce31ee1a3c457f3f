"""The stages of a run, one after the other on the same weights, and the measurements at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetune.core.errors import TrainingError
from edgetune.core.progress import Progress
from edgetune.data.batching import Batch
from edgetune.models.torch_device import Precision, device_of, generators_untouched
from edgetune.recipe.schema import Stage
from edgetune.training.checkpoint import Position, State, steps_between
from edgetune.training.context import Batching, Kept, Prepared, Situation
from edgetune.training.inputs import Inputs
from edgetune.training.journal import Journal, StageLog
from edgetune.training.learner import Learner
from edgetune.training.loop import StageResult, total_steps, train_stage
from edgetune.training.methods import method_of
from edgetune.training.parallel.distributed import Group
from edgetune.training.parallel.shards import Stateful
from edgetune.training.stage_model import Succession
from edgetune.training.validation import (
    EFFECT_TOKENS,
    VALIDATION_TOKENS,
    adapter_effect,
    batches_for_measuring,
)

SaveStage = Callable[[Position, Stateful, Kept], None]


@dataclass
class Stages:
    """Trains the recipe's stages. What the last one opened stays open for `measure`, until the
    block is left.
    """

    succession: Succession
    inputs: Inputs  # of which the recipe's precision and device are resolved
    journal: Journal
    progress: Progress
    group: Group
    _opened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _prepared: Prepared | None = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def run(self, index: int, *, resumed: State | None, save: SaveStage) -> StageResult:
        """Train stage `index`, from its beginning or from where a checkpoint left it."""
        inputs, recipe = self.inputs, self.inputs.recipe
        stage, rows = recipe.stage[index], inputs.sets[index].train
        precision = precision_of(stage)
        model = self.succession.for_stage(index, begins=resumed is None)
        prepared = self._prepare(model, index, resumed)
        held_out = self._held_out(index) if self.group.leads else []
        return train_stage(
            Learner(model, precision, self.group, shard=recipe.parameters.shard),
            stage,
            rows,
            objective=method_of(stage, inputs.base.kind).objective(stage),
            batching=self._batching(index),
            seed=recipe.seed + index,
            log=StageLog(self.journal, self.progress, index),
            validate=(
                (lambda trained: prepared.measure(trained, held_out, precision=precision))
                if held_out
                else None
            ),
            experience=prepared.experience,
            replay=inputs.replays[index],
            resumed=resumed,
            save=lambda at, optimizer: save(at, optimizer, prepared.kept()),
            save_every=steps_between(recipe, total_steps(stage, len(rows))),
        )

    def _prepare(self, model: Any, index: int, resumed: State | None) -> Prepared:
        """Close what the stage before had open, and open this one's. Draws nothing: a resumed run
        does it once more.
        """
        self._opened.close()
        inputs, stage = self.inputs, self.inputs.recipe.stage[index]
        situation = Situation(
            model,
            stage,
            inputs.sets[index],
            inputs.tokenizer,
            inputs.base,
            inputs.pad_id,
            precision_of(stage),
            inputs.recipe.seed + index,
            self.progress,
            self.group,
            None if resumed is None else Kept(resumed.reference, resumed.samples[self.group.rank]),
        )
        method = method_of(stage, inputs.base.kind)
        with generators_untouched(device_of(model)):
            self._prepared = self._opened.enter_context(method.prepare(situation, method.measure))
        return self._prepared

    def measure(self) -> dict[str, Any]:
        """Final metrics, the base's, and the adapter's effect; on training rows when there are no
        others.
        """
        stage, examples, before = (
            self.inputs.recipe.stage[-1],
            self.inputs.sets[-1],
            self.succession.before,
        )
        method, precision = method_of(stage, self.inputs.base.kind), precision_of(stage)
        held_out = self._held_out(-1)
        last = self.journal.last("validation") if held_out else None
        metrics = {k: v for k, v in (last or {}).items() if k not in {"kind", "stage", "step"}}
        base_metrics = None
        if held_out and self.succession.base_answers and self._prepared is not None:
            with before() as base_model:
                base_metrics = self._prepared.measure(base_model, held_out, precision=precision)
        sample = batches_for_measuring(
            examples.validation or examples.train, self._batching(-1), tokens=EFFECT_TOKENS
        )
        effect = adapter_effect(
            self.succession.model, sample, method.outputs, precision=precision, before=before
        )
        if effect["mean_logit_change"] == 0.0:
            raise TrainingError(
                "the trained adapter changes nothing",
                got="mean logit change 0",
                fix="Raise learning_rate or epochs.",
            )
        return {
            "metrics": metrics,
            "base_metrics": base_metrics,
            "effect": effect,
            "effect_rows": "validation" if examples.validation else "train",
        }

    def _held_out(self, index: int) -> Sequence[Batch]:
        rows = self.inputs.sets[index].validation
        return (
            batches_for_measuring(rows, self._batching(index), tokens=VALIDATION_TOKENS)
            if rows
            else []
        )

    def _batching(self, index: int) -> Batching:
        method = method_of(self.inputs.recipe.stage[index], self.inputs.base.kind)
        return Batching(
            self.inputs.pad_id, method.collate, method.length, self.inputs.sets[index].mask
        )


def precision_of(stage: Stage) -> Precision:
    """The stage's number format, once "auto" is resolved."""
    return "bf16" if stage.precision == "bf16" else "fp32"
