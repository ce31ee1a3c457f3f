"""The stages of a run, one after the other on the same weights, and the measurements at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from edgetune.bases import Base
from edgetune.batching import Batch
from edgetune.errors import TrainingError
from edgetune.examples import ExampleSet
from edgetune.progress import Progress
from edgetune.recipe import Recipe, Stage
from edgetune.training.checkpoint import Position, steps_between
from edgetune.training.device import device_of, generators_untouched
from edgetune.training.distributed import Group
from edgetune.training.journal import Journal
from edgetune.training.loop import StageResult, total_steps, train_stage
from edgetune.training.measure import (
    EFFECT_TOKENS,
    VALIDATION_TOKENS,
    adapter_effect,
    adapter_off,
    batches_for_measuring,
)
from edgetune.training.methods import METHODS
from edgetune.training.precision import Precision
from edgetune.training.stage import Kept, Prepared, Situation

SaveStage = Callable[[Position, torch.optim.Optimizer, Kept], None]


@dataclass
class Stages:
    """Trains the recipe's stages. What the last one opened stays open for `measure`, until the block is left."""

    model: Any
    recipe: Recipe  # precision and device resolved
    base: Base
    tokenizer: Any
    sets: Sequence[ExampleSet]
    pad_id: int
    journal: Journal
    progress: Progress
    group: Group
    _opened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _prepared: Prepared | None = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def run(
        self,
        index: int,
        *,
        kept: Kept | None,
        position: Position | None,
        optimizer_state: dict[str, Any] | None,
        save: SaveStage,
    ) -> StageResult:
        """Train stage `index`, from its beginning or from where a checkpoint left it."""
        stage, examples, group = self.recipe.stage[index], self.sets[index], self.group
        method, precision = METHODS[stage.method], _precision(stage)
        prepared = self._prepare(index, kept)
        held_out = self._held_out(index) if group.leads else []
        return train_stage(
            self.model,
            stage,
            examples.train,
            objective=method.objective(stage),
            validate=(lambda trained: prepared.measure(trained, held_out, precision=precision)) if held_out else None,
            precision=precision,
            pad_id=self.pad_id,
            seed=self.recipe.seed + index,
            stage_index=index,
            journal=self.journal,
            progress=self.progress,
            collate=method.collate,
            length=method.length,
            experience=prepared.experience,
            group=group,
            position=position,
            optimizer_state=optimizer_state,
            save=lambda at, optimizer: save(at, optimizer, prepared.kept()),
            save_every=steps_between(self.recipe, total_steps(stage, len(examples.train))),
        )

    def _prepare(self, index: int, kept: Kept | None) -> Prepared:
        """Close what the stage before had open, and open this one's. Draws nothing: a resumed run does it once more."""
        self._opened.close()
        stage = self.recipe.stage[index]
        situation = Situation(
            self.model,
            stage,
            self.sets[index],
            self.tokenizer,
            self.base,
            self.pad_id,
            _precision(stage),
            self.recipe.seed + index,
            self.progress,
            self.group,
            kept,
        )
        method = METHODS[stage.method]
        with generators_untouched(device_of(self.model)):
            self._prepared = self._opened.enter_context(method.prepare(situation, method.measure))
        return self._prepared

    def measure(self) -> dict[str, Any]:
        """Final metrics, the base's, and the adapter's effect; on training rows when there are no others."""
        stage, examples = self.recipe.stage[-1], self.sets[-1]
        method, precision = METHODS[stage.method], _precision(stage)
        held_out = self._held_out(-1)
        last = self.journal.last("validation")
        metrics = {k: v for k, v in (last or {}).items() if k not in {"kind", "stage", "step"}}
        base_metrics = None
        has_base = self.recipe.task == "text-generation" or self.recipe.stage[0].head_init == "probe"
        if held_out and has_base and self._prepared is not None:
            with adapter_off(self.model):
                base_metrics = self._prepared.measure(self.model, held_out, precision=precision)
        sample = self._batches(-1, examples.validation or examples.train, tokens=EFFECT_TOKENS)
        effect = adapter_effect(self.model, sample, method.outputs, precision=precision)
        if effect["mean_logit_change"] == 0.0:
            raise TrainingError(
                "the trained adapter changes nothing", got="mean logit change 0", fix="Raise learning_rate or epochs."
            )
        return {
            "metrics": metrics,
            "base_metrics": base_metrics,
            "effect": effect,
            "effect_rows": "validation" if examples.validation else "train",
        }

    def _held_out(self, index: int) -> Sequence[Batch]:
        rows = self.sets[index].validation
        return self._batches(index, rows, tokens=VALIDATION_TOKENS) if rows else []

    def _batches(self, index: int, rows: Sequence[Any], *, tokens: int) -> Sequence[Batch]:
        method = METHODS[self.recipe.stage[index].method]
        return batches_for_measuring(
            rows, pad_id=self.pad_id, tokens=tokens, batch_size=64, collate=method.collate, length=method.length
        )


def _precision(stage: Stage) -> Precision:
    return "bf16" if stage.precision == "bf16" else "fp32"
