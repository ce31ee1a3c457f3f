"""The model of every stage: one adapted body with the head that the method needs, or a frozen
body's features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from edgetune.adapters.first_weights import Start, restore_base, start_from_rounding, start_of
from edgetune.adapters.lora import adapt, adapt_head, adapter_off
from edgetune.adapters.warm_start import StartAdapter
from edgetune.data.examples import Example, ExampleSet
from edgetune.models.base import Base
from edgetune.models.heads import (
    RewardModel,
    SequenceClassifier,
    TokenClassifier,
    build_classifier,
    unwrapped,
)
from edgetune.models.load import load_body
from edgetune.models.masked_lm import exchange_body, head_parameters, load_masked_lm
from edgetune.models.torch_device import CPU_DEVICE, generators_untouched
from edgetune.recipe.checks import changes_the_base
from edgetune.recipe.schema import Recipe
from edgetune.training.probes import fit_head, fit_reward_probe, pooled_features, with_word_features


class Succession:
    """`model` is what the recipe trains and saves; `for_stage` lends it to a stage."""

    def __init__(
        self,
        recipe: Recipe,
        base: Base,
        sets: Sequence[ExampleSet],
        *,
        pad_id: int,
        device: torch.device = CPU_DEVICE,
        start: StartAdapter | None = None,
    ) -> None:
        self._recipe, self._base, self._pad_id, self._device = recipe, base, pad_id, device
        self._started = start is not None  # a head that is there already is not fitted again
        self.sets = list(sets)  # with the body's features where only the head learns
        self._masked: Any = None
        self._start: Start | None = None
        self._original: Any = None
        self._first_head: dict[str, Any] = {}
        # a new masked-lm head: the base alone has no answer worth comparing with
        self.fresh_head = False
        self.model = self._build().to(device)
        if start is not None:
            start.put_on(self.model)
        if any(stage.task != recipe.task for stage in recipe.stage):
            self._masked = self._borrowing()
        # Every weight that learns in any stage, under names that stay; what two of them share is
        # there once.
        self.learning: Any = nn.ModuleDict(
            {"model": self.model}
            | ({"masked_lm": self._masked} if self._masked is not None else {})
        )

    @property
    def first(self) -> int:
        """The first stage of the recipe's own task."""
        return next(
            i for i, stage in enumerate(self._recipe.stage) if stage.task == self._recipe.task
        )

    @property
    def base_answers(self) -> bool:
        """Whether the base alone has answers worth comparing with: it writes text, or has a head
        that fits it.
        """
        fitted = not self.fresh_head and self._recipe.stage[self.first].head_init == "probe"
        return self._recipe.task == "text-generation" or fitted

    def for_stage(self, index: int, *, begins: bool = True) -> Any:
        """The model that stage `index` trains; `begins` is False where a checkpoint continues in
        the middle of it.
        """
        stage = self._recipe.stage[index]
        if stage.task != self._recipe.task:
            return self._masked
        if begins and index == self.first > 0 and stage.head_init == "probe" and not self._started:
            fit_head(unwrapped(self.model), stage, self.sets[index].train, pad_id=self._pad_id)
        return self.model

    def finish(self) -> None:
        """After the last stage: the base as it ships, with an adapter that fits it."""
        self._masked = self.learning = None
        if self._start is not None:
            restore_base(self.model, self._start)
            self._start = None

    @contextlib.contextmanager
    def before(self) -> Iterator[Any]:
        """The model as it was before training: the adapter off, or, where all weights learned, the
        base once more.
        """
        if self._recipe.parameters.train != "full":
            with adapter_off(self.model) as model:
                yield model
            return
        if self._original is None:
            self._original = self._bare(self._base)
            if self._first_head:
                self._original.classifier.load_state_dict(self._first_head)
        yield self._original.to(self._device).eval()

    def _bare(self, base: Base) -> Any:
        """A base with the head of the recipe's task, untrained."""
        recipe, examples = self._recipe, self.sets[self.first]
        if recipe.task == "masked-lm":
            model, self.fresh_head = load_masked_lm(base, seed=recipe.seed)
            return model
        body = load_body(base)
        if recipe.task == "reward":
            return RewardModel(body)
        if examples.labels is None:
            return body
        return build_classifier(
            body, task=recipe.task, labels=len(examples.labels), pooling=base.pooling
        )

    def _build(self) -> Any:
        recipe, body, examples = self._recipe, self._bare(self._base), self.sets[self.first]
        if isinstance(body, SequenceClassifier):
            body.to(self._device)
            if recipe.parameters.train == "head":
                self.sets = [with_features(body, each, pad_id=self._pad_id) for each in self.sets]
                examples = self.sets[self.first]
            if recipe.stage[self.first].head_init == "probe":
                fit_head(body, recipe.stage[self.first], examples.train, pad_id=self._pad_id)
        elif isinstance(body, RewardModel) and recipe.stage[self.first].head_init == "probe":
            fit_reward_probe(body.to(self._device), examples.train, pad_id=self._pad_id)
        # Seeded again: what was drawn before (a random head) must not move the adapter's first
        # weights.
        torch.manual_seed(recipe.seed)
        if recipe.parameters.train == "full":
            if isinstance(body, SequenceClassifier):
                self._first_head = {
                    name: tensor.clone() for name, tensor in body.classifier.state_dict().items()
                }
            return body.requires_grad_(True)
        if recipe.parameters.train == "head":
            return adapt_head(body)
        model = adapt(body, recipe.parameters, task=recipe.task)
        if changes_the_base(recipe.parameters.init):
            self._start = start_of(model)
        if recipe.parameters.init == "loftq" and self._base.precision is not None:
            with generators_untouched(self._device):
                start_from_rounding(
                    model, self._bare(replace(self._base, precision=None)), self._base.precision
                )
        if self.fresh_head:
            _learn(head_parameters(model))
        return model

    def _borrowing(self) -> Any:
        """A masked-lm model around this body."""
        state = torch.get_rng_state()  # loading a head must not move the adapter's dropout
        masked, fresh = load_masked_lm(
            replace(self._base, precision=None), seed=self._recipe.seed
        )  # its body goes
        torch.set_rng_state(state)
        exchange_body(masked, unwrapped(self.model).body)
        for parameter in head_parameters(masked):
            parameter.requires_grad_(fresh or self._recipe.parameters.train == "full")
        return masked.to(self._device)


def _learn(parameters: Sequence[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)


def with_features(model: SequenceClassifier, examples: ExampleSet, *, pad_id: int) -> ExampleSet:
    """The set with the pooled features of every example in fp32; those of single words where words
    are tagged.
    """
    if isinstance(model, TokenClassifier):
        return with_word_features(model, examples, pad_id=pad_id)
    return replace(
        examples,
        train=_featured(model, examples.train, pad_id=pad_id),
        validation=_featured(model, examples.validation, pad_id=pad_id),
    )


def _featured(
    model: SequenceClassifier, examples: Sequence[Example], *, pad_id: int
) -> list[Example]:
    if not examples:
        return []
    features = torch.from_numpy(pooled_features(model, examples, pad_id=pad_id))
    return [replace(example, features=row) for example, row in zip(examples, features, strict=True)]
