"""Preference pairs: their batches, and the objectives `reward` (Bradley-Terry) and `dpo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetune.data.batching import IGNORE, Batch
from edgetune.data.collation import collate
from edgetune.data.preferences import PairExample
from edgetune.objectives.language import completion_logits


@dataclass(frozen=True, slots=True)
class PairBatch(Batch):
    """2n right-padded rows, the n chosen answers first, then the n rejected ones in the same order;
    `targets` is n.
    """

    reference: Tensor | None = None  # (2n,) the reference policy's log-probabilities of the answers
    longer: tuple[
        float, ...
    ] = ()  # a pair each: 1 where the chosen answer is the longer one, ½ for equal lengths


@dataclass(frozen=True, slots=True)
class _Side:
    """One answer of a pair, as a row of a batch."""

    input_ids: list[int]
    labels: list[int]
    row: int


def collate_pairs(pairs: Sequence[PairExample], pad_id: int) -> PairBatch:
    """Pairs → one batch, chosen first."""
    sides = [_Side(pair.input_ids, pair.labels, pair.row) for pair in pairs]
    sides += [_Side(pair.rejected_ids, pair.rejected_labels, pair.row) for pair in pairs]
    batch = collate(sides, pad_id)
    known = [pair.reference for pair in pairs if pair.reference is not None]
    reference = (
        torch.tensor([c for c, _ in known] + [r for _, r in known])
        if len(known) == len(pairs)
        else None
    )
    return PairBatch(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        rows=tuple(pair.row for pair in pairs),
        tokens=batch.tokens,
        targets=len(pairs),
        reference=reference,
        longer=tuple(pair.longer for pair in pairs),
    )


def bradley_terry(model: nn.Module, batch: PairBatch) -> tuple[Tensor, int]:
    """-log σ(r_chosen - r_rejected), the mean over pairs (Bradley and Terry 1952; Ouyang et al.
    2022, eq. 1).
    """
    chosen, rejected = pair_rewards(model, batch)
    return -F.logsigmoid(chosen - rejected).mean(), batch.targets


def pair_rewards(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Rewards (n,) of the chosen and of the rejected answers, in fp32."""
    rewards: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    chosen, rejected = rewards.float().chunk(2)
    return chosen, rejected


def dpo(model: nn.Module, batch: PairBatch, *, beta: float) -> tuple[Tensor, int]:
    """-log σ of the difference of implicit rewards, the mean over pairs (Rafailov et al. 2023, eq.
    7).
    """
    chosen, rejected = implicit_rewards(model, batch, beta=beta)
    return -F.logsigmoid(chosen - rejected).mean(), batch.targets


def implicit_rewards(model: nn.Module, batch: PairBatch, *, beta: float) -> tuple[Tensor, Tensor]:
    """β (log π - log π_ref) of the chosen and the rejected answers, (n,) each."""
    if batch.reference is None:
        raise ValueError(
            "dpo needs the reference policy's log-probabilities; see training.reference"
        )
    chosen, rejected = (beta * (answer_log_probs(model, batch) - batch.reference)).chunk(2)
    return chosen, rejected


def answer_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """(rows,) log-probability of each row's labelled tokens, summed."""
    per_token, rows = token_log_probs(model, batch)
    return torch.zeros(len(batch.input_ids), device=per_token.device).index_add(0, rows, per_token)


def token_log_probs(model: Any, batch: Batch, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of every labelled token (targets,), in the order of the rows, and the row of
    each (targets,).

    The output projection runs only where there are labels; the logits are divided by `temperature`.
    """
    logits, targets = completion_logits(model, batch)
    if temperature != 1.0:
        logits = logits / temperature
    rows = (batch.labels[:, 1:] != IGNORE).nonzero()[:, 0]
    return -F.cross_entropy(logits, targets, reduction="none"), rows
