"""transformers' greedy answers, as anybody calls them, one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from edgetune.models.load import quiet

SHAPES_GREEDY = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "num_beams": 1,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
"""What a base's generation_config.json may say that shapes transformers' greedy answers too, each
with the value that does not."""


def greedy_alone(model: Any) -> tuple[Any, dict[str, Any]]:
    """The model with nothing in its generation defaults that shapes greedy answers, and what there
    was.
    """
    config = model.generation_config
    left = {
        name: value
        for name, neutral in SHAPES_GREEDY.items()
        if (value := getattr(config, name, neutral)) not in (neutral, None)
    }
    for name in left:
        setattr(config, name, SHAPES_GREEDY[name])
    return model, left


def generate_ids(model: Any, ids: list[int], *, most: int) -> list[int]:
    """At most so many tokens that follow, greedily; an end token is among them."""
    prompt = torch.tensor([ids])
    more: dict[str, Any] = {}
    if model.config.is_encoder_decoder:
        # transformers' own has as many layers as the encoder (5.23), and a decoder may have more
        more["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad(), quiet():
        made = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=most,
            **more,
        )[0].tolist()
    return list(made[1:] if model.config.is_encoder_decoder else made[len(ids) :])


def next_logits(model: Any, ids: list[int], made: list[int]) -> Tensor:
    """(vocabulary,): of the token after a prompt and what was answered so far."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            begun = torch.tensor([[model.config.decoder_start_token_id, *made]])
            found = model(input_ids=torch.tensor([ids]), decoder_input_ids=begun)
        else:
            found = model(input_ids=torch.tensor([[*ids, *made]]))
    logits: Tensor = found.logits[0, -1].float()
    return logits


def until_end(ids: Sequence[int], ends: set[int]) -> list[int]:
    """The tokens before the first that ends an answer."""
    return list(ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))])
