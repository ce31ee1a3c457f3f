"""Encoder-decoders in training: batches of prompts and answers, and the loss on the answers.

The encoder reads the prompt as its tokenizer writes it (with its end token), the decoder the answer moved on by the start
token, as transformers' `_shift_right` does; the loss is on every token of the answer, its end included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetune.batching import IGNORE, Batch
from edgetune.errors import RecipeError
from edgetune.examples.seq2seq import answer_length
from edgetune.heads import unwrapped
from edgetune.objectives import projection_only_at
from edgetune.projection import can_fuse, projected_loss, projection_captured
from edgetune.recipe import Recipe

KIND = "encoder-decoder"


def check_recipe(recipe: Recipe) -> None:
    """RecipeError for what an encoder-decoder has no place for, beyond the methods that do not fit it."""
    if recipe.forgetting is not None:
        raise RecipeError("[forgetting] measures how a model goes on with a text, which an encoder-decoder does not", fix="Remove [forgetting].")
    for number, stage in enumerate(recipe.stage):
        if stage.replay is not None:
            raise RecipeError(f"stage[{number}].replay is general text to go on with, which an encoder-decoder does not", fix="Remove replay.")


def both_lengths(example: Any) -> int:
    """Tokens that an example takes in both halves."""
    return len(example.input_ids) + answer_length(example)


def collate_answers(examples: Sequence[Any], pad_id: int) -> Batch:
    """Prompts padded on the right to the longest, answers (`labels`) too, with IGNORE."""
    input_ids = _padded([example.input_ids for example in examples], pad_id)
    mask = _padded([[1] * len(example.input_ids) for example in examples], 0)
    labels = _padded([example.labels for example in examples], IGNORE)
    targets = int((labels != IGNORE).sum())
    return Batch(
        input_ids=input_ids, attention_mask=mask, labels=labels, rows=tuple(example.row for example in examples), tokens=int(mask.sum()) + targets,
        targets=targets,
    )  # fmt: skip


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded


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

    No mask goes into the decoder: a token sees no later one, so the padding on the right changes nothing before it.
    """
    labelled = batch.labels != IGNORE
    with projection_only_at(model, labelled):
        logits: Tensor = model(**_inputs(model, batch)).logits
    return logits.reshape(-1, logits.shape[-1]).float(), batch.labels[labelled]


def _inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """Prompts, and answers moved on by the start token."""
    config = unwrapped(model).config
    begun = batch.labels.masked_fill(batch.labels == IGNORE, config.pad_token_id or 0).roll(1, dims=1)
    begun[:, 0] = config.decoder_start_token_id
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "decoder_input_ids": begun, "use_cache": False}
