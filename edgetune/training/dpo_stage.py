"""Preference stages: validation metrics, and the reference policy of `dpo`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from edgetune.data.batching import in_order_of_length
from edgetune.models.torch_device import Precision, device_of, to_device
from edgetune.objectives.preference import PairBatch, answer_log_probs, collate_pairs
from edgetune.training.context import Prepared, StageStart
from edgetune.training.fast.memory import computing
from edgetune.training.validation import measure_policy

TOKENS_AT_ONCE, PAIRS_AT_ONCE = 1536, 64
LOG_PROBS = "log_probs"  # (pairs, 2): of the chosen and the rejected answers, training rows first


@contextlib.contextmanager
def prepare_dpo(start: StageStart) -> Iterator[Prepared]:
    """Store with every pair its log-probabilities under the policy as it is now, the reference of
    this stage.

    Before the first stage that is the base; after an earlier stage it is what that one trained. One
    forward pass over the data, shared by all processes, and no second model in memory. A checkpoint
    holds them for a resumed stage.
    """
    stage, group, beta = start.stage, start.group, start.stage.settings.beta
    pairs: list[Any] = [*stage.examples.train, *stage.examples.validation]  # of PairExample
    if start.kept is None:
        start.progress.say(f"reference log-probabilities of {len(pairs)} pairs")
        mine = [pairs[index] for index in group.share(range(len(pairs)))]
        store_references(start.model, mine, pad_id=stage.pad_id, precision=stage.precision)
        for rank, found in enumerate(group.gathered([pair.reference for pair in mine])):
            for pair, reference in zip(pairs[rank :: group.size], found, strict=True):
                pair.reference = reference
    else:
        found_before = start.kept.reference[LOG_PROBS].tolist()
        for pair, (chosen, rejected) in zip(pairs, found_before, strict=True):
            pair.reference = (chosen, rejected)

    def measure_with_beta(
        model: nn.Module, batches: Sequence[PairBatch], *, precision: Precision
    ) -> dict[str, float]:
        return measure_policy(model, batches, precision=precision, beta=beta)

    yield Prepared(
        measure_with_beta, reference={LOG_PROBS: torch.tensor([pair.reference for pair in pairs])}
    )


@torch.no_grad()
def store_references(
    model: Any, pairs: Sequence[Any], *, pad_id: int, precision: Precision
) -> None:
    """Set `reference` of every pair to (log π(chosen), log π(rejected)) of `model` as it is."""
    model.eval()
    lengths, device = [pair.padded_length for pair in pairs], device_of(model)
    for part in in_order_of_length(lengths, TOKENS_AT_ONCE, batch_size=PAIRS_AT_ONCE):
        batch = to_device(collate_pairs([pairs[index] for index in part], pad_id), device)
        with computing(model, batch, precision):
            chosen, rejected = answer_log_probs(model, batch).chunk(2)
        for index, c, r in zip(part, chosen.tolist(), rejected.tolist(), strict=True):
            pairs[index].reference = (c, r)
