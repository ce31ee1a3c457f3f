"""Rows become tokenised examples: checked, rendered, encoded and labelled, for training and validation."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from edgetune.bases import Base
from edgetune.data import Row, Rows, read_rows
from edgetune.errors import BaseModelError, DataError, RecipeError
from edgetune.prompts import PromptFormat, chat_messages, chat_text, prompt_format, render, split_messages
from edgetune.recipe import Stage

IGNORED = -100  # a position without loss, as in torch's cross_entropy
T = TypeVar("T")


@dataclass(slots=True)
class Example:
    """`labels`: per token, IGNORED where there is no loss (sft), or one class index. `row`: line in the file."""

    input_ids: list[int]
    labels: list[int] | int
    row: int


@dataclass(frozen=True)
class ExampleSet:
    """A stage's examples. `digests`, `skipped` and `truncated` have the keys `train` and `validation`."""

    train: list[Example]
    validation: list[Example]
    labels: tuple[str, ...] | None
    digests: dict[str, str]
    prompt_format: PromptFormat
    max_length: int
    skipped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptedRow:
    """A row as texts: what the model is given (chat template applied) and what it shall answer."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True)
class LabelledRow:
    """A row as texts: what is classified and its label."""

    line: int
    text: str
    label: str


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
    limit = token_limit(stage.max_length, tokenizer, base)
    form = prompt_format(
        data,
        method=stage.method,
        chat_template=tokenizer.chat_template,
        columns=sources["train"].rows[0].values,
    )
    load = _load_sft if stage.method == "sft" else _load_classification
    return load(sources, form, stage, tokenizer, labels=labels, limit=limit, seed=seed)


def token_limit(max_length: int, tokenizer: Any, base: Base) -> int:
    """Tokens an example may have: what the recipe says, or less where the base has fewer positions."""
    return min(max_length, base.max_length, int(min(tokenizer.model_max_length, 2**31)))


def prompted_rows(
    source: Rows, form: PromptFormat, tokenizer: Any, *, skip_invalid: bool = False
) -> tuple[list[PromptedRow], int]:
    """Prompt and completion of every row, and how many rows were left out."""

    def convert(row: Row, where: str) -> PromptedRow:
        if form.prompt is None or form.completion is None:
            messages, completion = split_messages(row.values, system=form.system, where=where)
            return PromptedRow(row.line, chat_text(tokenizer, messages, where=where), completion)
        prompt = render(form.prompt, row.values, where=where, field="prompt")
        completion = render(form.completion, row.values, where=where, field="completion")
        if form.template == "chat":
            prompt = chat_text(tokenizer, chat_messages(prompt, system=form.system), where=where)
        return PromptedRow(row.line, prompt, completion)

    return _convert(source, convert, skip_invalid=skip_invalid)


def labelled_rows(
    source: Rows, form: PromptFormat, *, skip_invalid: bool = False
) -> tuple[list[LabelledRow], int]:
    """Text and label of every row, and how many rows were left out."""
    text, label = form.text or "{{ text }}", form.label or "{{ label }}"

    def convert(row: Row, where: str) -> LabelledRow:
        rendered = render(text, row.values, where=where, field="text")
        return LabelledRow(row.line, rendered, render(label, row.values, where=where, field="label").strip())

    return _convert(source, convert, skip_invalid=skip_invalid)


def encode_prompts(texts: Sequence[str], template: str, tokenizer: Any) -> list[list[int]]:
    """Prompt ids. A chat template writes its special tokens itself; a plain prompt gets the tokenizer's own (e.g. bos)."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=template == "plain", verbose=False)["input_ids"]
    return ids


def _check_kind(stage: Stage, base: Base) -> None:
    needed = "decoder" if stage.method == "sft" else "encoder"
    if base.kind != needed:
        example = "builtin:smollm2-135m-instruct" if needed == "decoder" else "builtin:minilm-l6"
        raise RecipeError(
            f'method "{stage.method}" does not fit the base {base.name}',
            expected=f"a base that is {'a decoder' if needed == 'decoder' else 'an encoder'}",
            got=f"{base.model_type}, {'an' if base.kind == 'encoder' else 'a'} {base.kind}",
            fix=f'For example base = "{example}".',
        )


def _convert(
    source: Rows, convert: Callable[[Row, str], T], *, skip_invalid: bool
) -> tuple[list[T], int]:
    """Every row converted; the first bad one raises, or all bad ones are counted. None left is an error."""
    converted: list[T] = []
    first: DataError | None = None
    for row in source.rows:
        try:
            converted.append(convert(row, f"{source.source}, line {row.line}"))
        except DataError as error:
            if not skip_invalid:
                raise
            first = first or error
    skipped = len(source.rows) - len(converted)
    if not converted and first is not None:
        raise DataError(f"none of {skipped} rows can be used; the first: {first}", where=source.source) from first
    return converted, skipped


def _load_sft(
    sources: dict[str, Rows],
    form: PromptFormat,
    stage: Stage,
    tokenizer: Any,
    *,
    labels: Sequence[str] | None,
    limit: int,
    seed: int,
) -> ExampleSet:
    del labels  # there are none in generation
    examples, skipped = {}, {}
    for name, source in sources.items():
        if name == "train":
            source = _subset(source, stage.data.limit, seed=seed)
        rows, unusable = prompted_rows(source, form, tokenizer, skip_invalid=stage.data.skip_invalid)
        encoded = _encode_sft(rows, form.template, tokenizer)
        kept = [example for example in encoded if len(example.input_ids) <= limit]
        if len(kept) < len(encoded) and (not stage.data.skip_invalid or not kept):
            longest = next(example for example in encoded if len(example.input_ids) > limit)
            raise _too_long(longest, source=source.source, stage=stage, limit=limit)
        examples[name] = kept
        skipped[name] = sources[name].skipped + unusable + len(encoded) - len(kept)
    return _example_set(examples, sources, form, labels=None, limit=limit, skipped=skipped, truncated={})


