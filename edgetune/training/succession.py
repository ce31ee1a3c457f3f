"""The model of every stage: one adapted body, with the head that a stage's method needs.

masked-lm before another encoder method borrows the body for its own head, which is dropped afterwards; the
classification head is fitted when its first stage begins, to the features as they are then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edgetune.adapters import adapt, adapt_head
from edgetune.bases import Base, load_body
from edgetune.examples import ExampleSet
from edgetune.heads import SequenceClassifier
from edgetune.masked_lm import exchange_body, head_parameters, load_masked_lm
from edgetune.mutated_init import Start, changes_the_base, restore_base, start_of
from edgetune.recipe import Recipe
from edgetune.training.features import with_features
from edgetune.training.probe import fit_probe


class Succession:
    """`model` is what the recipe trains and saves; `for_stage` lends it to a stage."""

    def __init__(self, recipe: Recipe, base: Base, sets: Sequence[ExampleSet], *, pad_id: int) -> None:
        self._recipe, self._base, self._pad_id = recipe, base, pad_id
        self.sets = list(sets)  # with the body's features where only the head learns
        self._masked: Any = None
        self._start: Start | None = None
        self.fresh_head = False  # a new masked-lm head: the base alone has no answer worth comparing with
        self.model = self._build()

    @property
    def first(self) -> int:
        """The first stage of the recipe's own task."""
        return next(i for i, stage in enumerate(self._recipe.stage) if stage.task == self._recipe.task)

    def for_stage(self, index: int) -> Any:
        """The model that stage `index` trains."""
        stage = self._recipe.stage[index]
        if stage.task != self._recipe.task:
            return self._borrowed()
        if index == self.first > 0 and stage.head_init == "probe":
            self._masked = None
            fit_probe(self.model.get_base_model(), self.sets[index].train, pad_id=self._pad_id)
        return self.model

    def finish(self) -> None:
        """After the last stage: the base as it ships, with an adapter that fits it."""
        if self._start is not None:
            restore_base(self.model, self._start)
            self._start = None

    def _build(self) -> Any:
        recipe, examples = self._recipe, self.sets[self.first]
        if recipe.task == "masked-lm":
            body, self.fresh_head = load_masked_lm(self._base, seed=recipe.seed)
        else:
            body = load_body(self._base)
        if examples.labels is not None:
            body = SequenceClassifier(body, labels=len(examples.labels), pooling=self._base.pooling or "mean")
            if recipe.parameters.train == "head":
                self.sets = [with_features(body, each, pad_id=self._pad_id) for each in self.sets]
                examples = self.sets[self.first]
            if recipe.stage[self.first].head_init == "probe":
                fit_probe(body, examples.train, pad_id=self._pad_id)
        # Seeded again: what was drawn before (a random head) must not move the adapter's first weights.
        torch.manual_seed(recipe.seed)
        if recipe.parameters.train == "head":
            return adapt_head(body)
        model = adapt(body, recipe.parameters, task=recipe.task)
        if changes_the_base(recipe.parameters.init):
            self._start = start_of(model)
        if self.fresh_head:
            _learn(head_parameters(model))
        return model

    def _borrowed(self) -> Any:
        """A masked-lm model around this body, the same one for every such stage."""
        if self._masked is None:
            state = torch.get_rng_state()  # drawing a head must not move the adapter's dropout
            self._masked, fresh = load_masked_lm(self._base, seed=self._recipe.seed)
            torch.set_rng_state(state)
            exchange_body(self._masked, self.model.get_base_model().body)
            for parameter in head_parameters(self._masked):
                parameter.requires_grad_(fresh)
        return self._masked


def _learn(parameters: Sequence[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)
