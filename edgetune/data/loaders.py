"""Rows become tokenised examples: checked, rendered, encoded and labelled, for training and
validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from edgetune.core.errors import RecipeError
from edgetune.core.tasks import EMBEDDING, METHODS
from edgetune.data.completions import load_completions
from edgetune.data.contrasts import contrast_format, load_contrasts
from edgetune.data.examples import ExampleSet, Loading, token_limit
from edgetune.data.labels import load_labelled
from edgetune.data.look import look, standing_in
from edgetune.data.masking import load_masked
from edgetune.data.plain_text import load_packed, text_rows
from edgetune.data.preferences import load_preferences
from edgetune.data.prompts import PromptFormat, prompt_format
from edgetune.data.rollout_prompts import load_prompts
from edgetune.data.rows import Rows, sample
from edgetune.data.seq2seq import load_answers
from edgetune.data.splits import stage_rows
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
    "contrastive": load_contrasts,
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
    sources = stage_rows(stage, seed=seed)
    limit = token_limit(stage.max_length, tokenizer, base)
    columns = sources["train"].rows[0].values
    form = (
        contrast_format(stage.data, columns)
        if stage.task == EMBEDDING
        else prompt_format(
            stage.data,
            method=stage.method,
            chat_template=tokenizer.chat_template,
            columns=columns,
        )
    )
    form = replace(form, control_tokens=stage.data.control_tokens)
    tokenizer = reading(tokenizer, form.control_tokens)
    for note in told(stage, form):
        sources["train"].note(note)
    found = _loader(stage, base)(
        Loading(sources, form, stage, tokenizer, labels=labels, limit=limit, seed=seed)
    )
    learned, asked = _compared(stage, sources, form, found, seed=seed)
    measured = standing_in(learned, asked), len(asked)
    seen = look(found.train, found.labels, measured)
    notes = found.notes | ({"rows": seen} if seen else {})
    return replace(found, validation_in_train=measured, notes=notes)


def _compared(
    stage: Stage, sources: dict[str, Rows], form: PromptFormat, found: ExampleSet, *, seed: int
) -> tuple[Sequence[Any], Sequence[Any]]:
    """The examples of train and validation, or the documents where examples are packed of them."""
    if stage.method != "causal-lm" or "validation" not in sources:
        return found.train, found.validation
    train = sources["train"]
    drawn = replace(train, rows=sample(train.rows, stage.data.limit, seed=seed))
    texts = [
        [row.text for row in text_rows(source, form, skip_invalid=stage.data.skip_invalid)[0]]
        for source in (drawn, sources["validation"])
    ]
    return texts[0], texts[1]


def told(stage: Stage, form: PromptFormat) -> list[str]:
    """What the recipe does not say of how its rows are read, and their columns do."""
    notes = []
    if stage.data.prompt is None and form.prompt not in (None, "{{ prompt }}"):
        notes.append(f"asked with {form.prompt!r}")
    if stage.data.completion is None and form.completion not in (
        None,
        "{{ completion }}",
        "{{ chosen }}",
    ):
        notes.append(f"answered with {form.completion!r}")
    if stage.task == EMBEDDING:
        found = {"alike": form.positive, "unlike": form.negative, "label": form.label}
        notes += [f"{what}: {template!r}" for what, template in found.items() if template]
    if form.system_column is not None:
        notes.append(f"system messages of the rows' own, {form.system_column!r}")
    if stage.data.tags is None and form.tags not in (None, "tags"):
        notes.append(f'tags in the column "{form.tags}"')
    return notes


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
