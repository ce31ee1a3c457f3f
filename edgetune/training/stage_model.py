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
from edgetune.core.tasks import EMBEDDING, GENERATION, MASKED
from edgetune.models.base import Base
from edgetune.models.heads import (
    Embedder,
    RewardModel,
    SequenceClassifier,
    unwrapped,
)
from edgetune.models.load import classifier_on, load_body
from edgetune.models.masked_lm import exchange_body, head_parameters, load_masked_lm
from edgetune.models.torch_device import autocast, generators_untouched
from edgetune.recipe.checks import changes_the_base
from edgetune.training.context import ResolvedRun, ResolvedStage
from edgetune.training.probes import fit_head, fit_reward_probe, keep_features


class RunModel:
    """`model` is what the run trains and saves; `for_stage` lends it to a stage."""

    def __init__(self, run: ResolvedRun) -> None:
        self._run = run
        self._masked: Any = None
        self._start: Start | None = None
        self._original: Any = None
        self._first_head: dict[str, Any] = {}
        # a new masked-lm head: the base alone has no answer worth comparing with
        self.fresh_head = False
        self.model = self._build().to(run.device)
        if run.start is not None:
            run.start.put_on(self.model)
        if any(stage.task == MASKED != run.task for stage in run.own_stages):
            self._masked = self._borrowing()
        # Every weight that learns in any stage, under names that stay; what two of them share is
        # there once.
        self.learning: Any = nn.ModuleDict(
            {"model": self.model}
            | ({"masked_lm": self._masked} if self._masked is not None else {})
        )

    @property
    def base_answers(self) -> bool:
        """Whether the base alone has answers worth comparing with: it writes text, or has a head
        that fits it.
        """
        fitted = not self.fresh_head and self._run.first.fit_head
        return self._run.task in (GENERATION, EMBEDDING) or fitted

    def for_stage(self, stage: ResolvedStage, *, begins: bool = True) -> Any:
        """The model that a stage trains; `begins` is False where a checkpoint continues in the
        middle of it.
        """
        if stage.task == MASKED != self._run.task:
            return self._masked
        later = stage is self._run.first and stage.index > 0
        # a head that came with the adapter is not fitted again
        if begins and later and stage.fit_head and self._run.start is None:
            with autocast(self._run.frozen_precision, self._run.device):
                self._fit_head(unwrapped(self.model))
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
        if self._run.train != "full":
            with adapter_off(self.model) as model:
                yield model
            return
        if self._original is None:
            self._original = self._bare(self._run.base)
            if self._first_head:
                self._original.load_state_dict(self._first_head, strict=False)
        yield self._original.to(self._run.device).eval()

    def _bare(self, base: Base) -> Any:
        """A base with the head of the run's task, untrained."""
        task, labels = self._run.task, self._run.first.examples.labels
        if task == "masked-lm":
            model, self.fresh_head = load_masked_lm(base, seed=self._run.seed)
            return model
        body = load_body(base)
        if task == "reward":
            return RewardModel(body)
        if task == EMBEDDING:
            return Embedder(body, pooling=base.pooling or "mean")
        if labels is None:
            return body
        return classifier_on(base, body, task=task, labels=len(labels), head=self._run.head)

    def _build(self) -> Any:
        run, body = self._run, self._bare(self._run.base)
        if isinstance(body, (SequenceClassifier, RewardModel)):
            body.to(run.device)
            for stage in run.stages if run.train == "head" else ():
                keep_features(body, stage.examples, pad_id=run.pad_id)
            if run.first.fit_head:
                self._fit_head(body)
        # Seeded again: what was drawn before (a random head) must not move the adapter's first
        # weights.
        torch.manual_seed(run.seed)
        if run.train == "full":
            if isinstance(body, SequenceClassifier):
                self._first_head = {
                    name: tensor.clone()
                    for name, tensor in body.state_dict().items()
                    if not set(name.split(".")).isdisjoint(body.head_modules)
                }
            return body.requires_grad_(True)
        return adapt_head(body) if run.train == "head" else self._adapted(body)

    def _adapted(self, body: Any) -> Any:
        """The body with a fresh adapter."""
        run, init, rounded = self._run, self._run.parameters.init, self._run.base.precision
        model = adapt(body, run.parameters, task=run.task)
        if changes_the_base(init):
            self._start = start_of(model)
        if init == "loftq" and rounded is not None:
            with generators_untouched(run.device):
                start_from_rounding(model, self._bare(replace(run.base, precision=None)), rounded)
        if self.fresh_head:
            _learn(head_parameters(model))
        return model

    def _fit_head(self, model: Any) -> None:
        """The head's first weights, on the frozen body's features of the first stage's rows."""
        rows, pad_id = self._run.first.examples.train, self._run.pad_id
        if isinstance(model, RewardModel):
            fit_reward_probe(model, rows, pad_id=pad_id)
        else:
            fit_head(
                model,
                rows,
                problem=self._run.first.problem,
                pad_id=pad_id,
                weights=self._run.first.class_weights,
            )

    def _borrowing(self) -> Any:
        """A masked-lm model around this body."""
        state = torch.get_rng_state()  # loading a head must not move the adapter's dropout
        run = self._run
        bare = replace(run.base, precision=None)  # its body goes
        masked, fresh = load_masked_lm(bare, seed=run.seed)
        torch.set_rng_state(state)
        exchange_body(masked, unwrapped(self.model).body)
        for parameter in head_parameters(masked):
            parameter.requires_grad_(fresh or run.train == "full")
        return masked.to(run.device)


def _learn(parameters: Sequence[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)
