"""A bare base on a task: zero-shot or few-shot, by generating answers or by choosing the likeliest
label.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgetune.core.confidence import ScoredLabel
from edgetune.core.errors import DataError, InputError
from edgetune.data.completions import encode_prompts
from edgetune.data.labels import LabelledRow, labelled_rows
from edgetune.data.prompts import PromptFormat, apply_chat_template, row_template
from edgetune.data.rows import Rows, read_rows
from edgetune.evaluation.answers import Answers, Prompting
from edgetune.evaluation.forgetting.likelihood import ChoiceItem
from edgetune.evaluation.forgetting.torch_subject import torch_texts
from edgetune.evaluation.torch_answers import TorchAnswers
from edgetune.models.load import load_body, load_tokenizer
from edgetune.models.resolve import resolve_base

Turn = dict[str, str]
BETWEEN = "\n\n"  # examples of a plain prompt
MARGIN = 16  # tokens that an answer may be longer than the longest reference


class BaseAnswers(Answers):
    """A base's answers: by its chat template where it has one, else as plain text."""

    def __init__(self, name: str, data: Path, how: Prompting) -> None:
        base = resolve_base(name)
        if base.kind == "encoder":
            raise InputError(
                "an encoder without a head cannot answer",
                where=base.name,
                expected="a decoder, or a run or bundle with a head",
                got=base.model_type,
                fix="Train one; --forgetting measures its embeddings.",
            )
        if base.kind == "encoder-decoder" and how.choose:
            raise InputError(
                "an encoder-decoder's labels are not compared by likelihood yet",
                where=base.name,
                fix="Leave --choose out: it then generates.",
            )
        self.task, self._tokenizer = "text-generation", load_tokenizer(base)
        chat = bool(self._tokenizer.chat_template) and not how.plain
        prompt, completion = (
            row_template(how.prompt, "prompt", key="--prompt"),
            row_template(how.completion, "completion", key="--completion"),
        )
        self._form = PromptFormat(
            template="chat" if chat else "plain", prompt=prompt, completion=completion
        )
        as_rows = PromptFormat(template=self._form.template, text=prompt, label=completion)
        known = _rows(read_rows(data), as_rows)
        examples = _rows(read_rows(how.train), as_rows) if how.train is not None else []
        if how.shots > len(examples):
            raise InputError(
                f"there are no {how.shots} examples to show",
                expected="--train FILE with as many rows",
                got=f"{len(examples)} rows",
            )
        self._shots = random.Random(how.seed).sample(examples, how.shots)
        self.labels = (
            tuple(sorted({row.label for row in examples or known})) if how.choose else None
        )
        self.prompt_format = as_rows if how.choose else self._form
        self._model = load_body(base)
        self._subject = torch_texts(self._model, self._tokenizer)
        longest = max(len(ids) for ids in self._ids([row.label for row in known]))
        metadata = {
            "task": self.task,
            "labels": None,
            "prompt_format": replace(self._form, template="plain").to_dict(),
            "max_length": base.max_length,
        }
        self._answers = TorchAnswers(
            self._model,
            self._tokenizer,
            {**metadata, "generation": {"max_new_tokens": longest + MARGIN}},
        )

    def scored(self, texts: Sequence[str]) -> list[ScoredLabel]:
        """The label of the highest log-likelihood after each text, its end included where the
        template marks one.
        """
        labels = self.labels or ()
        end = (
            [self._tokenizer.eos_token_id]
            if self._form.template == "chat" and self._tokenizer.eos_token_id is not None
            else []
        )
        ends = [[*ids, *end] for ids in self._ids([self._answer(label) for label in labels])]
        contexts = self._encode([self._text(text) for text in texts])
        limit, longest = (
            self._subject.texts.limit if self._subject.texts else 0,
            max(map(len, ends)),
        )
        if any(len(context) + longest > limit for context in contexts):
            tokens = max(map(len, contexts)) + longest
            raise InputError(
                "prompt and label are longer than the context",
                expected=f"at most {limit} tokens",
                got=str(tokens),
                fix="Show fewer --shots.",
            )
        scored = self._subject.score(
            [ChoiceItem(context, ends) for context in contexts], adapted=False
        )
        best = [max(range(len(labels)), key=lambda at: scores[at].logprob) for scores in scored]
        return [ScoredLabel(labels[at], None) for at in best]

    def generate(self, prompts: Sequence[str | list[Turn]]) -> list[str]:
        """The completion of each prompt, greedily; a plain one ends where the next example would
        begin.
        """
        texts = [self._text(prompt) for prompt in prompts]
        if self._form.template == "chat":
            return self._answers.generate_ids(self._encode(texts))
        return [
            text.split(BETWEEN)[0].strip()
            for text in self._answers.generate_ids(self._encode(texts))
        ]

    def _answer(self, label: str) -> str:
        """After a chat template's header a text begins at once, after plain text with a space."""
        return label if self._form.template == "chat" else f" {label}"

    def _text(self, prompt: str | list[Turn]) -> str:
        if not isinstance(prompt, str):
            raise InputError(
                "rows with messages cannot be put to a bare base",
                fix="Give --prompt and --completion.",
            )
        if self._form.template == "chat":
            turns = [
                turn
                for row in self._shots
                for turn in (_user(str(row.text)), {"role": "assistant", "content": row.label})
            ]
            return apply_chat_template(self._tokenizer, [*turns, _user(prompt)])
        return (
            "".join(f"{str(row.text).rstrip()} {row.label}{BETWEEN}" for row in self._shots)
            + prompt.rstrip()
        )

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_prompts(texts, self._form.template, self._tokenizer)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, verbose=False
        )["input_ids"]
        return found


def _user(text: str) -> Turn:
    return {"role": "user", "content": text}


def _rows(source: Rows, form: PromptFormat) -> list[LabelledRow]:
    try:
        return labelled_rows(source, form)[0]
    except DataError as error:
        fix = "Say how a row is asked and answered with --prompt and --completion."
        raise DataError(
            error.what, where=error.where, expected=error.expected, got=error.got, fix=fix
        ) from error
