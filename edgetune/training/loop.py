"""The training loop: one for every method, on one page.

What differs between methods comes in as arguments: `objective` (model, batch → loss) and `validate` (model → metrics).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from edgetune.batching import Batch, Example, collate, split, steps, steps_per_epoch
from edgetune.errors import TrainingError
from edgetune.examples.common import Mask
from edgetune.intervals import headline
from edgetune.objectives import Objective
from edgetune.progress import Progress
from edgetune.recipe import Stage
from edgetune.training.checkpoint import Position
from edgetune.training.computing import loss_of
from edgetune.training.device import device_of, to_device
from edgetune.training.distributed import Group
from edgetune.training.journal import Journal
from edgetune.training.memory import freed_memory_kept
from edgetune.training.optimizer import build_optimizer, set_learning_rate, warmup_cosine
from edgetune.training.precision import Precision
from edgetune.training.replay import ReplayText
from edgetune.training.shares import Shares, Stateful, norm_of
from edgetune.training.stage import Collate, Experience, Length, tokens_of

MAX_TOKENS_AT_ONCE = 1536  # padded tokens in one forward pass (1.4 MB each in a 135M model); more are accumulated from parts
ALONE = Group()
LOGGED_STEPS = 200  # about this many lines of a stage go to the journal

Validate = Callable[[nn.Module], Mapping[str, float]]
Save = Callable[[Position, Stateful], None]


@dataclass(frozen=True)
class StageResult:
    """What a stage did; the clock stands still during validation."""

    steps: int
    tokens: int  # real tokens, padding not counted
    padded_tokens: int
    seconds: float
    final_loss: float  # mean over the last logged steps

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def total_steps(stage: Stage, rows: int) -> int:
    """Optimizer steps of a stage over this many rows."""
    planned = max(1, math.ceil(stage.epochs * steps_per_epoch(rows, stage.batch_size))) * stage.iterations
    return min(planned, stage.max_steps or planned)


@freed_memory_kept()
def train_stage(
    model: nn.Module,
    stage: Stage,
    examples: Sequence[Example],
    *,
    objective: Objective,
    validate: Validate | None,
    precision: Precision,
    pad_id: int,
    seed: int,
    stage_index: int,
    journal: Journal,
    progress: Progress,
    collate: Collate = collate,
    length: Length = tokens_of,
    experience: Experience | None = None,
    mask: Mask | None = None,
    replay: ReplayText | None = None,
    group: Group = ALONE,
    shard: bool = False,
    position: Position | None = None,
    optimizer_state: dict[str, Any] | None = None,
    save: Save | None = None,
    save_every: int | None = None,
) -> StageResult:
    """Minimise `objective` over `examples` and leave `model` with the last step's weights.

    With `experience` a step learns from what it makes of the step's rows, and they are `collate`d by it.
    `mask` hides tokens of every batch before it is learned from; `replay` adds general text to every step.
    `position` and `optimizer_state` continue a stage where `save`, called every `save_every` steps, saw it.
    Of several processes (`group`) each works on its share of every step's rows, and with `shard` keeps a share of the weights.
    Raises TrainingError when the loss or a gradient is not finite; the weights are then those before that step.
    """
    lengths = [length(example) for example in examples]
    total = total_steps(stage, len(examples))
    validate_every = stage.validate_every or steps_per_epoch(len(examples), stage.batch_size) * stage.iterations
    log_every = max(1, total // LOGGED_STEPS)
    shares = Shares(model, group, device_of(model)) if shard and group.size > 1 else None
    learner = model if shares is None else shares.model
    optimizer = build_optimizer(
        learner,
        learning_rate=stage.learning_rate,
        head_learning_rate=stage.head_learning_rate,
        weight_decay=stage.weight_decay,
    )
    trainable = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    at, device = position if position is not None else Position(), device_of(model)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state if shares is None else shares.spread(optimizer_state, optimizer))
    learner.train()
    order = steps(lengths, stage.batch_size, seed=seed, total=total, start=at.step, repeat=stage.iterations)
    for step, indices in enumerate(order, start=at.step + 1):
        started = time.perf_counter()
        factor = warmup_cosine(step - 1, total, warmup_ratio=stage.warmup_ratio)
        learning_rate = set_learning_rate(optimizer, factor)

        rows: Sequence[Example] = [examples[i] for i in group.share(indices)]
        facts: Mapping[str, float] = {}
        if experience is None:
            batches = parts_of(rows, pad_id, collate, length)
        else:
            rows, facts = experience(model, rows, step=step)
            batches = parts_of(rows, pad_id, experience.collate, experience.length)
            at.recent_facts.append(dict(facts))
        if mask is not None:
            batches = [mask(batch, step) for batch in batches]
        parts = [to_device(batch, device) for batch in batches]
        counts = [(part.targets, part.tokens, part.input_ids.numel()) for part in parts]
        targets, tokens, padded = group.total([sum(column) for column in zip(*counts, strict=True)] or [0, 0, 0])
        loss, weight = 0.0, 1.0 - (replay.share if replay else 0.0)
        if shares is not None:
            spare = collate([examples[0]], pad_id)  # for a process without rows
            parts = shares.even(parts, to_device(spare if mask is None else mask(spare, step), device))
        for part in parts:
            part_loss = loss_of(objective, learner, part, precision=precision, shares=shares)
            share = part.targets / max(1, targets)
            loss += share * part_loss.item()
            (part_loss * share * weight).backward()
        replayed = replay.add_gradient(learner, step, precision=precision, group=group, shares=shares) if replay else None
        (loss,) = group.total([loss])
        if not math.isfinite(loss):
            raise _not_finite("loss", loss, step=step, rows=[examples[i].row for i in indices])
        if replayed is not None:
            tokens, padded = tokens + replayed.tokens, padded + replayed.tokens
        if shares is None:
            group.add_gradients(trainable)
        norm = norm_of(trainable, at_most=stage.max_grad_norm)
        if not math.isfinite(norm):
            raise _not_finite("gradient norm", norm, step=step, rows=[examples[i].row for i in indices])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        at.step, at.seconds = step, at.seconds + time.perf_counter() - started
        at.tokens, at.padded_tokens = at.tokens + tokens, at.padded_tokens + padded
        at.recent.append(loss)
        speed, reward = at.tokens / at.seconds, facts.get("reward")
        progress.step(step, total, loss=loss, tokens_per_second=speed, seconds=at.seconds, reward=reward)
        if step % log_every == 0 or step == total:
            at.final_loss, at.recent = sum(at.recent) / len(at.recent), []
            journal.write(
                kind="train",
                stage=stage_index,
                step=step,
                epoch=step * stage.batch_size / len(examples) / stage.iterations,
                loss=at.final_loss,
                learning_rate=learning_rate,
                grad_norm=norm,
                tokens=at.tokens,
                tokens_per_second=speed,
                seconds=at.seconds,
                **_means(at.recent_facts),
                **({} if replayed is None else {"replay_loss": replayed.loss}),
            )
            at.recent_facts = []
        measures, saves = step % validate_every == 0 or step == total, save is not None and save_every is not None and step % save_every == 0
        if shares is not None and (measures or saves):
            shares.give_back()
        if validate is not None and measures:
            measured = validate(model)
            journal.write(kind="validation", stage=stage_index, step=step, **measured)
            progress.say(f"step {step}/{total}  validation  " + "  ".join(f"{k} {v:.4f}" for k, v in headline(measured).items()))
            learner.train()
        if save is not None and saves:
            save(at, optimizer if shares is None else shares.state_of(optimizer))
        if shares is not None and (measures or saves):
            shares.take_back()
    progress.close()
    if shares is not None:
        shares.give_back(to_all=True)
    model.eval()
    return StageResult(total, at.tokens, at.padded_tokens, at.seconds, at.final_loss)


def parts_of(rows: Sequence[Example], pad_id: int, collate: Collate, length: Length) -> list[Batch]:
    """The rows of a step in parts of at most MAX_TOKENS_AT_ONCE padded tokens."""
    parts = split(range(len(rows)), [length(row) for row in rows], MAX_TOKENS_AT_ONCE)
    return [collate([rows[i] for i in part], pad_id) for part in parts]


def _means(facts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(fact[name] for fact in facts) / len(facts) for name in facts[0]} if facts else {}


def _not_finite(what: str, value: float, *, step: int, rows: Sequence[int]) -> TrainingError:
    rows = sorted(rows)
    shown = ", ".join(map(str, rows[:16])) + (f", … ({len(rows)} rows)" if len(rows) > 16 else "")
    return TrainingError(
        f"the {what} became {value} at step {step}, on rows {shown} of the training file",
        fix='Look at these rows; a lower learning_rate or precision = "fp32" usually helps.',
    )
