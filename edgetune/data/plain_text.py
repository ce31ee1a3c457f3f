"""Raw text becomes packed sequences for causal-lm, and pieces with masked tokens for masked-lm."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgetune.core.errors import BaseModelError, DataError
from edgetune.data.batching import IGNORE, Batch
from edgetune.data.examples import IGNORED, Example, ExampleSet, Loading, convert_rows, subset
from edgetune.data.prompts import PromptFormat, render
from edgetune.data.rows import Row, Rows


@dataclass(frozen=True)
class TextRow:
    """A row as a document."""

    line: int
    text: str


def text_rows(
    source: Rows, form: PromptFormat, *, skip_invalid: bool = False
) -> tuple[list[TextRow], int]:
    """The text of every row, and how many rows were left out."""
    template = form.text or "{{ text }}"

    def convert(row: Row, where: str) -> TextRow:
        return TextRow(row.line, render(template, row.values, where=where, field="text"))

    return convert_rows(source, convert, skip_invalid=skip_invalid)


def load_packed(loading: Loading) -> ExampleSet:
    """Sequences of `max_length` tokens; the training documents are shuffled with the seed before
    they are packed.
    """
    stage, examples, skipped = loading.stage, {}, {}
    for name, source in loading.sources.items():
        if name == "train":
            source = subset(source, stage.data.limit, seed=loading.seed)
        rows, unusable = text_rows(source, loading.form, skip_invalid=stage.data.skip_invalid)
        documents = encode_documents(rows, loading.tokenizer)
        if name == "train":
            random.Random(loading.seed).shuffle(documents)
        examples[name] = pack(documents, loading.limit)
        skipped[name] = loading.sources[name].skipped + unusable
        if not examples[name]:
            raise DataError(
                "there is no text to learn from",
                where=source.source,
                expected="at least two tokens",
            )
    return loading.example_set(examples, skipped=skipped)


def encode_documents(rows: Iterable[TextRow], tokenizer: Any) -> list[tuple[int, list[int]]]:
    """(line, token ids) of every document: the tokenizer's own beginning, the text, the end-of-text
    token.
    """
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise BaseModelError(
            "the base's tokenizer has no end-of-text token",
            expected="eos_token in tokenizer_config.json",
        )
    rows = list(rows)
    encoded = tokenizer([row.text for row in rows], verbose=False)["input_ids"]
    return [
        (row.line, ids if ids[-1:] == [end] else [*ids, end])
        for row, ids in zip(rows, encoded, strict=True)
    ]


def pack(documents: Iterable[tuple[int, list[int]]], length: int) -> list[Example]:
    """Sequences of `length` tokens (or one less; the last may be shorter), with labels on all but a
    piece's first token.
    """
    packed: list[Example] = []
    current: Example | None = None
    for line, ids in documents:
        start = 0
        while start < len(ids) - 1:
            if (
                current is None or length - len(current.input_ids) < 2
            ):  # a piece of one token would predict nothing
                current = Example([], [], line, [])
                packed.append(current)
            piece = ids[start : start + length - len(current.input_ids)]
            _append(current, piece)
            start += len(piece) - 1
    return packed


def _append(example: Example, piece: list[int]) -> None:
    assert isinstance(example.labels, list) and example.position_ids is not None
    example.input_ids += piece
    example.labels += [IGNORED, *piece[1:]]
    example.position_ids += range(len(piece))


def load_masked(loading: Loading) -> ExampleSet:
    """Every document cut into pieces, each between the tokenizer's own special tokens."""
    stage, tokenizer = loading.stage, loading.tokenizer
    if tokenizer.mask_token_id is None:
        raise BaseModelError(
            "the base's tokenizer has no mask token", expected="mask_token in tokenizer_config.json"
        )
    examples, skipped = {}, {}
    for name, source in loading.sources.items():
        if name == "train":
            source = subset(source, stage.data.limit, seed=loading.seed)
        rows, unusable = text_rows(source, loading.form, skip_invalid=stage.data.skip_invalid)
        examples[name] = cut(rows, tokenizer, loading.limit)
        skipped[name] = loading.sources[name].skipped + unusable
        if not examples[name]:
            raise DataError(
                "there is no text to learn from", where=source.source, expected="at least one token"
            )
    masking = Masking(tokenizer.mask_token_id, len(tokenizer), loading.seed)
    return loading.example_set(examples, skipped=skipped, mask=masking)


def cut(rows: Iterable[TextRow], tokenizer: Any, limit: int) -> list[Example]:
    """Pieces of at most `limit` tokens, special ones included; labels on the tokens that may be
    masked.
    """
    rows = list(rows)
    encoded = tokenizer(
        [row.text for row in rows],
        truncation=True,
        max_length=limit,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    examples = []
    for ids, special, row in zip(
        encoded["input_ids"],
        encoded["special_tokens_mask"],
        encoded["overflow_to_sample_mapping"],
        strict=True,
    ):
        labels = [
            IGNORED if is_special else token for token, is_special in zip(ids, special, strict=True)
        ]
        if any(label != IGNORED for label in labels):
            examples.append(Example(ids, labels, rows[row].line))
    return examples


SHARE = 0.15  # of the tokens that may be masked
# of the chosen tokens: replaced by the mask token, by any token; the rest stays as it is
MASKED, RANDOM = 0.8, 0.1


@dataclass(frozen=True)
class Masking:
    """Chooses tokens of a batch, hides them, and leaves labels on them alone."""

    mask_id: int
    vocab_size: int
    seed: int

    def __call__(self, batch: Batch, step: int) -> Batch:
        """The batch of optimizer step `step` with tokens hidden; its labels say which tokens may be
        chosen.
        """
        input_ids, labels = batch.input_ids.clone(), torch.full_like(batch.labels, IGNORE)
        for row, line in enumerate(batch.rows):
            length = int(batch.attention_mask[row].sum())
            ids = batch.input_ids[row, :length]
            draw = torch.rand(
                2, length, generator=self._generator(step, line, ids), dtype=torch.float64
            )  # (which, how)
            chosen = (draw[0] < SHARE) & (batch.labels[row, :length] != IGNORE)
            labels[row, :length][chosen] = ids[chosen]
            hidden = input_ids[row, :length]
            hidden[chosen & (draw[1] < MASKED)] = self.mask_id
            randomly = chosen & (draw[1] >= MASKED) & (draw[1] < MASKED + RANDOM)
            # Uniform within its interval, so that no further draw is needed.
            words = (
                ((draw[1] - MASKED) / RANDOM * self.vocab_size).long().clamp(0, self.vocab_size - 1)
            )
            hidden[randomly] = words[randomly]
        return replace(
            batch, input_ids=input_ids, labels=labels, targets=int((labels != IGNORE).sum())
        )

    def _generator(self, step: int, line: int, ids: torch.Tensor) -> torch.Generator:
        key = zlib.crc32(f"{self.seed}/{step}/{line}/".encode() + ids.numpy().tobytes())
        return torch.Generator().manual_seed(key)
