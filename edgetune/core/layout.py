"""What the folders hold, by name: of a run, of an adapter, of a base model and of a bundle."""

from __future__ import annotations

RECIPE, ADAPTER, MODEL, JOURNAL = "recipe.toml", "adapter", "model", "metrics.jsonl"
SUMMARY, REPORT, CHECKPOINTS, CURVES = "summary.json", "report.html", "checkpoints", "tensorboard"
TRIALS = "search.jsonl"  # of a run whose settings were searched
# of a run and of a bundle: a folder for each adapter, in a run those of judges, each a run itself
ADAPTERS = "adapters"
LAYOUT = frozenset(
    {RECIPE, ADAPTER, ADAPTERS, MODEL, JOURNAL, SUMMARY, REPORT, CHECKPOINTS, CURVES, TRIALS}
)
# An adapter: PEFT's own two files, and ours.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_METADATA = "edgetune_adapter.json"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_METADATA)  # what one is made of
PEFT_PREFIX = "base_model.model."  # of every name in its weights
# A base model.
BUILTIN = "builtin:"  # before the name of one that edgetune knows where to find
MODEL_CONFIG, MODEL_WEIGHTS = "config.json", "model.safetensors"
MODEL_METADATA = "edgetune_model.json"  # of a run that trained all weights
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, CHAT_TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"  # for conversations with tools
TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    "added_tokens.json",
    CHAT_TEMPLATE,
    TOOL_TEMPLATE,
)
# A bundle, which keeps each adapter in a folder of ADAPTERS.
MANIFEST = "edgetune.json"
# Layers that transformers' classifiers put before their output and ours do not have: our folders
# name them as saved, so PEFT refuses to load a folder into such a class (a KeyError names the
# layer) instead of giving other labels.
HEAD_GUARDS = ("pooler", "head")
