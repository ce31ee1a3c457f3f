"""Texts become token ids to be scored, and their log-likelihoods in torch; the choices of an item
share its context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from edgetune.core.errors import DataError
from edgetune.data.batching import in_order_of_length
from edgetune.models.torch_device import Precision, autocast, device_of, to_device
from edgetune.objectives.language import projection_only_at

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class ChoiceItem:
    """`context` has one token at least, and so has each of `choices`."""

    context: list[int]
    choices: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens when the context is computed once."""
        return len(self.context) + sum(map(len, self.choices))


@dataclass(frozen=True)
class Score:
    """Of one choice: the sum of its tokens' log-probabilities (nats), and whether each was the
    likeliest.
    """

    logprob: float
    greedy: bool


class ItemScorer(Protocol):
    """Something that scores: a model in torch or a bundle."""

    def __call__(self, items: Sequence[ChoiceItem]) -> list[list[Score]]:
        """A score for every choice of every item."""


def make_item(
    context: str, choices: Sequence[str], encode: Encode, *, start: Sequence[int], limit: int
) -> ChoiceItem:
    """An item of texts. `start`: ids that every sequence begins with (bos, or none); `limit`:
    positions of the model.

    DataError when there is no context to go on from.
    """
    stripped = context.rstrip()  # white space belongs to the token that follows
    ids = encode(stripped)
    encoded = [encode(context + choice)[len(ids) :] or encode(choice) for choice in choices]
    context_ids = [*start, *ids]
    if not context_ids or not all(encoded):
        raise DataError(
            "nothing to score",
            expected="a context and choices of one token at least",
            got=repr(context[:40]),
        )
    room = max(1, limit - max(map(len, encoded)))
    return ChoiceItem(context_ids[-room:], [choice[: limit - 1] for choice in encoded])


def beginning(tokenizer: Any) -> list[int]:
    """The ids a tokenizer puts before every text: bos, or nothing."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a", verbose=False)["input_ids"]
    return [bos] if bos is not None and ids[:1] == [bos] else []


TOKENS_AT_ONCE, SEQUENCES_AT_ONCE = 1024, 32


@torch.no_grad()
def score_items(
    model: Any, items: Sequence[ChoiceItem], *, precision: Precision = "fp32"
) -> list[list[Score]]:
    """A score for every choice of every item, in their order."""
    model.eval()
    scores: list[list[Score]] = [[] for _ in items]
    lengths = [item.tokens for item in items]
    for part in in_order_of_length(lengths, TOKENS_AT_ONCE, batch_size=SEQUENCES_AT_ONCE):
        found = _score_batch(model, [items[index] for index in part], precision=precision)
        for index, row in zip(part, found, strict=True):
            scores[index] = row
    return scores


def _score_batch(
    model: Any, items: Sequence[ChoiceItem], *, precision: Precision
) -> list[list[Score]]:
    input_ids, position_ids, mask = _tree(items)
    places, targets = zip(*(_predicted(item) for item in items), strict=True)
    wanted = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, place in enumerate(places):
        wanted[row, place] = True
    device = device_of(model)
    inputs = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": _as_taken(mask, model),
    }
    with autocast(precision, device), projection_only_at(model, wanted.to(device)):
        logits = model(**to_device(inputs, device), use_cache=False).logits
    logits = logits.reshape(-1, logits.shape[-1]).float()  # (wanted positions, vocab)
    # Where a position stands among the wanted ones; a context's last position predicts the first
    # token of all choices.
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


def _tree(items: Sequence[ChoiceItem]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions (batch, seq), and who sees whom (batch, 1, seq, seq)."""
    width = max(item.tokens for item in items)
    input_ids, position_ids = (
        torch.zeros(len(items), width, dtype=torch.int64),
        torch.zeros(len(items), width, dtype=torch.int64),
    )
    mask = torch.eye(width, dtype=torch.bool).repeat(
        len(items), 1, 1
    )  # padding sees itself, or its softmax is 0 / 0
    for row, item in enumerate(items):
        context = len(item.context)
        input_ids[row, : item.tokens] = torch.tensor(
            item.context + [token for choice in item.choices for token in choice]
        )
        position_ids[row, :context] = torch.arange(context)
        mask[row, :context, :context] = torch.ones(context, context, dtype=torch.bool).tril()
        start = context
        for choice in item.choices:
            end = start + len(choice)
            position_ids[row, start:end] = torch.arange(context, context + len(choice))
            mask[row, start:end, :context] = True
            mask[row, start:end, start:end] = torch.ones(
                len(choice), len(choice), dtype=torch.bool
            ).tril()
            start = end
    return input_ids, position_ids, mask[:, None]


def _predicted(item: ChoiceItem) -> tuple[list[int], list[int]]:
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
