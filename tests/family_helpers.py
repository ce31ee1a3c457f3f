"""A tiny randomly initialised model of every supported family, with what is particular about it switched on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
GROUPED = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 128}
BOTH = ["sliding_attention", "full_attention"]
WINDOW = 6  # shorter than the texts of the tests

DECODERS: dict[str, dict[str, Any]] = {
    "gemma": {**GROUPED, "head_dim": 32},
    "gemma2": {**GROUPED, "head_dim": 32, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0, "sliding_window": WINDOW, "layer_types": BOTH},
    "gemma3_text": {**GROUPED, "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": WINDOW, "layer_types": BOTH},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2},
    "gpt_neox": {**SMALL, "max_position_embeddings": 128, "rotary_pct": 0.5, "num_attention_heads": 2, "hidden_act": "gelu"},
    "llama": {**GROUPED},
    "mistral": {**GROUPED, "head_dim": 16, "sliding_window": WINDOW},
    "opt": {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 64, "init_std": 0.2},
    "phi3": {**GROUPED, "sliding_window": WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "qwen2": {**GROUPED, "use_sliding_window": False},
    "qwen3": {**GROUPED, "head_dim": 32},
    "smollm3": {**GROUPED, "no_rope_layers": [1, 0], "use_sliding_window": False},
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {**SMALL, "max_position_embeddings": 64},
    "camembert": {**SMALL, "max_position_embeddings": 66},
    "distilbert": {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2},
    "electra": {**SMALL, "embedding_size": 32, "max_position_embeddings": 64},
    "modernbert": {**SMALL, "max_position_embeddings": 64, "local_attention": WINDOW, "layer_types": BOTH, "global_rope_theta": 160000.0},
    "roberta": {**SMALL, "max_position_embeddings": 66},
    "xlm-roberta": {**SMALL, "max_position_embeddings": 66},
}  # fmt: skip


def make_family(model_type: str, like: Path, folder: Path, **config_values: Any) -> Path:
    """A base folder of this family with the tokenizer of the folder `like`; `config_values` instead of those above."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(like)
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors", "generation_config.json", "1_Pooling"))
    decoder = model_type in DECODERS
    sizes = (DECODERS if decoder else ENCODERS)[model_type] | config_values
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **ids, **sizes)
    torch.manual_seed(0)
    model = (AutoModelForCausalLM if decoder else AutoModel).from_config(config)
    with torch.no_grad():  # norms and biases start at 1 and 0, where a mistake in them would not show
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn(weight.shape) * 0.1)
    model.save_pretrained(folder)
    return folder
