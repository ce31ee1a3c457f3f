"""Rollouts: the policy answers prompts by sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from edgetune.models.torch_device import Precision, autocast, device_of
from edgetune.training.fast.lora_products import fused_lora

ROWS_AT_ONCE = 64  # answers that grow side by side


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. `temperature` 0 takes the likeliest one; top_p is the total probability
    to draw from.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(slots=True)
class Answer:
    """Sampled tokens, the end token included where the answer ended by itself."""

    ids: list[int]
    log_probs: list[float]  # of each token, after the temperature and before top_p
    ended: bool


class Rollout(Protocol):
    """Something that lets the policy answer: torch, or an engine that is given the adapter's
    tensors.

    `exact`: it samples from the distribution that the loss sees. Else the log-probabilities of its
    answers are those of its own distribution, and the objective's ratio is taken against them.
    """

    exact: bool

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        count: int,
        sampling: Sampling,
        seed: int,
    ) -> list[list[Answer]]:
        """`count` answers for each prompt (token ids); the same weights and seed give the same
        answers.
        """


class TorchRollout:
    """Sampling with a key/value cache: a prompt is read once for all its answers, and finished rows
    leave the batch.
    """

    exact = True

    def __init__(self, *, end: int, pad_id: int, precision: Precision) -> None:
        self.end, self.pad_id, self.precision = end, pad_id, precision

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        count: int,
        sampling: Sampling,
        seed: int,
    ) -> list[list[Answer]]:
        """See Rollout. Leaves the model in evaluation mode."""
        model.eval()
        generator = torch.Generator().manual_seed(seed)
        at_once = max(1, ROWS_AT_ONCE // count)
        answers: list[list[Answer]] = []
        with autocast(self.precision, device_of(model)), fused_lora(model, self.precision):
            for start in range(0, len(prompts), at_once):
                chunk = prompts[start : start + at_once]
                grown = self._grow(
                    model, chunk, count=count, sampling=sampling, generator=generator
                )
                answers += [grown[at : at + count] for at in range(0, len(grown), count)]
        return answers

    def _grow(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        count: int,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> list[Answer]:
        longest, device = max(map(len, prompts)), device_of(model)
        ids = torch.tensor(
            [[self.pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts],
            device=device,
        )
        mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
        )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        cache.batch_repeat_interleave(count)
        logits, mask, position = (
            x.repeat_interleave(count, 0) for x in (out.logits[:, -1], mask, positions[:, -1:])
        )
        answers = [Answer([], [], ended=False) for _ in range(len(prompts) * count)]
        growing = torch.arange(
            len(answers), device=device
        )  # the rows of the batch, as indices of `answers`
        for left in range(sampling.max_new_tokens, 0, -1):
            tokens, log_probs = draw(logits, sampling, generator)
            for index, token, log_prob in zip(
                growing.tolist(), tokens.tolist(), log_probs.tolist(), strict=True
            ):
                answers[index].ids.append(token)
                answers[index].log_probs.append(log_prob)
                answers[index].ended = token == self.end
            alive = (tokens != self.end).nonzero().squeeze(1)
            if left == 1 or not len(alive):
                break
            if len(alive) < len(tokens):
                cache.batch_select_indices(alive)
                growing, tokens, mask, position = (
                    growing[alive],
                    tokens[alive],
                    mask[alive],
                    position[alive],
                )
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position = position + 1
            out = model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            logits = out.logits[:, -1]
        return answers


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(rows, vocab) logits → one token a row, and its log-probability at the sampling temperature.

    By the inverse of the distribution function: one random number a row, where `torch.multinomial`
    takes one a token of the vocabulary and so a third of the time of a decoding step.
    """
    probabilities = (logits.float() / (sampling.temperature or 1.0)).softmax(-1)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        likely = nucleus(probabilities, sampling.top_p) if sampling.top_p < 1 else probabilities
        below = likely.cumsum(-1)
        drawn = torch.rand(len(below), 1, generator=generator).to(below.device) * below[:, -1:]
        tokens = (
            torch.searchsorted(below, drawn, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
        )
    return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1).log()


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero for what is outside the smallest set of likeliest tokens that reaches `top_p` (Holtzman
    et al. 2020).
    """
    ordered, order = probabilities.sort(dim=-1, descending=True)
    outside = (
        ordered.cumsum(-1) - ordered >= top_p
    )  # the token that crosses the line is still inside
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0.0))
