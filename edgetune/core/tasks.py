"""Methods, tasks and problems: what each is called, needs and measures."""

from __future__ import annotations

from typing import Literal

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "mse", "rmse", "mae")
THRESHOLD = 0.5  # of a label's probability: the logit 0
VALUE = "value"  # the name of a regression head's only output
Method = Literal[
    "causal-lm",
    "sft",
    "dpo",
    "grpo",
    "reward",
    "masked-lm",
    "sequence-classification",
    "token-classification",
]
Problem = Literal["single-label", "multi-label", "regression"]
Task = Literal[
    "text-generation", "reward", "masked-lm", "sequence-classification", "token-classification"
]
TASKS: dict[str, Task] = {
    "causal-lm": "text-generation",
    "sft": "text-generation",
    "dpo": "text-generation",
    "grpo": "text-generation",
    "reward": "reward",
    "masked-lm": "masked-lm",
    "sequence-classification": "sequence-classification",
    "token-classification": "token-classification",
}
KINDS: dict[str, Literal["decoder", "encoder"]] = {
    "causal-lm": "decoder",
    "sft": "decoder",
    "dpo": "decoder",
    "grpo": "decoder",
    "reward": "decoder",
    "masked-lm": "encoder",
    "sequence-classification": "encoder",
    "token-classification": "encoder",
}
COLUMNS = {
    "causal-lm": ("text",),
    "sft": ("prompt", "completion", "system", "template"),
    "dpo": ("prompt", "chosen", "rejected", "system", "template"),
    "grpo": ("prompt", "completion", "system", "template"),
    "reward": ("prompt", "chosen", "rejected", "system", "template"),
    "masked-lm": ("text",),
    "sequence-classification": ("text", "text_pair", "label", "label_names"),
    "token-classification": ("tokens", "tags"),
}
TAGGING = "token-classification"
ENCODER_TASKS = ("sequence-classification", TAGGING)
GENERATION, REWARD = "text-generation", "reward"
DECODER_TASKS = (GENERATION, REWARD)
PROBLEMS = ("single-label", "multi-label", "regression")


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is a gain, by the end of its name: `wikitext2 perplexity` too."""
    return metric.endswith(LOWER_IS_BETTER)
