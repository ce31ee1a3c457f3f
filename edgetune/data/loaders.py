"""Rows become tokenised examples: checked, rendered, encoded and labelled, for training and
validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from edgetune.core.errors import RecipeError
from edgetune.core.tasks import EMBEDDING, METHODS
from edgetune.data.completions import load_completions, prompted_rows, without_end
from edgetune.data.contrasts import load_contrasts, stage_format
from edgetune.data.examples import Example, ExampleSet, Loading, token_limit
from edgetune.data.findings import Finding, cut, find, unusable, without_names
from edgetune.data.implicit_prompts import paired, well_answered
from edgetune.data.labels import NO_LINE, LabelledRow, encode_texts, load_labelled
from edgetune.data.masking import load_masked
from edgetune.data.out_of_scope import without_outside
from edgetune.data.plain_text import load_packed
from edgetune.data.preferences import load_preferences
from edgetune.data.prompts import PromptFormat
from edgetune.data.rollout_prompts import load_prompts
from edgetune.data.row import RowTexts
from edgetune.data.row_texts import row_texts
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
    stage: Stage,
    tokenizer: Any,
    base: Base,
    labels: Sequence[str] | None = None,
    *,
    seed: int = 0,
    outside: str | None = None,
) -> ExampleSet:
    """All examples of a stage; `labels` fixes the classes, else they are the sorted labels of the
    training file.

    Raises RecipeError when method and base do not fit, DataError for a row that cannot be used
    (with `data.skip_invalid` such rows are counted instead). `seed` draws the subset of
    `data.limit`. `outside`: see `outside_label`.
    """
    loading = open_rows(stage, tokenizer, base, labels, seed=seed)
    others: list[LabelledRow] = []
    if outside is not None:
        sources, others = without_outside(loading.sources, loading.form, outside)
        loading = replace(loading, sources=sources)
    sources = loading.sources
    found = loader_of(stage, base)(loading)
    findings = _findings(stage, sources, loading.form, found, seed=seed)
    drawn = None if stage.data.validation is not None else len(_held(sources).rows)
    found = replace(found, findings=findings, held_out=drawn)
    if not others:
        return found
    ids, _ = encode_texts([row.text for row in others], loading.tokenizer, limit=loading.limit)
    strangers = [Example(one, 0, row.line) for row, one in zip(others, ids, strict=True)]
    return replace(found, out_of_scope=strangers)


def open_rows(
    stage: Stage, tokenizer: Any, base: Base, labels: Sequence[str] | None = None, *, seed: int = 0
) -> Loading:
    """The rows of a stage and how they are read, for its loader."""
    _check_kind(stage, base)
    sources = stage_rows(stage, seed=seed)
    limit = token_limit(stage.max_length, tokenizer, base)
    form = stage_format(
        stage,
        chat_template=tokenizer.chat_template,
        columns=sources["train"].rows[0].values,
    )
    form = replace(form, control_tokens=stage.data.control_tokens)
    tokenizer = reading(tokenizer, form.control_tokens)
    for note in told(stage, form):
        sources["train"].note(note)
    return Loading(sources, form, stage, tokenizer, labels=labels, limit=limit, seed=seed)


def answers_of(
    stage: Stage, tokenizer: Any, base: Base, *, seed: int = 0
) -> dict[str, list[tuple[str, str]]]:
    """Every answer of an sft stage, those in the middle of its conversations too, as ("file, line
    n", text); by the names of the stage's sources, "train" first.
    """
    loading = open_rows(stage, tokenizer, base, None, seed=seed)
    found: dict[str, list[tuple[str, str]]] = {}
    for name, source in loading.sources.items():
        limit = stage.data.limit if name == "train" else None
        rows, _ = prompted_rows(
            replace(source, rows=sample(source.rows, limit, seed=seed), notes=[]),
            loading.form,
            tokenizer=loading.tokenizer,
            skip_invalid=stage.data.skip_invalid,
        )
        found[name] = [
            (f"{source.source}, line {row.line}", without_end(text, loading.tokenizer))
            for row in rows
            for text in (*(row.prompt[start:end] for start, end in row.answers), row.completion)
        ]
    return found


def _held(sources: dict[str, Rows]) -> Rows:
    """The rows for validation; no rows where there are none."""
    return sources.get("validation", replace(sources["train"], rows=[]))


def _findings(
    stage: Stage, sources: dict[str, Rows], form: PromptFormat, found: ExampleSet, *, seed: int
) -> list[Finding]:
    """Of the rows that are learned and measured; of packed text, the documents."""
    lines = {
        "train": {example.row for example in found.train} - {NO_LINE},
        "validation": {example.row for example in found.validation},
    }
    if stage.method == "causal-lm":
        drawn = sample(sources["train"].rows, stage.data.limit, seed=seed)
        lines = {"train": {row.line for row in drawn}} | {
            "validation": {row.line for row in _held(sources).rows}
        }
    texts = {
        name: [one for one in texts_in(stage, source, form) if one.line in lines[name]]
        for name, source in sources.items()
    }
    one_label = stage.learned == "sequence-classification"
    return [
        *without_names(sources),
        *unusable(found.skipped),
        *cut(found.truncated, lines, found.max_length),
        *find(
            texts["train"],
            texts.get("validation", []),
            labelled=found.labels is not None,
            one_label=one_label,
        ),
    ]


def texts_in(stage: Stage, source: Rows, form: PromptFormat) -> list[RowTexts]:
    """The texts of the rows as the method reads them: answers marked as good or bad are paired, or
    the good ones taken.
    """
    if "chosen" in METHODS[stage.method].columns:
        source = paired(source, form)
    elif stage.method == "sft" and form.prompt is not None:
        source = well_answered(source, form)
    return row_texts(stage, source, form)[0]


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


def loader_of(stage: Stage, base: Base) -> Callable[[Loading], ExampleSet]:
    """What makes the rows of a stage into examples."""
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
