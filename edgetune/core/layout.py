"""What a run folder and an adapter folder hold, by name."""

from __future__ import annotations

RECIPE, ADAPTER, MODEL, JOURNAL = "recipe.toml", "adapter", "model", "metrics.jsonl"
SUMMARY, REPORT, CHECKPOINTS, CURVES = "summary.json", "report.html", "checkpoints", "tensorboard"
LAYOUT = frozenset({RECIPE, ADAPTER, MODEL, JOURNAL, SUMMARY, REPORT, CHECKPOINTS, CURVES})
CONFIG, WEIGHTS, METADATA = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "edgetune_adapter.json",
)
PREFIX = "base_model.model."
