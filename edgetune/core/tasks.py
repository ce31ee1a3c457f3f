"""Methods, tasks and problems: what each is called and needs. A new method is a row here; what it
brings is registered under its name in data/loaders.py and training/methods.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "mse", "rmse", "mae", "calibration_error")
THRESHOLD = 0.5  # of a label's probability: the logit 0
VALUE = "value"  # the name of a regression head's only output
MethodName = Literal[
    "causal-lm",
    "sft",
    "dpo",
    "grpo",
    "reward",
    "masked-lm",
    "contrastive",
    "sequence-classification",
    "token-classification",
]
Problem = Literal["single-label", "multi-label", "regression"]
Task = Literal[
    "text-generation",
    "reward",
    "masked-lm",
    "feature-extraction",
    "sequence-classification",
    "token-classification",
]
Kind = Literal["decoder", "encoder", "encoder-decoder"]
TAGGING: Task = "token-classification"
CLASSIFICATION: Task = "sequence-classification"
MASKED: Task = "masked-lm"
EMBEDDING: Task = "feature-extraction"
"""A text's embedding: what contrastive trains, and what a masked-lm adapter gives in a bundle."""
GENERATION: Task = "text-generation"
REWARD: Task = "reward"
PROBLEMS = get_args(Problem)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a recipe may say of a stage with this method."""

    task: Task  # what its adapter does
    kinds: tuple[Kind, ...]  # of base, the usual one first
    columns: tuple[str, ...]  # keys of `data` that it reads, of those that not every method does
    settings: tuple[str, ...] = ()  # keys of the stage that it alone reads; a table has its name
    has_head: bool = False  # a task head that can be trained alone


METHODS: dict[MethodName, Method] = {
    "causal-lm": Method(task=GENERATION, kinds=("decoder",), columns=("text",)),
    "sft": Method(
        task=GENERATION,
        kinds=("decoder", "encoder-decoder"),
        columns=("prompt", "completion", "system", "template"),
    ),
    "dpo": Method(
        task=GENERATION,
        kinds=("decoder",),
        columns=("prompt", "chosen", "rejected", "system", "template"),
        settings=("dpo",),
    ),
    "grpo": Method(
        task=GENERATION,
        kinds=("decoder",),
        columns=("prompt", "completion", "system", "template"),
        settings=("grpo",),
    ),
    "reward": Method(
        task=REWARD,
        kinds=("decoder",),
        columns=("prompt", "chosen", "rejected", "system", "template"),
        settings=("adapter",),
    ),
    "masked-lm": Method(task="masked-lm", kinds=("encoder",), columns=("text",)),
    "contrastive": Method(
        task=EMBEDDING,
        kinds=("encoder",),
        columns=("text", "text_pair", "negative", "label", "label_names"),
        settings=("contrastive",),
    ),
    "sequence-classification": Method(
        task="sequence-classification",
        kinds=("encoder", "decoder"),
        columns=("text", "text_pair", "label", "label_names", "normalise_labels"),
        settings=("problem",),
        has_head=True,
    ),
    "token-classification": Method(
        task=TAGGING,
        kinds=("encoder",),
        columns=("tokens", "tags", "case_marks", "swap_entities"),
        has_head=True,
    ),
}
# What a bundle of a decoder and of an encoder answers.
DECODER_TASKS = tuple(dict.fromkeys(m.task for m in METHODS.values() if "decoder" in m.kinds))
ENCODER_TASKS = tuple(
    dict.fromkeys(m.task for m in METHODS.values() if m.has_head and "encoder" in m.kinds)
)

# By which validation metric a stage's best weights are told, by method or problem
# (`Stage.learned`): the first that its validation gives. Of any other by the loss.
BEST_BY = {
    "sequence-classification": ("accuracy",),
    "multi-label": ("micro_f1",),
    "token-classification": ("entity_f1", "token_accuracy"),
    "contrastive": ("accuracy", "spearman", "mrr"),
    "reward": ("preference_accuracy",),
    "dpo": ("preference_accuracy",),
    "grpo": ("reward",),
}
WEIGHTED_BEST_BY = ("macro_entity_f1", "macro_f1")  # where rare labels shall count as much


def best_by(learned: str, metrics: Iterable[str], *, weighted: bool = False) -> str:
    """The name of the metric of `metrics` by which the best weights are told; `weighted`: the stage
    has class weights.
    """
    there = set(metrics)
    wanted = (*(WEIGHTED_BEST_BY if weighted else ()), *BEST_BY.get(learned, ()))
    return next((name for name in wanted if name in there), "loss")


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is a gain, by the end of its name: `wikitext2 perplexity` too."""
    return metric.endswith(LOWER_IS_BETTER)
