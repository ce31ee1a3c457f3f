"""What a run folder holds, by name. Imports nothing, so that reading a run's files needs no torch."""

RECIPE, ADAPTER, MODEL, JOURNAL = "recipe.toml", "adapter", "model", "metrics.jsonl"
SUMMARY, REPORT, CHECKPOINTS, CURVES = "summary.json", "report.html", "checkpoints", "tensorboard"
LAYOUT = frozenset({RECIPE, ADAPTER, MODEL, JOURNAL, SUMMARY, REPORT, CHECKPOINTS, CURVES})
