"""Preference rows (prompt, chosen, rejected) become pairs of token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.core.errors import DataError
from edgetune.data.batching import IGNORE
from edgetune.data.completions import encode_completions, encode_prompts, without_end
from edgetune.data.conversations import (
    Prompt,
    closing_tokens,
    end_token,
    prompt_text,
)
from edgetune.data.examples import ExampleSet, Loading, load
from edgetune.data.implicit_prompts import paired, row_pair
from edgetune.data.prompts import PromptFormat
from edgetune.data.row import Row
from edgetune.data.rows import Rows, convert_rows


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
    """Two sequences of one prompt. `labels` as for sft: IGNORE on the prompt, the tokens of the
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
    source = paired(source, form)

    def convert(row: Row, where: str) -> PreferenceRow:
        prompt, better, worse = row_pair(form, row.values, where=where)
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
    sft); both answers of at most `max_length` tokens with the prompt.
    """
    tokenizer, form = loading.tokenizer, loading.form
    reward = loading.stage.method == "reward"
    ending = closing_tokens(form, tokenizer) if reward else [end_token(tokenizer)]

    def encode(_: str, rows: list[PreferenceRow]) -> list[PairExample]:
        return encode_pairs(rows, form, tokenizer, ending=ending)

    def refuse(pair: PairExample, source: str) -> DataError | None:
        tokens = pair.padded_length // 2
        if tokens <= loading.limit:
            return None
        where = f"{source}, line {pair.row}"
        return loading.too_long(
            "prompt and answer are too long", where, tokens, raise_or_skip=". Or"
        )

    return load(loading, preference_rows, encode, refuse=refuse)


def encode_pairs(
    rows: Sequence[PreferenceRow], form: PromptFormat, tokenizer: Any, *, ending: list[int]
) -> list[PairExample]:
    """Prompt and answers are tokenised apart, as for sft, so that a device's prompt ids are a
    prefix of these.
    """
    texts = [prompt_text(form, row.prompt, tokenizer, where=f"line {row.line}") for row in rows]
    prompts = encode_prompts(texts, form.template, tokenizer)
    chosen = encode_completions([without_end(row.chosen, tokenizer) for row in rows], tokenizer)
    rejected = encode_completions([without_end(row.rejected, tokenizer) for row in rows], tokenizer)
    pairs = []
    for row, prompt, better, worse in zip(rows, prompts, chosen, rejected, strict=True):
        unlabelled = [IGNORE] * len(prompt)
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
    answers = encode_completions(completions, tokenizer)
    return [(head + answer + closing)[-limit:] for head, answer in zip(heads, answers, strict=True)]
