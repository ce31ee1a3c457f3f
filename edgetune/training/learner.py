"""A stage's model as it learns: losses, gradients, and weights where one is needed whole; in one
process or in several.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.data.batching import Batch
from edgetune.models.torch_device import Precision, autocast, device_of, to_device
from edgetune.objectives.language import Objective
from edgetune.training.fast.memory import computing
from edgetune.training.parallel.distributed import Group
from edgetune.training.parallel.shards import Shards, Stateful, norm_of

ALONE = Group()


@dataclass(frozen=True)
class Learned:
    """What a gradient was made of, over all processes."""

    loss: float  # mean
    tokens: int  # real tokens, padding not counted
    padded_tokens: int


class Learner:
    """`whole` is the run's own model; `model` is what learns: the same, or with `shard` this
    process's shard of its weights.

    Every method must be called by all processes.
    """

    def __init__(
        self, whole: nn.Module, precision: Precision, group: Group = ALONE, *, shard: bool = False
    ) -> None:
        self.whole, self.precision, self.group, self.device = (
            whole,
            precision,
            group,
            device_of(whole),
        )
        self._shards = Shards(whole, group, self.device) if shard and group.size > 1 else None
        self.model = whole if self._shards is None else self._shards.model
        self._trainable = [
            parameter for parameter in self.model.parameters() if parameter.requires_grad
        ]

    def add_gradient(
        self,
        objective: Objective,
        batches: Sequence[Batch],
        *,
        spare: Callable[[], Batch],
        weight: float,
    ) -> Learned:
        """Add `weight` times the gradient of the mean loss over the batches of all processes;
        `spare` is for one without any.
        """
        parts = [to_device(batch, self.device) for batch in batches]
        counts = [(part.tokens, part.input_ids.numel()) for part in parts]
        tokens, padded = self.group.total(
            [sum(column) for column in zip(*counts, strict=True)] or [0, 0]
        )
        (whole,) = self.group.total([sum(map(_weight, parts), 0.0)])
        if self._shards is not None:
            parts = self._shards.even(parts, to_device(spare(), self.device))
        loss = 0.0
        for part in parts:
            part_loss, share = self._loss(objective, part), _weight(part) / (whole or 1.0)
            loss += share * part_loss.item()
            (part_loss * share * weight).backward()
        (loss,) = self.group.total([loss])
        return Learned(loss, tokens, padded)

    def clip_gradient(self, at_most: float) -> float:
        """Add up the processes' gradients and clip their norm; the norm before."""
        if self._shards is None:
            self.group.add_gradients(self._trainable)
        return norm_of(self._trainable, at_most=at_most)

    @contextlib.contextmanager
    def in_one_piece(self) -> Iterator[None]:
        """Meanwhile `whole` has its weights, in the leader."""
        if self._shards is not None:
            self._shards.give_back()
        yield
        if self._shards is not None:
            self._shards.take_back()

    def finish(self) -> None:
        """Leave the weights as they are now in `whole`, in all processes."""
        if self._shards is not None:
            self._shards.give_back(to_all=True)
        self.whole.eval()

    def state_of(self, optimizer: torch.optim.Optimizer) -> Stateful:
        """The optimizer's state as a single process has it, for a checkpoint."""
        return optimizer if self._shards is None else self._shards.state_of(optimizer)

    def load_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Put back what `state_of` gave."""
        optimizer.load_state_dict(
            state if self._shards is None else self._shards.spread(state, optimizer)
        )

    def _loss(self, objective: Objective, batch: Batch) -> Tensor:
        """The fused functions look at a layer's weights, so a sharded model computes without
        them.
        """
        if self._shards is not None:
            with autocast(self.precision, self.device):
                return self._shards.loss(objective, batch)[0]
        with computing(self.model, batch, self.precision):
            return objective(self.model, batch)[0]


def _weight(part: Batch) -> float:
    """What a part counts in its step."""
    return float(part.targets) if part.weight is None else part.weight
