"""Rows become tokenised examples: checked, rendered, encoded and labelled, for training and
validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from edgetune.core.errors import RecipeError
from edgetune.core.tasks import METHODS
from edgetune.data.completions import load_completions
from edgetune.data.examples import ExampleSet, Loading, token_limit
from edgetune.data.labels import load_labelled
from edgetune.data.masking import load_masked
from edgetune.data.plain_text import load_packed
from edgetune.data.preferences import load_preferences
from edgetune.data.prompts import prompt_format
from edgetune.data.rollout_prompts import load_prompts
from edgetune.data.rows import hold_out, read_rows
from edgetune.data.seq2seq import load_answers
from edgetune.data.tagging import load_tagged
from edgetune.data.targets import load_targets
from edgetune.models.base import Base
from edgetune.models.text_tokenizer import reading
from edgetune.recipe.schema import Stage

# `learned` of a stage → its loader; see core/tasks.py for what else a method is entered with
LOADERS: dict[str, Callable[[Loading], ExampleSet]] = {
    "causal-lm": load_packed,
    "masked-lm": load_masked,
    "sft": load_completions,
    "sequence-classification": load_labelled,
    "multi-label": load_targets,
    "regression": load_targets,
    "token-classification": load_tagged,
    "reward": load_preferences,
    "dpo": load_preferences,
    "grpo": load_prompts,
}


def load_examples(
    stage: Stage, tokenizer: Any, base: Base, labels: Sequence[str] | None = None, *, seed: int = 0
) -> ExampleSet:
    """All examples of a stage; `labels` fixes the classes, else they are the sorted labels of the
    training file.

    Raises RecipeError when method and base do not fit, DataError for a row that cannot be used
    (with `data.skip_invalid` such rows are counted instead). `seed` draws the subset of
    `data.limit`.
    """
    _check_kind(stage, base)
    data = stage.data
    sources = {"train": read_rows(data.train, data.skip_invalid)}
    if data.validation is not None:
        sources["validation"] = read_rows(data.validation, data.skip_invalid)
    elif data.hold_out is not None:
        sources["train"], sources["validation"] = hold_out(
            sources["train"], data.hold_out, seed=seed
        )
    limit = token_limit(stage.max_length, tokenizer, base)
    form = prompt_format(
        data,
        method=stage.method,
        chat_template=tokenizer.chat_template,
        columns=sources["train"].rows[0].values,
    )
    form = replace(form, control_tokens=data.control_tokens)
    tokenizer = reading(tokenizer, form.control_tokens)
    return _loader(stage, base)(
        Loading(sources, form, stage, tokenizer, labels=labels, limit=limit, seed=seed)
    )


def _loader(stage: Stage, base: Base) -> Callable[[Loading], ExampleSet]:
    return load_answers if base.kind == "encoder-decoder" else LOADERS[stage.learned]


def _check_kind(stage: Stage, base: Base) -> None:
    needed, *others = METHODS[stage.method].kinds
    if base.kind not in (needed, *others):
        example = "builtin:smollm2-135m-instruct" if needed == "decoder" else "builtin:minilm-l6"
        raise RecipeError(
            f'method "{stage.method}" does not fit the base {base.name}',
            expected=f"a base that is {'a decoder' if needed == 'decoder' else 'an encoder'}",
            got=f"{base.model_type}, {'a' if base.kind == 'decoder' else 'an'} {base.kind}",
            fix=(
                'Train it with method = "sft".'
                if base.kind == "encoder-decoder"
                else f'For example base = "{example}".'
            ),
        )
