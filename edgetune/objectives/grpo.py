"""Group-relative policy optimisation: advantages, the clipped objective, the KL penalty. Formulas
on tensors.

GRPO: Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4; Dr. GRPO: Liu et al. 2025, arXiv:2503.20783;
token mean: DAPO, Yu et al. 2025, arXiv:2503.14476. Names and numbers as in TRL's GRPOTrainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgetune.data.batching import IGNORE, Batch
from edgetune.data.collation import collate
from edgetune.objectives.preference import token_log_probs

STD_EPSILON = 1e-4  # TRL's
Total = Callable[[Sequence[int]], Sequence[int]]


@dataclass(slots=True)
class AnswerExample:
    """A sampled answer: prompt and answer in one sequence, labels on the answer."""

    input_ids: list[int]
    labels: list[int]
    row: int
    advantage: float
    # log-probability of each answer token under the policy that sampled it
    old: list[float] | None = None
    reference: list[float] | None = None  # the same under the reference of the KL penalty


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerBatch(Batch):
    """Right-padded answers; per-token tensors run over all answer tokens, in the order of the
    rows.
    """

    advantages: Tensor  # (rows,)
    old: Tensor | None  # (answer tokens,); None: the policy has not moved since it sampled
    reference: Tensor | None  # (answer tokens,); None: no KL penalty
    longest: int  # tokens an answer may have, for dr_grpo


def group_advantages(rewards: Tensor, *, scale_by_std: bool = True) -> Tensor:
    """(groups, answers of a group) rewards → advantages: minus the group's mean, over its std (of a
    sample) + 1e-4.
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    return (
        advantages / (rewards.std(dim=1, keepdim=True) + STD_EPSILON)
        if scale_by_std
        else advantages
    )


def without_flat(
    answers: Sequence[AnswerExample], flat: Sequence[bool], *, loss_type: str, total: Total = list
) -> list[AnswerExample]:
    """Only the answers that teach something, their advantages scaled so that loss and gradient stay
    what they were.

    `flat`: whether an answer's group all got the same reward; without KL penalty its gradient is
    zero. At least one answer is left. Where several processes each have some of a step's answers,
    `total` adds up over all of them.
    """
    kept = [answer for answer, skip in zip(answers, flat, strict=True) if not skip]
    counted = sum if loss_type == "dapo" else len
    sizes = [[sum(label != IGNORE for label in a.labels) for a in some] for some in (kept, answers)]
    left, before = total([counted(size) for size in sizes])
    if not left:
        return [replace(answer, advantage=0.0) for answer in answers[:1]]
    share = left / before
    return [replace(answer, advantage=answer.advantage * share) for answer in kept]


def collate_rollouts(
    answers: Sequence[AnswerExample], pad_id: int, *, loss_type: str = "grpo", longest: int = 0
) -> AnswerBatch:
    """Answers → one batch. `targets` is what the loss is a mean over: tokens for dapo, else
    answers.
    """
    batch = collate(answers, pad_id)
    return AnswerBatch(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        rows=batch.rows,
        tokens=batch.tokens,
        targets=batch.targets if loss_type == "dapo" else len(answers),
        advantages=torch.tensor([answer.advantage for answer in answers]),
        old=_per_token([answer.old for answer in answers]),
        reference=_per_token([answer.reference for answer in answers]),
        longest=longest,
    )


def _per_token(values: Sequence[list[float] | None]) -> Tensor | None:
    known = [value for value in values if value is not None]
    return (
        torch.tensor([x for value in known for x in value]) if len(known) == len(values) else None
    )


def grpo(
    model: nn.Module,
    batch: AnswerBatch,
    *,
    clip: float,
    kl: float,
    temperature: float = 1.0,
    loss_type: str = "grpo",
) -> tuple[Tensor, int]:
    """The clipped objective with the KL penalty, negated.

    The penalty is weighted by π / π_old, so that its gradient is the one of the KL divergence
    (DeepSeek-V3.2, arXiv:2512.02556; TRL does so too).
    """
    log_probs, rows = token_log_probs(model, batch, temperature=temperature)
    ratio = (log_probs - (log_probs.detach() if batch.old is None else batch.old)).exp()
    per_token = clipped(ratio, batch.advantages[rows], clip=clip)
    if kl and batch.reference is not None:
        per_token = per_token + kl * ratio * k3(log_probs, batch.reference)
    return _mean(per_token, rows, batch, loss_type=loss_type), batch.targets


def clipped(ratio: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """-min(ρ A, clip(ρ, 1 ± clip) A) with ρ = π / π_old, per token."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """The estimate π_ref/π - log(π_ref/π) - 1 of KL(π ‖ π_ref), per token (Schulman 2020,
    "Approximating KL").
    """
    difference = reference - log_probs
    return difference.exp() - difference - 1


def _mean(per_token: Tensor, rows: Tensor, batch: AnswerBatch, *, loss_type: str) -> Tensor:
    if loss_type == "dapo":
        return per_token.mean()
    count = len(batch.input_ids)
    if loss_type == "dr_grpo":
        return per_token.sum() / (count * batch.longest)
    sums = torch.zeros(count, device=per_token.device).index_add(0, rows, per_token)
    return (sums / torch.bincount(rows, minlength=count)).mean()
