"""optimum's names of tasks and sizes, for every family that is exported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_helpers import DECODERS, ENCODERS
from seq2seq_helpers import FAMILIES, SMALL, TYPES
from transformers import AutoConfig

from edgetune.export.graph.families import CacheSizes, cache_sizes, normalised
from edgetune.models.load import TASK_OF_KIND, auto_class

IDS = torch.tensor([[3, 4, 5]])


def tiny(kind: str, model_type: str, sizes: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(
        model_type, vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
    )
    return auto_class(TASK_OF_KIND[kind]).from_config(config).eval()


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoders_sizes_are_those_of_the_cache_it_fills(family: str) -> None:
    model = tiny("decoder", family, DECODERS[family])
    cache = model(IDS, use_cache=True, output_hidden_states=True)
    layers = cache.past_key_values.layers
    _, kv_heads, _, head_dim = layers[0].keys.shape  # (B, kv_heads, T, head_dim)
    assert cache_sizes(model.config) == CacheSizes(len(layers), kv_heads, head_dim)
    named = normalised(model.config)
    assert (named.hidden_size, named.vocab_size) == (cache.hidden_states[0].shape[-1], 40)
    assert named.num_attention_heads == (2 if family == "gpt_neox" else 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_decoders_sizes_are_those_of_both_its_caches(family: str) -> None:
    config = {**SMALL, **FAMILIES[family], "decoder_start_token_id": 0}
    model = tiny("encoder-decoder", TYPES.get(family, family), config)
    cache = model(input_ids=IDS, decoder_input_ids=IDS[:, :1], use_cache=True).past_key_values
    for half in (cache.self_attention_cache, cache.cross_attention_cache):
        _, heads, _, head_dim = half.layers[0].keys.shape
        assert cache_sizes(model.config) == CacheSizes(len(half.layers), heads, head_dim)
    assert len(half.layers) != model.config.num_layers  # else the encoder's would do


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoders_sizes_are_those_of_its_states(family: str) -> None:
    model = tiny("encoder", family, ENCODERS[family])
    states = model(IDS, output_hidden_states=True)
    named = normalised(model.config)
    assert named.hidden_size == states.last_hidden_state.shape[-1]
    assert named.num_layers == len(states.hidden_states) - 1
    assert named.num_attention_heads == 4
