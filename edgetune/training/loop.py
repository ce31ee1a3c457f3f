"""The training loop: one for every method, on one page.

What differs between methods comes in with the stage: `objective` (model, batch → loss) and
`batching` (rows → batches); and as arguments: `validate` (model → metrics) and `experience`.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from edgetune.core.errors import TrainingError
from edgetune.data.batching import Batch, steps
from edgetune.models.heads import HEADS, UNUSED, unwrapped
from edgetune.models.masked_lm import head_parameters
from edgetune.training.checkpoint import Position, State
from edgetune.training.context import Experience, ResolvedStage
from edgetune.training.fast.memory import freed_memory_kept
from edgetune.training.journal import StageLog
from edgetune.training.keeping import Keeping, said_of
from edgetune.training.learner import Learner
from edgetune.training.parallel.shards import Stateful

Validate = Callable[[nn.Module], Mapping[str, float]]
Save = Callable[[Position, Stateful, Mapping[str, Any]], None]


@dataclass(frozen=True)
class StageResult:
    """What a stage did; the clock stands still during validation."""

    steps: int
    tokens: int  # real tokens, padding not counted
    padded_tokens: int
    seconds: float
    final_loss: float  # mean over the last logged steps
    planned_steps: int = 0  # more than `steps` where it stopped early
    # which weights it left: the step, by which metric, and its value there and at the last one; see
    # `keeping.Keeping.settle`
    kept: dict[str, Any] | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@freed_memory_kept()
def train_stage(
    learner: Learner,
    stage: ResolvedStage,
    *,
    log: StageLog,
    validate: Validate | None = None,
    experience: Experience | None = None,
    resumed: State | None = None,
    save: Save | None = None,
) -> StageResult:
    """Minimise the stage's objective over its rows and leave the run's model with the weights of
    its best validation, or of the last step.

    With `experience` a step learns from what it makes of the step's rows; the stage's `replay` adds
    general text to every step. `resumed` continues a stage where `save`, called every `save_every`
    steps, saw it. Of several processes each works on its share of every step's rows. Raises
    TrainingError when the loss or a gradient is not finite; the weights are then those before that
    step.
    """
    rows, replay, total = stage.examples.train, stage.replay, stage.total_steps
    optimizer = build_optimizer(
        learner.model,
        learning_rate=stage.learning_rate,
        head_learning_rate=stage.head_learning_rate,
        weight_decay=stage.weight_decay,
    )
    at = Position()
    watch = Keeping(stage, learner.group, None if resumed is None else resumed.watched)
    if resumed is not None:
        at = replace(resumed.position)
        learner.load_state(optimizer, resumed.optimizer)
    learner.model.train()
    for step, indices in enumerate(_order(stage, start=at.step), start=at.step + 1):
        if watch.spent:
            break
        started = time.perf_counter()
        learning_rate = set_learning_rate(
            optimizer, warmup_cosine(step - 1, total, warmup_ratio=stage.warmup_ratio)
        )
        parts, facts = _parts(learner, stage, experience, indices, step=step)
        spare = functools.partial(stage.batching.batch, rows[:1], step)
        learned = learner.add_gradient(
            stage.objective, parts, spare=spare, weight=1.0 - replay.share if replay else 1.0
        )
        replayed = replay.add_gradient(learner, step) if replay else None
        norm = learner.clip_gradient(stage.max_grad_norm)
        _check_finite(
            {"loss": learned.loss, "gradient norm": norm}, step, [rows[i].row for i in indices]
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        at.add(learned, replayed, facts, seconds=time.perf_counter() - started)
        epoch = step * stage.batch_size / len(rows) / stage.iterations
        rates = {"epoch": epoch, "learning_rate": learning_rate, "grad_norm": norm}
        log.step(at, total, learned, replayed, facts, rates)
        measures = step % stage.validate_every == 0 or step == total  # in every process
        saves = save is not None and step % stage.save_every == 0
        if measures or saves:
            with learner.in_one_piece():
                if validate is not None and measures:
                    metrics = validate(learner.whole)
                    log.validation(step, total, metrics)
                    watch.see(step, metrics, learner.whole)
                    learner.model.train()
                if measures:
                    watch.agree()
                if save is not None and saves:
                    save(at, learner.state_of(optimizer), watch.state)
    log.progress.close()
    learner.finish()
    if at.recent:
        at.means_of_recent()
    kept = watch.settle(learner.whole)
    if kept is not None:
        log.kept(said_of(kept, planned=total, steps=at.step))
    return StageResult(at.step, at.tokens, at.padded_tokens, at.seconds, at.final_loss, total, kept)


def _order(stage: ResolvedStage, *, start: int) -> Iterator[list[int]]:
    """The rows of every step that is left, as indices; rows that are compared with each other
    stand together by chance alone, not by their length.
    """
    rows, batching = stage.examples.train, stage.batching
    lengths = [0 if batching.whole else batching.length(example) for example in rows]
    return steps(
        lengths,
        stage.batch_size,
        seed=stage.seed,
        total=stage.total_steps,
        start=start,
        repeat=stage.iterations,
    )


def _parts(
    learner: Learner,
    stage: ResolvedStage,
    experience: Experience | None,
    indices: Sequence[int],
    *,
    step: int,
) -> tuple[Sequence[Batch], Mapping[str, float]]:
    """What this process learns from in a step, and what was measured on the way to it."""
    rows = [stage.examples.train[i] for i in learner.group.share(indices)]
    if experience is None:
        return stage.batching.parts(rows, step), {}
    return experience(learner.whole, rows, step=step)


def _check_finite(values: Mapping[str, float], step: int, rows: Sequence[int]) -> None:
    for what, value in values.items():
        if math.isfinite(value):
            continue
        rows = sorted(rows)
        shown = ", ".join(map(str, rows[:16])) + (
            f", … ({len(rows)} rows)" if len(rows) > 16 else ""
        )
        raise TrainingError(
            f"the {what} became {value} at step {step}, on rows {shown} of the training file",
            fix='Look at these rows; a lower learning_rate or precision = "fp32" usually helps.',
        )


def build_optimizer(
    model: nn.Module, *, learning_rate: float, head_learning_rate: float | None, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the weights that learn; no decay on vectors (biases, norms, DoRA magnitudes) nor
    on the head.

    Each group remembers its peak rate as `peak`, which the schedule scales.
    """
    heads = _head_ids(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_head = not {*HEADS, *UNUSED}.isdisjoint(name.split(".")) or id(parameter) in heads
        peak = head_learning_rate if in_head and head_learning_rate is not None else learning_rate
        decay = weight_decay if parameter.ndim >= 2 and not in_head else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    if not groups:
        raise TrainingError("no weight of this model learns", fix="Choose other target_modules.")
    return torch.optim.AdamW(
        [
            {"params": params, "lr": peak, "peak": peak, "weight_decay": decay}
            for (peak, decay), params in groups.items()
        ],
        fused=True,
    )


def _head_ids(model: nn.Module) -> set[int]:
    """The weights of a masked-lm head, which every architecture names differently."""
    inner = unwrapped(model)
    return (
        {id(p) for p in head_parameters(inner)}
        if type(inner).__name__.endswith("ForMaskedLM")
        else set()
    )


def warmup_cosine(step: int, total: int, *, warmup_ratio: float) -> float:
    """Factor on the peak learning rate at `step` = 0 … total - 1: linear up to 1, then half a
    cosine towards 0.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group to `factor` of its peak; returns the first group's rate, for the log."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
    return float(optimizer.param_groups[0]["lr"])
