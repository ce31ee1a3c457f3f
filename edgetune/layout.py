"""What a run folder holds, by name. Imports nothing, so that reading a run's files needs no torch."""

RECIPE, ADAPTER, JOURNAL = "recipe.toml", "adapter", "metrics.jsonl"
SUMMARY, REPORT, CHECKPOINTS, CURVES = "summary.json", "report.html", "checkpoints", "tensorboard"
LAYOUT = frozenset({RECIPE, ADAPTER, JOURNAL, SUMMARY, REPORT, CHECKPOINTS, CURVES})
