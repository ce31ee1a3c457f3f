"""A run's answers in torch: the reference that a bundle's answers are compared with."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from edgetune.adapters.runs import load_adapted_model
from edgetune.core.confidence import ScoredLabel, confidence_of, scored
from edgetune.core.errors import InputError
from edgetune.core.tag_sequences import likeliest_tags
from edgetune.core.templates import chat_messages
from edgetune.core.text import Text, first_subwords, join_words, outside_tag
from edgetune.data.batching import Batch, in_order_of_length, split_by_prefix
from edgetune.data.collation import collate
from edgetune.data.completions import encode_prompts
from edgetune.data.conversations import Prompt
from edgetune.data.examples import Example
from edgetune.data.labels import encode_texts
from edgetune.data.preferences import encode_answered
from edgetune.data.prompts import PromptFormat, apply_chat_template
from edgetune.evaluation.answers import HeadAnswers
from edgetune.models.heads import DecoderClassifier, unwrapped
from edgetune.models.text_tokenizer import reading
from edgetune.recipe.generation import shaping

MAX_NEW_TOKENS = 256  # where the adapter records no limit


class TorchAnswers(HeadAnswers):
    """The adapted model in fp32, greedy."""

    def __init__(self, model: Any, tokenizer: Any, metadata: dict[str, Any]) -> None:
        self.model, self.metadata = model.eval(), metadata
        self.task: str = metadata["task"]
        self.problem: str = metadata.get("problem") or "single-label"
        self.labels = tuple(metadata["labels"]) if metadata["labels"] is not None else None
        self.prompt_format = PromptFormat(**(metadata["prompt_format"] or {}))
        self.confidence = confidence_of(metadata)
        self.tokenizer = reading(tokenizer, self.prompt_format.control_tokens)
        own = shaping(metadata["generation"] or {})
        self.notes = (
            (
                (
                    f"torch answers freely: the adapter's own {', '.join(own)} shapes answers in a"
                    " bundle only"
                ),
            )
            if own
            else ()
        )

    @classmethod
    def open(cls, folder: Path) -> TorchAnswers:
        """Load a run or adapter folder."""
        return cls(*load_adapted_model(folder))

    @torch.no_grad()
    def scored(self, texts: Sequence[Text]) -> list[ScoredLabel]:
        """The label of each text with its score; longer ones are cut to the length the adapter was
        trained with.
        """
        labels, logits = self.labels or (), self.class_logits(texts) / self.confidence.temperature
        return [scored(labels, row, self.confidence) for row in logits.softmax(-1).tolist()]

    @torch.no_grad()
    def scored_sets(self, texts: Sequence[Text]) -> list[dict[str, float]]:
        """The probability of each label of each text (multi-label)."""
        labels, logits = self.labels or (), self.class_logits(texts) / self.confidence.temperature
        return [dict(zip(labels, row, strict=True)) for row in logits.sigmoid().tolist()]

    @torch.no_grad()
    def values(self, texts: Sequence[Text]) -> list[float]:
        """The number of each text (regression)."""
        numbers: list[float] = self.class_logits(texts).squeeze(-1).tolist()
        return numbers

    @torch.no_grad()
    def scored_tags(self, rows: Sequence[Sequence[str]]) -> list[list[ScoredLabel]]:
        """The tag of every word of each row with its score; O for words that are cut off or have no
        sub-word.
        """
        marks = self.prompt_format.case_marks
        joined = [join_words(words, case_marks=marks) for words in rows]
        texts, spans = zip(*joined, strict=True)
        batch = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._limit,
            return_offsets_mapping=True,
            return_tensors="pt",
            verbose=False,
        )
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        labels = self.labels or ()
        probabilities = (logits / self.confidence.temperature).softmax(-1)
        found = []
        for row, shares, text, offsets, words in zip(
            logits.numpy(),
            probabilities.tolist(),
            texts,
            batch["offset_mapping"].tolist(),
            spans,
            strict=True,
        ):
            first = first_subwords(text, offsets, words)
            tags = likeliest_tags(
                [None if token is None else row[token] for token in first],
                labels,
                scheme=self.prompt_format.tag_scheme,
            )
            found.append(
                [
                    ScoredLabel(outside_tag(labels), 0.0)
                    if token is None or tag is None
                    else ScoredLabel(labels[tag], shares[token][tag])
                    for token, tag in zip(first, tags, strict=True)
                ]
            )
        return found

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Any:
        """Embeddings (texts, hidden) of length 1, a float32 array."""
        batch = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._limit,
            return_tensors="pt",
        )
        pooled = unwrapped(self.model).pooled(batch["input_ids"], batch["attention_mask"])
        return torch.nn.functional.normalize(pooled, dim=-1).numpy()

    @property
    def _limit(self) -> int:
        limit: int = min(
            self.metadata["max_length"],
            getattr(self.model.config, "max_position_embeddings", self.metadata["max_length"]),
        )
        return limit

    def class_logits(self, texts: Sequence[Text]) -> Tensor:
        """(texts, labels) logits."""
        if isinstance(unwrapped(self.model), DecoderClassifier):  # its tokenizer may not pad
            ids, _ = encode_texts(texts, self.tokenizer, limit=self._limit)
            found = []
            for row in ids:
                tokens = torch.tensor([row])
                found.append(self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)))
            return torch.cat(found)
        columns = (
            [list(texts)]
            if not texts or isinstance(texts[0], str)
            else [list(column) for column in zip(*texts, strict=True)]
        )
        pairs = len(columns) > 1
        batch = self.tokenizer(
            *columns,
            padding=True,
            truncation=True,
            max_length=self._limit,
            return_token_type_ids=pairs,
            return_tensors="pt",
        )
        types = {"token_type_ids": batch["token_type_ids"]} if pairs else {}
        logits: Tensor = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **types
        )
        return logits

    @torch.no_grad()
    def rewards(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """A reward adapter's score of each answer."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        rows = encode_answered(
            prompts, completions, self.prompt_format, self.tokenizer, limit=limit
        )
        return score_rows(
            rows,
            lambda batch: self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask
            ),
        )

    @torch.no_grad()
    def generate(self, prompts: Sequence[str | list[dict[str, str]]]) -> list[str]:
        """The completion of each prompt, greedily, up to the end token or the adapter's own
        limit.
        """
        return self.generate_ids(
            encode_prompts(
                [self._text(prompt) for prompt in prompts],
                self.prompt_format.template,
                self.tokenizer,
            )
        )

    @torch.no_grad()
    def generate_ids(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The same for prompts that are token ids already."""
        if self.model.config.is_encoder_decoder:
            return self._generate_apart(rows)
        longest = max(map(len, rows))
        limit = (self.metadata["generation"] or {}).get("max_new_tokens", MAX_NEW_TOKENS)
        positions = getattr(self.model.config, "max_position_embeddings", longest + limit)
        if longest >= positions:
            raise InputError(
                "a prompt is longer than the context",
                expected=f"at most {positions - 1} tokens",
                got=str(longest),
            )
        pad = self.tokenizer.eos_token_id
        input_ids = torch.tensor([[pad] * (longest - len(row)) + [*row] for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=min(limit, positions - longest),
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=pad,
        )
        completions: list[str] = self.tokenizer.batch_decode(
            output[:, longest:], skip_special_tokens=True
        )
        return [
            first_part(completion, (self.metadata["generation"] or {}).get("stop") or ())
            for completion in completions
        ]

    def _generate_apart(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Of an encoder-decoder: answers have positions of their own, and stand alone in what it
        returns.
        """
        settings, longest = self.metadata["generation"] or {}, max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        output = self.model.generate(
            input_ids=torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows]),
            attention_mask=torch.tensor(
                [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
            ),
            max_new_tokens=settings.get("max_new_tokens", MAX_NEW_TOKENS),
            do_sample=False,
            num_beams=1,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=pad,
            # transformers' own has as many layers as the encoder (5.23), and a decoder may have
            # more
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
        )
        completions: list[str] = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [first_part(completion, settings.get("stop") or ()) for completion in completions]

    def _text(self, prompt: str | list[dict[str, str]]) -> str:
        if isinstance(prompt, list):
            return apply_chat_template(self.tokenizer, prompt)
        if self.prompt_format.template == "chat":
            return apply_chat_template(
                self.tokenizer, chat_messages(prompt, system=self.prompt_format.system)
            )
        return prompt


def first_part(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of these strings."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


TOKENS_AT_ONCE, ROWS_AT_ONCE, DIFFERENT_AT_ONCE = 4096, 64, 2048


def score_rows(
    rows: Sequence[list[int]], reward: Callable[[Batch], Tensor], *, alike: bool = False
) -> list[float]:
    """`reward` (batch) → (rows,) over all rows, in batches of like length, or of rows that begin
    `alike`.
    """
    rewards = [0.0] * len(rows)
    by_length = functools.partial(
        in_order_of_length, [len(row) for row in rows], TOKENS_AT_ONCE, batch_size=ROWS_AT_ONCE
    )
    for part in split_by_prefix(rows, DIFFERENT_AT_ONCE) if alike else by_length():
        batch = collate([Example(rows[index], 0, index) for index in part], 0)
        for index, value in zip(part, reward(batch).tolist(), strict=True):
            rewards[index] = value
    return rewards
