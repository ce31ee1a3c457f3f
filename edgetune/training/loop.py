"""The training loop: one for every method, on one page.

What differs between methods comes in as arguments: `objective` (model, batch → loss) and `validate` (model → metrics).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from edgetune.batching import Batch, Example, collate, split, steps, steps_per_epoch
from edgetune.errors import TrainingError
from edgetune.examples.common import Prepare
from edgetune.objectives import Objective, sft
from edgetune.progress import Progress
from edgetune.recipe import Stage
from edgetune.training.fused_lora import fused_lora
from edgetune.training.journal import Journal
from edgetune.training.optimizer import build_optimizer, set_learning_rate, warmup_cosine
from edgetune.training.precision import Precision, autocast
from edgetune.training.replay import ReplayText

MAX_TOKENS_AT_ONCE = 1536  # padded tokens in one forward pass (1.4 MB each in a 135M model); more are accumulated from parts
LOGGED_STEPS = 200  # about this many lines of a stage go to the journal

Validate = Callable[[nn.Module], Mapping[str, float]]


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
    planned = max(1, math.ceil(stage.epochs * steps_per_epoch(rows, stage.batch_size)))
    return min(planned, stage.max_steps or planned)


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
    prepare: Prepare | None = None,
    replay: ReplayText | None = None,
) -> StageResult:
    """Minimise `objective` over `examples` and leave `model` with the last step's weights.

    Raises TrainingError when the loss or a gradient is not finite; the weights are then those before that step.
    """
    lengths = [len(example.input_ids) for example in examples]
    total = total_steps(stage, len(examples))
    validate_every = stage.validate_every or steps_per_epoch(len(examples), stage.batch_size)
    log_every = max(1, total // LOGGED_STEPS)
    optimizer = build_optimizer(
        model,
        learning_rate=stage.learning_rate,
        head_learning_rate=stage.head_learning_rate,
        weight_decay=stage.weight_decay,
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tokens = padded = 0
    seconds, recent = 0.0, list[float]()
    model.train()
    for step, indices in enumerate(steps(lengths, stage.batch_size, seed=seed, total=total), start=1):
        started = time.perf_counter()
        factor = warmup_cosine(step - 1, total, warmup_ratio=stage.warmup_ratio)
        learning_rate = set_learning_rate(optimizer, factor)

        parts = [collate([examples[i] for i in part], pad_id) for part in split(indices, lengths, MAX_TOKENS_AT_ONCE)]
        if prepare is not None:
            parts = [prepare(part, step) for part in parts]
        targets = sum(part.targets for part in parts) or 1
        loss, weight = 0.0, 1.0 - (replay.share if replay else 0.0)
        for part in parts:
            with autocast(precision), fused_lora(model, precision):
                part_loss, _ = objective(model, part)
            share = part.targets / targets
            loss += share * part_loss.item()
            if not math.isfinite(loss):
                raise _not_finite("loss", loss, step=step, parts=parts)
            (part_loss * share * weight).backward()
        if replay is not None:
            part = replay.batch(step)
            with autocast(precision), fused_lora(model, precision):
                replay_loss, _ = sft(model, part)
            if not math.isfinite(replay_loss.item()):
                raise _not_finite("loss of the replayed text", replay_loss.item(), step=step, parts=[part])
            (replay_loss * replay.share).backward()
            parts.append(part)
        norm = float(torch.nn.utils.clip_grad_norm_(trainable, stage.max_grad_norm))
        if not math.isfinite(norm):
            raise _not_finite("gradient norm", norm, step=step, parts=parts)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds += time.perf_counter() - started
        tokens += sum(part.tokens for part in parts)
        padded += sum(part.input_ids.numel() for part in parts)
        recent.append(loss)
        progress.step(step, total, loss=loss, tokens_per_second=tokens / seconds, seconds=seconds)
        if step % log_every == 0 or step == total:
            journal.write(
                kind="train",
                stage=stage_index,
                step=step,
                epoch=step * stage.batch_size / len(examples),
                loss=sum(recent) / len(recent),
                learning_rate=learning_rate,
                grad_norm=norm,
                tokens=tokens,
                tokens_per_second=tokens / seconds,
                seconds=seconds,
                **({} if replay is None else {"replay_loss": replay_loss.item()}),
            )
            final_loss, recent = sum(recent) / len(recent), []
        if validate is not None and (step % validate_every == 0 or step == total):
            measured = validate(model)
            journal.write(kind="validation", stage=stage_index, step=step, **measured)
            progress.say(f"step {step}/{total}  validation  " + "  ".join(f"{k} {v:.4f}" for k, v in measured.items()))
            model.train()
    progress.close()
    model.eval()
    return StageResult(total, tokens, padded, seconds, final_loss)


def _not_finite(what: str, value: float, *, step: int, parts: Sequence[Batch]) -> TrainingError:
    rows = sorted(row for part in parts for row in part.rows)
    shown = ", ".join(map(str, rows[:16])) + (f", … ({len(rows)} rows)" if len(rows) > 16 else "")
    return TrainingError(
        f"the {what} became {value} at step {step}, on rows {shown} of the training file",
        fix='Look at these rows; a lower learning_rate or precision = "fp32" usually helps.',
    )
