"""Encoder-decoders in training: batches of prompts and answers, and the loss on the answers.

The encoder reads the prompt as its tokenizer writes it (with its end token), the decoder the answer
moved on by the start token, as transformers' `_shift_right` does; the loss is on every token of the
answer, its end included.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from edgetune.data.batching import IGNORE, Batch
from edgetune.models.heads import unwrapped
from edgetune.objectives.language import projection_only_at
from edgetune.objectives.projection import can_fuse, projected_loss, projection_captured


def answer_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Cross entropy of every token of the answers."""
    if not can_fuse(model):
        logits, targets = answer_logits(model, batch)
        return F.cross_entropy(logits, targets), targets.numel()
    labelled = batch.labels != IGNORE
    with projection_captured(model, labelled) as hidden:
        model(**_inputs(model, batch))
    targets = batch.labels[labelled]
    return projected_loss(model, hidden[0], targets), targets.numel()


def answer_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (targets, vocab) in fp32 of the answers' tokens, and these tokens (targets,).

    No mask goes into the decoder: a token sees no later one, so the padding on the right changes
    nothing before it.
    """
    labelled = batch.labels != IGNORE
    with projection_only_at(model, labelled):
        logits: Tensor = model(**_inputs(model, batch)).logits
    return logits.reshape(-1, logits.shape[-1]).float(), batch.labels[labelled]


def _inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """Prompts, and answers moved on by the start token."""
    config = unwrapped(model).config
    begun = batch.labels.masked_fill(batch.labels == IGNORE, config.pad_token_id or 0).roll(
        1, dims=1
    )
    begun[:, 0] = config.decoder_start_token_id
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "decoder_input_ids": begun,
        "use_cache": False,
    }
