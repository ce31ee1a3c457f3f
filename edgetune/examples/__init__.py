"""Rows become tokenised examples: checked, rendered, encoded and labelled, for training and validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edgetune.bases import Base
from edgetune.data import read_rows
from edgetune.errors import RecipeError
from edgetune.examples.classification import LabelledRow, labelled_rows, load_labelled
from edgetune.examples.common import IGNORED, Example, ExampleSet, Loading, hold_out, token_limit
from edgetune.examples.generation import PromptedRow, encode_prompts, load_completions, prompted_rows
from edgetune.examples.masked import load_masked
from edgetune.examples.preference import PreferenceRow, load_preferences, preference_rows
from edgetune.examples.prompting import load_prompts
from edgetune.examples.seq2seq import load_answers
from edgetune.examples.tagging import TaggedRow, load_tagged, tagged_rows
from edgetune.examples.targets import load_targets
from edgetune.examples.text import load_packed
from edgetune.prompts import prompt_format
from edgetune.recipe import KINDS, Method, Stage

__all__ = [
    "IGNORED",
    "Example",
    "ExampleSet",
    "LabelledRow",
    "PreferenceRow",
    "PromptedRow",
    "TaggedRow",
    "encode_prompts",
    "labelled_rows",
    "load_examples",
    "preference_rows",
    "prompted_rows",
    "tagged_rows",
    "token_limit",
]

LOADERS: dict[Method, Callable[[Loading], ExampleSet]] = {
    "causal-lm": load_packed,
    "masked-lm": load_masked,
    "sft": load_completions,
    "sequence-classification": load_labelled,
    "token-classification": load_tagged,
    "reward": load_preferences,
    "dpo": load_preferences,
    "grpo": load_prompts,
}


def load_examples(
    stage: Stage, tokenizer: Any, base: Base, labels: Sequence[str] | None = None, *, seed: int = 0
) -> ExampleSet:
    """All examples of a stage; `labels` fixes the classes, else they are the sorted labels of the training file.

    Raises RecipeError when method and base do not fit, DataError for a row that cannot be used (with
    `data.skip_invalid` such rows are counted instead). `seed` draws the subset of `data.limit`.
    """
    _check_kind(stage, base)
    data = stage.data
    sources = {"train": read_rows(data.train, data.skip_invalid)}
    if data.validation is not None:
        sources["validation"] = read_rows(data.validation, data.skip_invalid)
    elif data.hold_out is not None:
        sources["train"], sources["validation"] = hold_out(sources["train"], data.hold_out, seed=seed)
    limit = token_limit(stage.max_length, tokenizer, base)
    form = prompt_format(
        data,
        method=stage.method,
        chat_template=tokenizer.chat_template,
        columns=sources["train"].rows[0].values,
    )
    return _loader(stage, base)(Loading(sources, form, stage, tokenizer, labels=labels, limit=limit, seed=seed))


def _loader(stage: Stage, base: Base) -> Callable[[Loading], ExampleSet]:
    if base.kind == "encoder-decoder":
        return load_answers
    return LOADERS[stage.method] if stage.problem == "single-label" else load_targets


def _check_kind(stage: Stage, base: Base) -> None:
    needed = KINDS[stage.method]
    if base.kind != needed and not (base.kind == "encoder-decoder" and stage.method == "sft"):
        example = "builtin:smollm2-135m-instruct" if needed == "decoder" else "builtin:minilm-l6"
        raise RecipeError(
            f'method "{stage.method}" does not fit the base {base.name}',
            expected=f"a base that is {'a decoder' if needed == 'decoder' else 'an encoder'}",
            got=f"{base.model_type}, {'a' if base.kind == 'decoder' else 'an'} {base.kind}",
            fix='Train it with method = "sft".' if base.kind == "encoder-decoder" else f'For example base = "{example}".',
        )
