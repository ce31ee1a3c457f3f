"""Preference rows (prompt, chosen, rejected) become pairs of token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.core.errors import DataError
from edgetune.data.completions import encode_prompts
from edgetune.data.conversations import (
    Prompt,
    closing_tokens,
    end_token,
    prompt_text,
    row_answer,
    row_prompt,
)
from edgetune.data.examples import IGNORED, ExampleSet, Loading, convert_rows, subset
from edgetune.data.prompts import PromptFormat
from edgetune.data.rows import Row, Rows


@dataclass(frozen=True)
class PreferenceRow:
    """A row as texts: what was asked, the better answer and the worse one."""

    line: int
    prompt: Prompt
    chosen: str
    rejected: str

    @property
    def longer(self) -> float:
        """Whether "the longer answer wins" is right here: 1, 0, or ½ when both have as many
        characters.
        """
        difference = len(self.chosen) - len(self.rejected)
        return 0.5 if difference == 0 else float(difference > 0)


@dataclass(slots=True)
class PairExample:
    """Two sequences of one prompt. `labels` as for sft: IGNORED on the prompt, the tokens of the
    answer after it.
    """

    input_ids: list[int]  # prompt and chosen answer
    labels: list[int]
    rejected_ids: list[int]  # prompt and rejected answer
    rejected_labels: list[int]
    row: int
    longer: float  # see PreferenceRow
    # dpo: the reference policy's log-probabilities of both answers
    reference: tuple[float, float] | None = None

    @property
    def padded_length(self) -> int:
        """Tokens of the pair as two rows of one batch, the shorter one padded."""
        return 2 * max(len(self.input_ids), len(self.rejected_ids))


def preference_rows(
    source: Rows, form: PromptFormat, *, skip_invalid: bool = False
) -> tuple[list[PreferenceRow], int]:
    """Prompt and both answers of every row, and how many rows were left out. Equal answers are a
    DataError.
    """
    chosen, rejected = form.chosen or "{{ chosen }}", form.rejected or "{{ rejected }}"

    def convert(row: Row, where: str) -> PreferenceRow:
        prompt = row_prompt(form, row.values, where=where)
        better = row_answer(chosen, row.values, where=where, field="chosen")
        worse = row_answer(rejected, row.values, where=where, field="rejected")
        if better.strip() == worse.strip():
            raise DataError(
                "the chosen and the rejected answer are the same",
                where=where,
                expected="two different answers",
                got=repr(better if len(better) <= 40 else better[:39] + "…"),
                fix="Correct the row, or leave such rows out with data.skip_invalid = true.",
            )
        return PreferenceRow(row.line, prompt, better, worse)

    return convert_rows(source, convert, skip_invalid=skip_invalid)


def load_preferences(loading: Loading) -> ExampleSet:
    """Pairs for `reward` (closed as the chat template closes a turn) and for `dpo` (ended as for
    sft).
    """
    stage, tokenizer, form, limit = loading.stage, loading.tokenizer, loading.form, loading.limit
    ending = closing_tokens(form, tokenizer) if stage.method == "reward" else [end_token(tokenizer)]
    examples: dict[str, list[Any]] = {}
    skipped = {}
    for name, source in loading.sources.items():
        if name == "train":
            source = subset(source, stage.data.limit, seed=loading.seed)
        rows, unusable = preference_rows(source, form, skip_invalid=stage.data.skip_invalid)
        encoded = encode_pairs(rows, form, tokenizer, ending=ending)
        kept = [pair for pair in encoded if pair.padded_length <= 2 * limit]
        if len(kept) < len(encoded) and (not stage.data.skip_invalid or not kept):
            longest = next(pair for pair in encoded if pair.padded_length > 2 * limit)
            raise _too_long(longest, source=source.source, asked=stage.max_length, limit=limit)
        examples[name] = kept
        skipped[name] = loading.sources[name].skipped + unusable + len(encoded) - len(kept)
    return loading.example_set(examples, skipped=skipped)


def encode_pairs(
    rows: Sequence[PreferenceRow], form: PromptFormat, tokenizer: Any, *, ending: list[int]
) -> list[PairExample]:
    """Prompt and answers are tokenised apart, as for sft, so that a device's prompt ids are a
    prefix of these.
    """
    texts = [prompt_text(form, row.prompt, tokenizer, where=f"line {row.line}") for row in rows]
    prompts = encode_prompts(texts, form.template, tokenizer)
    chosen = encode_answers([row.chosen for row in rows], tokenizer)
    rejected = encode_answers([row.rejected for row in rows], tokenizer)
    pairs = []
    for row, prompt, better, worse in zip(rows, prompts, chosen, rejected, strict=True):
        unlabelled = [IGNORED] * len(prompt)
        better, worse = better + ending, worse + ending
        pairs.append(
            PairExample(
                prompt + better,
                unlabelled + better,
                prompt + worse,
                unlabelled + worse,
                row=row.line,
                longer=row.longer,
            )
        )
    return pairs


def encode_answers(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Ids of answers, without anything before or after them."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return ids


def _too_long(pair: PairExample, *, source: str, asked: int, limit: int) -> DataError:
    tokens = pair.padded_length // 2
    raised = (
        "Shorten the row: the base has no more positions."
        if limit < asked
        else f"Set max_length = {tokens} or more."
    )
    return DataError(
        "prompt and answer are too long",
        where=f"{source}, line {pair.row}",
        expected=f"at most {limit} tokens",
        got=str(tokens),
        fix=f"{raised} Or leave such rows out with data.skip_invalid = true.",
    )


def encode_answered(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    form: PromptFormat,
    tokenizer: Any,
    *,
    limit: int,
) -> list[list[int]]:
    """Prompts and answers as `reward` trains on them; of more than `limit` tokens the last ones."""
    heads = encode_prompts(
        [prompt_text(form, prompt, tokenizer) for prompt in prompts], form.template, tokenizer
    )
    closing = closing_tokens(form, tokenizer)
    answers = encode_answers(completions, tokenizer)
    return [(head + answer + closing)[-limit:] for head, answer in zip(heads, answers, strict=True)]
