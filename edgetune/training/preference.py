"""Preference stages: validation metrics, and the reference policy of `dpo`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetune.batching import in_order_of_length
from edgetune.intervals import preference_metrics
from edgetune.preference import PairBatch, answer_log_probs, collate_pairs, implicit_rewards, pair_rewards
from edgetune.training.computing import computing
from edgetune.training.device import device_of, to_device
from edgetune.training.precision import Precision
from edgetune.training.stage import Measure, Prepared, Situation

TOKENS_AT_ONCE, PAIRS_AT_ONCE = 1536, 64
LOG_PROBS = "log_probs"  # (pairs, 2): of the chosen and the rejected answers, training rows first
TIE = 1e-4  # a smaller margin is rounding: a policy that is still its reference prefers nothing


def measure_rewards(model: nn.Module, batches: Sequence[PairBatch], *, precision: Precision) -> dict[str, float]:
    """Bradley-Terry loss, mean margin, and preference accuracy beside the length baseline."""
    return _measure(model, batches, pair_rewards, precision=precision)


def measure_policy(
    model: nn.Module, batches: Sequence[PairBatch], *, precision: Precision, beta: float = 1.0
) -> dict[str, float]:
    """DPO loss, mean margin of the implicit rewards, and their preference accuracy beside the length baseline.

    A policy that is still its reference is undecided everywhere: accuracy ½, margin 0.
    """
    return _measure(model, batches, lambda m, b: implicit_rewards(m, b, beta=beta), precision=precision)


def preferences(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Rewards as the logits (n, 2) of "which answer is better", and the right choice: 0."""
    rewards = torch.stack(pair_rewards(model, batch), dim=-1)
    return rewards, torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device)


@contextlib.contextmanager
def prepare_dpo(situation: Situation, measure: Measure) -> Iterator[Prepared]:
    """Store with every pair its log-probabilities under the policy as it is now, the reference of this stage.

    Before the first stage that is the base; after an earlier stage it is what that one trained. One forward pass over
    the data, shared by all processes, and no second model in memory. A checkpoint holds them for a resumed stage.
    """
    s, beta = situation, situation.stage.beta
    pairs: list[Any] = [*s.examples.train, *s.examples.validation]  # of PairExample
    if s.kept is None:
        s.progress.say(f"reference log-probabilities of {len(pairs)} pairs")
        mine = [pairs[index] for index in s.group.share(range(len(pairs)))]
        store_references(s.model, mine, pad_id=s.pad_id, precision=s.precision)
        for rank, found in enumerate(s.group.gathered([pair.reference for pair in mine])):
            for pair, reference in zip(pairs[rank :: s.group.size], found, strict=True):
                pair.reference = reference
    else:
        for pair, (chosen, rejected) in zip(pairs, s.kept.reference[LOG_PROBS].tolist(), strict=True):
            pair.reference = (chosen, rejected)

    def measure_with_beta(model: nn.Module, batches: Sequence[PairBatch], *, precision: Precision) -> dict[str, float]:
        return measure_policy(model, batches, precision=precision, beta=beta)

    yield Prepared(measure_with_beta, reference={LOG_PROBS: torch.tensor([pair.reference for pair in pairs])})


@torch.no_grad()
def store_references(model: Any, pairs: Sequence[Any], *, pad_id: int, precision: Precision) -> None:
    """Set `reference` of every pair to (log π(chosen), log π(rejected)) of `model` as it is."""
    model.eval()
    lengths, device = [pair.padded_length for pair in pairs], device_of(model)
    for part in in_order_of_length(lengths, TOKENS_AT_ONCE, batch_size=PAIRS_AT_ONCE):
        batch = to_device(collate_pairs([pairs[index] for index in part], pad_id), device)
        with computing(model, batch, precision):
            chosen, rejected = answer_log_probs(model, batch).chunk(2)
        for index, c, r in zip(part, chosen.tolist(), rejected.tolist(), strict=True):
            pairs[index].reference = (c, r)


def _measure(
    model: nn.Module, batches: Sequence[PairBatch], scores: Any, *, precision: Precision
) -> dict[str, float]:
    """Metrics of `scores` (model, batch) → scores (n,) of the chosen and the rejected answers."""
    model.eval()
    device = device_of(model)
    margins: list[float] = []
    longer: list[float] = []
    for batch in batches:
        batch = to_device(batch, device)
        with torch.no_grad(), computing(model, batch, precision):
            chosen, rejected = scores(model, batch)
        margins += (chosen - rejected).tolist()
        longer += batch.longer
    loss = -F.logsigmoid(torch.tensor(margins, dtype=torch.float64)).mean().item()
    right = [0.5 if abs(margin) < TIE else float(margin > 0) for margin in margins]
    return {"loss": loss, **preference_metrics(right, longer), "margin": sum(margins) / len(margins)}
