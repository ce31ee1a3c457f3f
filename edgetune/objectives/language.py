"""Objectives: functions of (model, batch) → (mean loss, number of positions it is the mean of)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetune.data.batching import IGNORE, Batch
from edgetune.models.heads import unwrapped
from edgetune.objectives.projection import can_fuse, projected_loss, projection_captured

# Families whose model reads positions but not where they start again (transformers 5.23).
BLIND_TO_PACKING = frozenset({"opt"})


class Objective(Protocol):
    """What a stage minimises."""

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        """The mean loss (a scalar with gradient) and the number of positions or rows it is the mean
        of.
        """


def sft(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Next-token cross entropy at the positions that have labels."""
    if not can_fuse(model):
        logits, targets = completion_logits(model, batch)
        return F.cross_entropy(logits, targets), targets.numel()
    labelled, targets = next_token_targets(batch)
    with projection_captured(model, labelled) as hidden:
        model(input_ids=batch.input_ids, use_cache=False, **_packing(model, batch))
    return projected_loss(model, hidden[0], targets), targets.numel()


def masked_lm(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Cross entropy of the hidden tokens; 0 for a batch in which none is hidden."""
    logits, targets = masked_logits(model, batch)
    loss = F.cross_entropy(logits, targets) if len(targets) else logits.sum()
    return loss, targets.numel()


def sequence_classification(
    model: nn.Module,
    batch: Batch,
    *,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Cross entropy of the class logits, a mean over rows; `weights` (labels,) weigh each by its
    label.
    """
    logits = class_logits(model, batch)
    loss = F.cross_entropy(
        logits, batch.labels, weight=on(logits, weights), label_smoothing=label_smoothing
    )
    return loss, batch.labels.numel()


def on(logits: Tensor, weights: Tensor | None) -> Tensor | None:
    """The weights on the device that the logits are on."""
    return None if weights is None else weights.to(logits)


def class_logits(model: Any, batch: Batch) -> Tensor:
    """Class logits (batch, labels) in fp32; from the features where the batch brings them."""
    if batch.features is not None:
        return unwrapped(model).logits_of(batch.features).float()
    types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **types)
    return logits.float()


def completion_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (targets, vocab) in fp32 that predict the labelled tokens, and those tokens
    (targets,).

    No attention mask goes in: with causal attention a token sees no later one, so the padding on
    the right changes nothing before it. Where `position_ids` start again, transformers lets no
    token see what stands before (`masking_utils.find_packed_sequence_indices`).
    """
    labelled, targets = next_token_targets(batch)
    with projection_only_at(model, labelled):
        logits: Tensor = model(
            input_ids=batch.input_ids, use_cache=False, **_packing(model, batch)
        ).logits
    return logits.reshape(-1, logits.shape[-1]).float(), targets


def next_token_targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """Where a labelled token is predicted, (batch, seq) bool, and these tokens (targets,)."""
    labelled = batch.labels[:, 1:] != IGNORE
    return F.pad(labelled, (0, 1)), batch.labels[:, 1:][labelled]


def _packing(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What tells the model where packed documents begin."""
    if batch.position_ids is None:
        return {}
    packed = {"position_ids": batch.position_ids}
    if unwrapped(model).config.model_type in BLIND_TO_PACKING:
        packed["attention_mask"] = documents_apart(batch.position_ids)
    return packed


def masked_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (targets, vocab) in fp32 at the hidden tokens, and those tokens (targets,)."""
    labelled = batch.labels != IGNORE
    with projection_only_at(model, labelled):
        logits: Tensor = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).logits
    return logits.reshape(-1, logits.shape[-1]).float(), batch.labels[labelled]


def documents_apart(position_ids: Tensor) -> Tensor:
    """(batch, 1, seq, seq), added to attention's scores: 0 where a token sees another of its own
    document, not later.
    """
    document = (position_ids == 0).cumsum(1)  # (batch, seq)
    seen = (document[:, :, None] == document[:, None, :]).tril()
    return (
        torch.zeros(seen.shape)
        .masked_fill_(~seen.cpu(), torch.finfo(torch.float32).min)[:, None]
        .to(position_ids.device)
    )


@contextlib.contextmanager
def projection_only_at(model: Any, labelled: Tensor) -> Iterator[None]:
    """Let the output projection see only the hidden states where `labelled` (batch, seq) is true.

    On a small model the projection to the vocabulary costs as much as many layers. What a model
    does after it (soft-capping, scaling) is element-wise and stays as it is; the logits come out as
    (1, targets, vocab).
    """
    positions = labelled.flatten().nonzero().squeeze(1)

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (hidden,) = inputs  # (batch, seq, hidden)
        return (hidden.flatten(0, 1).index_select(0, positions).unsqueeze(0),)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
