"""Leaving checkpoints behind, and continuing from one: in one process or in several, in the middle
of any stage.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from edgetune.core.errors import RecipeError
from edgetune.core.layout import RECIPE, SUMMARY
from edgetune.core.progress import Progress
from edgetune.models.torch_device import device_of, rng_state, set_rng_state
from edgetune.recipe.read import load_run_recipe
from edgetune.training.checkpoint import (
    Checkpoints,
    Position,
    State,
    check_origin,
    learned,
    origin_of,
    restore_weights,
)
from edgetune.training.context import Kept, ResolvedStage
from edgetune.training.journal import Journal
from edgetune.training.loop import StageResult
from edgetune.training.parallel.distributed import Group
from edgetune.training.parallel.shards import Stateful

CHOSEN = re.compile(
    r"threads|device|stage\.\d+\.(precision|batch_size)"
)  # a finished run's recipe says what was chosen for these


def find_state(
    checkpoints: Checkpoints, origin: dict[str, str], *, resume: bool, progress: Progress
) -> tuple[State | None, dict[str, Any] | None]:
    """The state to continue from, and the summary of a run that is finished already; without
    either, begin afresh.

    Says which of these it is, and what lies there unused. Raises where it is of another recipe or
    other data.
    """
    if not resume:
        if checkpoints.older:
            progress.say(
                f"{checkpoints.folder} holds checkpoints of an unfinished run. This is a new run,"
                " which replaces them at its first checkpoint; --resume would continue the old one"
            )
        return None, None
    state = checkpoints.load(origin, say=progress.say)
    if state is not None:
        progress.say(
            f"resumed at stage {state.stage}, step {state.position.step}, from {checkpoints.latest}"
        )
        return state, None
    finished = finished_summary(checkpoints.folder.parent, origin)
    if finished is not None:
        progress.say(f"nothing to resume: {checkpoints.folder.parent} is finished")
    elif not checkpoints.has_judges:
        progress.say(
            f"nothing to resume: no checkpoint in {checkpoints.folder}. Training begins at the"
            " beginning"
        )
    return None, finished


def finished_summary(folder: Path, origin: dict[str, str]) -> dict[str, Any] | None:
    """summary.json of the finished run in `folder`, None when there is none. Raises when it is of
    another recipe.
    """
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        recipe, data = (
            load_run_recipe(folder / RECIPE),
            [facts["digests"] for facts in summary["data"]],
        )
        rounding = (summary.get("base_precision") or {}).get("rounding")
        found = origin_of(
            recipe,
            base=summary["base"]["digest"],
            data=data,
            processes=summary["processes"],
            rounding=rounding,
        )
    except (OSError, ValueError, KeyError, TypeError, RecipeError):
        return None
    left_open = {
        k: found[k] for k, v in origin.items() if CHOSEN.fullmatch(k) and v in ('"auto"', "not set")
    }
    check_origin(found, origin | left_open, where=folder)
    return summary


@dataclass
class Course:
    """A run's way through its stages: knows where it stands, and writes it down for the leader."""

    model: nn.Module
    stages: Sequence[ResolvedStage]
    origin: dict[str, str]
    journal: Journal
    group: Group
    checkpoints: Checkpoints | None  # of the leader
    state: State | None  # to continue from
    started: float  # time.perf_counter()
    judged: Mapping[int, StageResult] = field(default_factory=dict)  # stages that judges had
    results: list[StageResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.state is None:
            return
        self.results = [StageResult(**result) for result in self.state.finished]
        restore_weights(self.model, self.state.weights)
        set_rng_state(self.state.rng[self.group.rank], device_of(self.model))
        self.started -= self.state.seconds

    def run(self, run_stage: Callable[..., StageResult]) -> list[StageResult]:
        """Train every stage that is not finished: `run_stage(index, resumed=, save=)` trains
        one.
        """
        first = self.state.stage if self.state is not None else 0
        for index in range(first, len(self.stages)):
            if index in self.judged:
                self.results.append(self.judged[index])
                continue
            within = (
                self.state
                if self.state is not None and self.state.position.step and index == first
                else None
            )
            self.results.append(
                run_stage(index, resumed=within, save=functools.partial(self.save, index))
            )
            if index + 1 < len(self.stages):
                self.save(index + 1, Position(), None, Kept())
        self.state = None  # its tensors are in the model now
        return self.results

    def save(self, stage: int, position: Position, optimizer: Stateful | None, kept: Kept) -> None:
        """Write a checkpoint; every process must call this. `kept` is the stage's own."""
        rng = self.group.gathered(rng_state(device_of(self.model)))
        samples = self.group.gathered(kept.samples)
        if self.checkpoints is None:
            return
        self.checkpoints.write(
            State(
                origin=self.origin,
                stage=stage,
                position=position,
                finished=[asdict(result) for result in self.results],
                precisions=[stage.precision for stage in self.stages],
                batch_sizes=[stage.batch_size for stage in self.stages],
                weights=learned(self.model),
                optimizer=optimizer.state_dict() if optimizer is not None else {},
                rng=rng,
                reference=dict(kept.reference),
                samples=samples,
                journal=self.journal.records,
                seconds=time.perf_counter() - self.started,
                watched=None if kept.watched is None else dict(kept.watched),
            )
        )
