"""The base model without adapter, shown a few training rows first: the honest row to compare an
adapter with.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from edgetune.adapters.lora import adapter_off
from edgetune.core.confidence import ScoredLabel
from edgetune.data.prompts import render
from edgetune.data.row import Row
from edgetune.evaluation.answers import Answers
from edgetune.evaluation.torch_answers import TorchAnswers


class FewShotBase(Answers):
    """Answers of the base alone after `shots`, greedily, up to the end of the line.

    Every prompt begins with the same shots; their keys and values are computed once and copied.
    """

    SHOT = "Request: {}\nAnswer:"

    task = "text-generation"
    labels: tuple[str, ...] | None = None

    def __init__(self, adapted: TorchAnswers, shots: Sequence[Row]) -> None:
        self.model, self.tokenizer = adapted.model, adapted.tokenizer
        self.prompt_format = adapted.prompt_format
        self.max_new_tokens: int = adapted.metadata["generation"]["max_new_tokens"]
        self.prefix = self._ids("".join(self._shot(row) for row in shots))
        self.ends = [
            self.tokenizer.eos_token_id,
            *(ids[0] for text in ("\n", "\n\n") if len(ids := self._ids(text)) == 1),
        ]
        self._cache: Any = None

    def scored(self, texts: Sequence[str]) -> list[ScoredLabel]:
        """A base without a head has no labels: as many empty ones as texts."""
        return [ScoredLabel("", None)] * len(texts)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Any]) -> list[str]:
        """The first line that the base writes after each prompt."""
        with adapter_off(self.model):
            output, start = self._generate(
                [self._ids(self.SHOT.format(prompt)) for prompt in prompts]
            )
        texts = self.tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
        return [text.strip().split("\n", 1)[0] for text in texts]

    def _generate(self, questions: Sequence[list[int]]) -> tuple[torch.Tensor, int]:
        """(rows, prefix + longest question + new) ids, and where the new ones start.

        Padding stands between prefix and question, masked, so that all rows can share the prefix's
        cache.
        """
        longest, pad = max(map(len, questions)), self.tokenizer.eos_token_id
        input_ids = torch.tensor(
            [self.prefix + [pad] * (longest - len(ids)) + ids for ids in questions]
        )
        known = len(self.prefix)
        mask = torch.ones_like(input_ids)
        for row, ids in enumerate(questions):
            mask[row, known : known + longest - len(ids)] = 0
        output: torch.Tensor = self.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            past_key_values=self._prefix_cache(len(questions)),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=self.ends,
            pad_token_id=pad,
        )
        return output, known + longest

    def _prefix_cache(self, rows: int) -> Any:
        """Keys and values of the prefix, for `rows` rows; None without shots."""
        if not self.prefix:
            return None
        if self._cache is None:
            self._cache = self.model(
                input_ids=torch.tensor([self.prefix]), use_cache=True, logits_to_keep=1
            ).past_key_values
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return cache

    def _shot(self, row: Row) -> str:
        where, form = f"training row {row.line}", self.prompt_format
        prompt = render(form.prompt or "", row.values, where=where, field="prompt")
        completion = render(form.completion or "", row.values, where=where, field="completion")
        return f"{self.SHOT.format(prompt)} {completion}\n\n"

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
