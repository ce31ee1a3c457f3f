"""Which validation point of a stage is kept, when a stage has learned enough, and how often it is
measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from edgetune.core.tasks import best_by, lower_is_better
from edgetune.training.checkpoint import learned, restore_weights
from edgetune.training.context import ResolvedStage
from edgetune.training.parallel.distributed import Group

POINTS = 5  # validations of a stage at least, where the recipe does not say
COST = 0.2  # that they may take of the training's time at most, beyond one per epoch


@dataclass
class Watched:
    """What a stage's validations have shown so far; a checkpoint holds it."""

    best_step: int = 0  # 0: there was none yet
    best: dict[str, float] = field(default_factory=dict)  # its metrics
    last_step: int = 0
    last: dict[str, float] = field(default_factory=dict)
    stale: int = 0  # validations since the best one
    weights: dict[str, Tensor] = field(default_factory=dict)  # those of the best one, on the CPU


class Keeping:
    """Follows a stage's validations. The leader decides, and the other processes hear of it."""

    def __init__(
        self, stage: ResolvedStage, group: Group, resumed: Mapping[str, Any] | None = None
    ) -> None:
        self._stage, self._group = stage, group
        self._seen = Watched(**resumed) if resumed else Watched()

    @property
    def state(self) -> dict[str, Any]:
        """For a checkpoint, to be given back as `resumed`."""
        return dict(vars(self._seen))

    @property
    def spent(self) -> bool:
        """Whether the stage's patience is at an end; alike in every process."""
        patience = self._stage.patience
        return patience is not None and self._seen.stale >= patience

    def see(self, step: int, metrics: Mapping[str, float], model: nn.Module) -> None:
        """In the leader: what a validation measured of the model as it is now."""
        seen = self._seen
        seen.last_step, seen.last, seen.stale = step, dict(metrics), seen.stale + 1
        if seen.best and not self._better(metrics, seen.best):
            return
        seen.best_step, seen.best, seen.stale = step, dict(metrics), 0
        if self._stage.keep == "best":
            seen.weights = {name: tensor.clone() for name, tensor in learned(model).items()}

    def agree(self) -> None:
        """After a validation, in every process: all know as much as they must."""
        if self._stage.patience is not None:
            self._seen.stale = self._group.from_leader(self._seen.stale)

    def settle(self, model: nn.Module) -> dict[str, Any] | None:
        """After the last step, in every process: leave the weights that are kept in `model`; what
        they are, None without a validation.
        """
        seen = self._seen
        goes_back = seen.best_step < seen.last_step and self._stage.keep == "best"
        if self._group.from_leader(goes_back):
            if self._group.leads:
                restore_weights(model, seen.weights)
            self._group.copy_weights([p for p in model.parameters() if p.requires_grad])
        if not seen.best:
            return None
        by = self._by(seen.best)
        return {
            "step": seen.best_step if goes_back else seen.last_step,
            "metric": by,
            "best_step": seen.best_step,
            "best": seen.best.get(by),
            "last_step": seen.last_step,
            "last": seen.last.get(by),
        }

    def _by(self, metrics: Mapping[str, float]) -> str:
        return best_by(self._stage.learned, metrics, weighted=self._stage.class_weights is not None)

    def _better(self, ours: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
        """By the method's own metric; where that is alike, by the loss; of equals the earlier
        stays.
        """
        names = dict.fromkeys((self._by(theirs), "loss"))
        return _score(ours, names) > _score(theirs, names)


def _score(metrics: Mapping[str, float], names: Mapping[str, None]) -> list[float]:
    """The more, the better; what is no number is the worst."""
    values = [
        -metrics[name] if lower_is_better(name) else metrics[name]
        for name in names
        if name in metrics
    ]
    return [value if math.isfinite(value) else -math.inf for value in values]


def said_of(kept: Mapping[str, Any], *, planned: int, steps: int) -> list[str]:
    """What a stage kept and why it ended, a line each; of a stage that ends where it is best,
    nothing.
    """
    name, lines = kept["metric"], list[str]()
    if steps < planned:
        lines.append(
            f"stopped after step {steps} of {planned}: no validation since step"
            f" {kept['best_step']} was better"
        )
    if kept["step"] != kept["last_step"] and kept["best"] == kept["last"]:
        lines.append(
            f"kept step {kept['step']}, {name} {kept['best']:.4f} as at the last, step"
            f" {kept['last_step']}, with less loss"
        )
    elif kept["step"] != kept["last_step"]:
        lines.append(
            f"kept step {kept['step']}, {name} {kept['best']:.4f}"
            f" (the last, step {kept['last_step']}: {kept['last']:.4f})"
        )
    elif kept["best_step"] != kept["last_step"]:
        lines.append(
            f"kept the last step, {kept['last_step']}, {name} {kept['last']:.4f}"
            f" (the best, step {kept['best_step']}: {kept['best']:.4f})"
        )
    return lines


def steps_between_validations(
    total: int, per_epoch: int, *, measured: float, learned_in_a_step: float
) -> int:
    """Once per epoch; in a stage of fewer than POINTS epochs POINTS times, or as often as takes
    COST of the training's time. `measured` and `learned_in_a_step` are tokens; to learn one is to
    measure it three times (forward, and backward to states and to weights).
    """
    if total >= POINTS * per_epoch or not measured:
        return per_epoch
    affordable = int(COST * 3 * learned_in_a_step * total / measured)
    points = min(POINTS, affordable)
    return min(per_epoch, -(-total // points)) if points else per_epoch
