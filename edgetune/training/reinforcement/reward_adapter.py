"""A trained reward adapter beside the policy's own adapter on one base: no second copy of the base
in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from edgetune.adapters.folder import mismatches, read_config, read_metadata, read_tensors
from edgetune.adapters.lora import only_adapter
from edgetune.adapters.runs import find_adapter
from edgetune.core.errors import AdapterError
from edgetune.data.batching import Batch
from edgetune.data.conversations import Prompt
from edgetune.data.preferences import encode_answered
from edgetune.data.prompts import PromptFormat
from edgetune.evaluation.torch_answers import score_rows
from edgetune.models.base import Base
from edgetune.models.heads import last_hidden
from edgetune.models.text_tokenizer import reading
from edgetune.models.torch_device import Precision, device_of, to_device
from edgetune.training.fast.memory import computing
from edgetune.training.fast.shared_prefix import may_share

SCORE_WEIGHT = "base_model.model.score.weight"


class Scored(Protocol):
    """What a reward adapter needs of an answer."""

    @property
    def prompt(self) -> Prompt: ...
    @property
    def completion(self) -> str: ...


class AdapterScorer:
    """A reward adapter's scores; `body` is the decoder without its output projection, the adapter
    on it.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        adapter: str,
        score: Tensor,
        form: PromptFormat,
        tokenizer: Any,
        *,
        limit: int,
        precision: Precision,
    ) -> None:
        self.name, self.model, self.adapter, self.score = name, model, adapter, score.float()
        self.form, self.tokenizer, self.limit, self.precision = form, tokenizer, limit, precision

    def __call__(self, answers: Sequence[Scored]) -> list[float]:
        """The reward of each answer, read in the form that the adapter was trained with."""
        prompts, completions = (
            [answer.prompt for answer in answers],
            [answer.completion for answer in answers],
        )
        rows = encode_answered(prompts, completions, self.form, self.tokenizer, limit=self.limit)
        body, device = self.model.get_base_model().base_model, device_of(self.model)

        def reward(batch: Batch) -> Tensor:
            batch = to_device(batch, device)
            with computing(self.model, batch, self.precision):
                hidden = last_hidden(body, batch.input_ids, batch.attention_mask)
            return hidden @ self.score[0].to(device)  # in fp32: a reward in bf16 would have 8 bits

        with torch.no_grad(), only_adapter(self.model, self.adapter):
            return score_rows(
                rows, reward, alike=may_share(self.model, max(map(len, rows), default=0))
            )


def check_reward_adapter(folder: Path, base: Base) -> tuple[Path, dict[str, Any]]:
    """The adapter folder and its metadata. AdapterError when it is no reward adapter, or one of
    another base.
    """
    adapter_dir = find_adapter(folder)
    metadata = read_metadata(adapter_dir)
    if metadata["task"] != "reward":
        fix = 'Train one with method = "reward", or name a function as "module:function".'
        raise AdapterError(
            "this adapter gives no rewards",
            where=str(folder),
            expected="task reward",
            got=f"task {metadata['task']}",
            fix=fix,
        )
    if metadata["base"]["digest"] != base.digest:
        raise AdapterError(
            "the reward adapter was trained on another base than this policy",
            where=str(folder),
            expected=f"{base.name} {base.digest[:23]}…",
            got=f"{metadata['base']['name']} {metadata['base']['digest'][:23]}…",
            fix="Train the reward on the policy's base: one base in memory serves both.",
        )
    return adapter_dir, metadata


@contextlib.contextmanager
def reward_adapter(
    folder: Path,
    model: Any,
    tokenizer: Any,
    base: Base,
    *,
    name: str,
    label: str,
    precision: Precision = "fp32",
) -> Iterator[AdapterScorer]:
    """The adapter in `folder` on `model` (a PEFT model of a decoder) as the frozen, inactive
    adapter `name`.
    """
    adapter_dir, metadata = check_reward_adapter(folder, base)
    config = read_config(adapter_dir)
    config.modules_to_save = None  # the score is applied here: a policy has no such module
    tensors = read_tensors(adapter_dir)
    score = tensors.pop(SCORE_WEIGHT, None)
    model.add_adapter(name, config)
    try:
        expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        problems = mismatches(expected, tensors) + (
            [f"missing {SCORE_WEIGHT}"] if score is None else []
        )
        if problems or score is None:
            raise AdapterError(
                f"{adapter_dir} does not fit the base model", got="; ".join(problems)
            )
        set_peft_model_state_dict(model, tensors, adapter_name=name)
        for parameter_name, parameter in model.named_parameters():
            if f".{name}." in parameter_name:
                parameter.requires_grad_(False)
        form = PromptFormat(**(metadata["prompt_format"] or {}))
        tokenizer = reading(tokenizer, form.control_tokens)
        yield AdapterScorer(
            label, model, name, score, form, tokenizer, limit=base.max_length, precision=precision
        )
    finally:
        model.delete_adapter(name)