def _encode_sft(rows: Sequence[PromptedRow], template: str, tokenizer: Any) -> list[Example]:
    """Prompt and completion are tokenised apart, so that the device's prompt ids are a prefix of the training ids."""
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise BaseModelError("the base's tokenizer has no end-of-text token", expected="eos_token in tokenizer_config.json")
    prompts = encode_prompts([row.prompt for row in rows], template, tokenizer)
    completions = tokenizer([row.completion for row in rows], add_special_tokens=False, verbose=False)["input_ids"]
    examples = []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        answer = [*completion, end]
        examples.append(Example(prompt + answer, [IGNORED] * len(prompt) + answer, row.line))
    return examples


def _too_long(example: Example, *, source: str, stage: Stage, limit: int) -> DataError:
    tokens = len(example.input_ids)
    if limit < stage.max_length:
        fix = "Shorten the row: the base has no more positions. Or leave such rows out with data.skip_invalid = true."
    else:
        fix = f"Set max_length = {tokens} or more, or leave such rows out with data.skip_invalid = true."
    where = f"{source}, line {example.row}"
    return DataError(
        "prompt and completion are too long", where=where, expected=f"at most {limit} tokens", got=str(tokens), fix=fix
    )


def _load_classification(
    sources: dict[str, Rows],
    form: PromptFormat,
    stage: Stage,
    tokenizer: Any,
    *,
    labels: Sequence[str] | None,
    limit: int,
    seed: int,
) -> ExampleSet:
    """Labels come from the whole training file, so that `data.limit` never changes the head's shape."""
    examples, skipped, truncated = {}, {}, {}
    names = tuple(labels) if labels is not None else None
    for name, source in sources.items():
        rows, unusable = labelled_rows(source, form, skip_invalid=stage.data.skip_invalid)
        if names is None:
            names = _label_names(rows, source=source.source)
        known = [row for row in rows if row.label in names]
        if len(known) < len(rows) and (not stage.data.skip_invalid or not known):
            unknown = next(row for row in rows if row.label not in names)
            raise _unknown_label(unknown, source=source.source, names=names)
        chosen = _sample(known, stage.data.limit if name == "train" else None, seed=seed)
        examples[name], truncated[name] = _encode_classification(chosen, names, tokenizer, limit=limit)
        skipped[name] = source.skipped + unusable + len(rows) - len(known)
    return _example_set(examples, sources, form, labels=names, limit=limit, skipped=skipped, truncated=truncated)


def _label_names(rows: Iterable[LabelledRow], *, source: str) -> tuple[str, ...]:
    names = tuple(sorted({row.label for row in rows}))
    if len(names) < 2:
        raise DataError(
            "there is nothing to tell apart", where=source, expected="at least two labels", got=f"only {names[0]!r}"
        )
    return names


def _unknown_label(row: LabelledRow, *, source: str, names: tuple[str, ...]) -> DataError:
    shown = ", ".join(names[:8]) + (f" … ({len(names)} labels)" if len(names) > 8 else "")
    return DataError(
        f'the label "{row.label}" does not occur in the training rows',
        where=f"{source}, line {row.line}",
        expected=f"one of {shown}",
        fix="Correct the label or add training rows for it.",
    )


def _encode_classification(
    rows: Sequence[LabelledRow], names: tuple[str, ...], tokenizer: Any, *, limit: int
) -> tuple[list[Example], int]:
    """Examples and how many were cut to `limit` tokens (special tokens stay)."""
    texts = [row.text for row in rows]
    encoded = tokenizer(texts, truncation=True, max_length=limit, verbose=False)["input_ids"]
    at_limit = [text for text, ids in zip(texts, encoded, strict=True) if len(ids) == limit]
    whole = tokenizer(at_limit, truncation=False, verbose=False)["input_ids"] if at_limit else []
    index = {name: number for number, name in enumerate(names)}
    examples = [Example(ids, index[row.label], row.line) for row, ids in zip(rows, encoded, strict=True)]
    return examples, sum(len(ids) > limit for ids in whole)


def _subset(source: Rows, limit: int | None, *, seed: int) -> Rows:
    rows = _sample(source.rows, limit, seed=seed)
    return Rows(source=source.source, rows=rows, skipped=source.skipped, digest=source.digest)


def _sample(rows: list[T], limit: int | None, *, seed: int) -> list[T]:
    """A random subset in file order; the same seed draws the same rows."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def _example_set(
    examples: dict[str, list[Example]],
    sources: dict[str, Rows],
    form: PromptFormat,
    *,
    labels: tuple[str, ...] | None,
    limit: int,
    skipped: dict[str, int],
    truncated: dict[str, int],
) -> ExampleSet:
    return ExampleSet(
        train=examples["train"],
        validation=examples.get("validation", []),
        labels=labels,
        digests={name: source.digest for name, source in sources.items()},
        prompt_format=form,
        max_length=limit,
        skipped=skipped,
        truncated=truncated,
    )
