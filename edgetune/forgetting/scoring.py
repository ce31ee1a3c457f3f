"""Log-likelihoods of continuations in torch. The choices of an item share its context: one row holds

    context | choice 1 | choice 2 | …

where every choice goes on from the context's last position and sees the context and itself, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgetune.batching import in_order_of_length
from edgetune.forgetting.items import Item, Score
from edgetune.objectives import projection_only_at
from edgetune.training.device import device_of, to_device
from edgetune.training.precision import Precision, autocast

TOKENS_AT_ONCE, ROWS_AT_ONCE = 1024, 32


@torch.no_grad()
def score(model: Any, items: Sequence[Item], *, precision: Precision = "fp32") -> list[list[Score]]:
    """A score for every choice of every item, in their order."""
    model.eval()
    scores: list[list[Score]] = [[] for _ in items]
    lengths = [item.tokens for item in items]
    for part in in_order_of_length(lengths, TOKENS_AT_ONCE, batch_size=ROWS_AT_ONCE):
        found = _score_batch(model, [items[index] for index in part], precision=precision)
        for index, row in zip(part, found, strict=True):
            scores[index] = row
    return scores


def _score_batch(model: Any, items: Sequence[Item], *, precision: Precision) -> list[list[Score]]:
    input_ids, position_ids, mask = _tree(items)
    places, targets = zip(*(_predicted(item) for item in items), strict=True)
    wanted = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, place in enumerate(places):
        wanted[row, place] = True
    device = device_of(model)
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": _as_taken(mask, model)}
    with autocast(precision, device), projection_only_at(model, wanted.to(device)):
        logits = model(**to_device(inputs, device), use_cache=False).logits
    logits = logits.reshape(-1, logits.shape[-1]).float()  # (wanted positions, vocab)
    # Where a position stands among the wanted ones; a context's last position predicts the first token of all choices.
    index = wanted.flatten().cumsum(0).view_as(wanted) - 1
    scores = []
    for row, item in enumerate(items):
        at = logits[index[row, places[row]].to(device)]
        target = torch.tensor(targets[row], device=device)
        logprobs = at.gather(1, target[:, None]).squeeze(1) - at.logsumexp(-1)
        hits = at.argmax(-1) == target
        sizes = [len(choice) for choice in item.choices]
        scores.append(
            [
                Score(float(part.sum()), bool(hit.all()))
                for part, hit in zip(logprobs.split(sizes), hits.split(sizes), strict=True)
            ]
        )
    return scores


def _tree(items: Sequence[Item]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions (batch, seq), and who sees whom (batch, 1, seq, seq)."""
    width = max(item.tokens for item in items)
    input_ids, position_ids = torch.zeros(len(items), width, dtype=torch.int64), torch.zeros(len(items), width, dtype=torch.int64)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(items), 1, 1)  # padding sees itself, or its softmax is 0 / 0
    for row, item in enumerate(items):
        context = len(item.context)
        input_ids[row, : item.tokens] = torch.tensor(item.context + [token for choice in item.choices for token in choice])
        position_ids[row, :context] = torch.arange(context)
        mask[row, :context, :context] = torch.ones(context, context, dtype=torch.bool).tril()
        start = context
        for choice in item.choices:
            end = start + len(choice)
            position_ids[row, start:end] = torch.arange(context, context + len(choice))
            mask[row, start:end, :context] = True
            mask[row, start:end, start:end] = torch.ones(len(choice), len(choice), dtype=torch.bool).tril()
            start = end
    return input_ids, position_ids, mask[:, None]


def _predicted(item: Item) -> tuple[list[int], list[int]]:
    """For every token of every choice: the position that predicts it, and the token."""
    places, targets, start = list[int](), list[int](), len(item.context)
    for choice in item.choices:
        places += [len(item.context) - 1, *range(start, start + len(choice) - 1)]
        targets += choice
        start += len(choice)
    return places, targets


def _as_taken(mask: Tensor, model: Any) -> Tensor:
    """A boolean mask for sdpa; numbers to add for the other implementations."""
    if getattr(model.config, "_attn_implementation", "sdpa") == "sdpa":
        return mask
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
