"""Task metrics of a run (in torch) or of a bundle (in the runtime) on a data file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgetune.answer_metrics import rouge_l, slot_f1
from edgetune.data import Row, read_rows
from edgetune.errors import DataError, InputError
from edgetune.evaluate_base import BaseAnswers, Prompting
from edgetune.evaluate_heads import measurements_of
from edgetune.evaluate_subjects import BUNDLE_MANIFEST, BundleSubject, base_subject, is_base, torch_texts
from edgetune.examples import labelled_rows, preference_rows
from edgetune.examples.text import text_rows
from edgetune.examples.turns import row_answer, row_prompt
from edgetune.forgetting import Subject
from edgetune.forgetting.tasks import text_measures
from edgetune.intervals import preference_metrics
from edgetune.metrics import accuracy, bleu, exact_match, is_json_task, json_exact_match, json_valid, macro_f1
from edgetune.prompts import PromptFormat, split_messages
from edgetune.text_pairs import Text

ROWS_AT_ONCE = 16

Prompt = str | list[dict[str, str]]  # the user's turn, or a conversation
Advance = Callable[[int, int], None]  # (rows done, rows in all)


class Answers(Protocol):
    """Something that answers: a model in torch or a bundle."""

    task: str
    labels: tuple[str, ...] | None
    prompt_format: PromptFormat

    def classify(self, texts: Sequence[Any]) -> list[str]:
        """The label of each text, or of each pair of them."""

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """The completion of each prompt, greedily."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured; `predictions` in the order of the file."""

    source: str
    adapter: str | None
    task: str
    data: str
    data_digest: str
    rows: int
    skipped: int
    metrics: dict[str, float]
    seconds: float  # of answering, loading not counted
    predictions: list[dict[str, Any]]  # {"line", "prediction", "label" | "references"}, of a reward "chosen", "rejected"


def evaluate(
    folder: Path,
    data: Path,
    *,
    adapter: str | None = None,
    skip_invalid: bool = False,
    advance: Advance | None = None,
    how: Prompting | None = None,
) -> Evaluation:
    """Measure a run or adapter folder in torch, a bundle in the runtime, or a bare base, on the rows of `data`.

    The rows are read by the prompt format that was recorded with the adapter; a base is asked as `how` says. What
    learned from text is measured on text: perplexity and bits per byte.
    """
    if is_base(folder):
        return _evaluate_base(folder, data, how or Prompting(), skip_invalid=skip_invalid, advance=advance)
    if how is not None:
        raise InputError("--prompt, --completion, --shots, --train, --choose and --plain ask a bare base", where=str(folder), got="a run or a bundle")
    if (folder / BUNDLE_MANIFEST).is_file():
        from edgetune.runtime import Runtime

        with Runtime.open(folder) as runtime:
            return measure(BundleAnswers(runtime, adapter), folder, data, skip_invalid=skip_invalid, advance=advance)
    if adapter is not None:
        raise InputError("--adapter chooses among a bundle's adapters", where=str(folder), got="a run, which has one")
    from edgetune.torch_answers import TorchAnswers

    return measure(TorchAnswers.open(folder), folder, data, skip_invalid=skip_invalid, advance=advance)


def _evaluate_base(folder: Path, data: Path, how: Prompting, *, skip_invalid: bool, advance: Advance | None) -> Evaluation:
    """By its prompts, or, where rows are nothing but text and no prompt is given, by their perplexity."""
    from edgetune.bases import resolve_base

    columns = read_rows(data, skip_invalid).rows[0].values
    if how == Prompting() and "text" in columns and "prompt" not in columns:
        base = resolve_base(str(folder))
        if base.kind == "decoder":
            return measure_text(base_subject(base), folder, data, PromptFormat(), skip_invalid=skip_invalid)
    return measure(BaseAnswers(str(folder), data, how), folder, data, skip_invalid=skip_invalid, advance=advance)


def measure_text(
    subject: Subject, folder: Path, data: Path, form: PromptFormat, *, adapter: str | None = None, skip_invalid: bool = False
) -> Evaluation:
    """Perplexity and bits per byte of the texts in `data`, with the adapter on."""
    source = read_rows(data, skip_invalid)
    rows, skipped = text_rows(source, form, skip_invalid=skip_invalid)
    if subject.texts is None:
        raise InputError("an encoder predicts no text", where=str(folder), fix="--forgetting measures its embeddings.")
    started = time.perf_counter()
    found = text_measures([row.text for row in rows], subject.texts, lambda items: subject.score(items, adapted=True))
    return Evaluation(
        source=str(folder), adapter=adapter, task="text-generation", data=str(data), data_digest=source.digest, rows=len(rows),
        skipped=source.skipped + skipped, metrics={one.metric: one.statistic(one.values) for one in found},
        seconds=time.perf_counter() - started, predictions=[],
    )  # fmt: skip


def _text_subject(answers: Answers) -> Subject:
    if isinstance(answers, BundleAnswers):
        return BundleSubject(answers.runtime, answers.adapter)
    known: Any = answers
    return torch_texts(known.model, known.tokenizer)


def measure(
    answers: Answers, folder: Path, data: Path, *, skip_invalid: bool = False, advance: Advance | None = None
) -> Evaluation:
    """Let `answers` answer every row, and compare."""
    if answers.task == "masked-lm":
        raise InputError("what masked-lm trained answers nothing by itself", where=str(folder), fix="--forgetting measures its embeddings.")
    if answers.labels is None and answers.prompt_format.text is not None:
        adapter = getattr(answers, "adapter", None)
        return measure_text(_text_subject(answers), folder, data, answers.prompt_format, adapter=adapter, skip_invalid=skip_invalid)
    source = read_rows(data, skip_invalid)
    started = time.perf_counter()
    how = _how(answers)
    metrics, predictions, skipped = how(answers, source, skip_invalid, advance or (lambda done, total: None))
    return Evaluation(
        source=str(folder),
        adapter=getattr(answers, "adapter", None),
        task=answers.task,
        data=str(data),
        data_digest=source.digest,
        rows=len(predictions),
        skipped=source.skipped + skipped,
        metrics=metrics,
        seconds=time.perf_counter() - started,
        predictions=predictions,
    )


def _how(answers: Answers) -> Callable[..., Measured]:
    if answers.task == "reward":
        return _measure_preference
    if answers.labels is None:
        return _measure_generation
    return measurements_of(answers.task, getattr(answers, "problem", None)) or _measure_classification


Measured = tuple[dict[str, float], list[dict[str, Any]], int]


def _measure_classification(answers: Answers, source: Any, skip_invalid: bool, advance: Advance) -> Measured:
    rows, skipped = labelled_rows(source, answers.prompt_format, skip_invalid=skip_invalid)
    known = set(answers.labels or ())
    for row in rows:
        if row.label not in known:
            raise DataError(
                f'the adapter does not know the label "{row.label}"',
                where=f"{source.source}, line {row.line}",
                expected=f"one of {', '.join(sorted(known)[:8])}{' …' if len(known) > 8 else ''}",
            )
    predicted: list[str] = []
    for at in range(0, len(rows), ROWS_AT_ONCE):
        predicted += answers.classify([row.text for row in rows[at : at + ROWS_AT_ONCE]])
        advance(len(predicted), len(rows))
    expected = [row.label for row in rows]
    metrics = {"accuracy": accuracy(predicted, expected), "macro_f1": macro_f1(predicted, expected)}
    predictions = [
        {"line": row.line, "prediction": label, "label": row.label} for row, label in zip(rows, predicted, strict=True)
    ]
    return metrics, predictions, skipped


def _measure_preference(answers: Any, source: Any, skip_invalid: bool, advance: Advance) -> Measured:
    """How often the chosen answer has the higher reward, beside how often it is the longer one."""
    rows, skipped = preference_rows(source, answers.prompt_format, skip_invalid=skip_invalid)
    scores: list[tuple[float, float]] = []
    for at in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[at : at + ROWS_AT_ONCE]
        prompts = [row.prompt for row in part]
        rewards = answers.rewards([*prompts, *prompts], [*(row.chosen for row in part), *(row.rejected for row in part)])
        scores += zip(rewards[: len(part)], rewards[len(part) :], strict=True)
        advance(len(scores), len(rows))
    right = [0.5 if chosen == rejected else float(chosen > rejected) for chosen, rejected in scores]
    metrics = preference_metrics(right, [row.longer for row in rows])
    predictions = [
        {"line": row.line, "chosen": chosen, "rejected": rejected} for row, (chosen, rejected) in zip(rows, scores, strict=True)
    ]
    return metrics, predictions, skipped


def _measure_generation(answers: Answers, source: Any, skip_invalid: bool, advance: Advance) -> Measured:
    """Rows with the same prompt are one question with several references, as in E2E."""
    questions, skipped = _questions(source, answers.prompt_format, skip_invalid=skip_invalid)
    completions: list[str] = []
    for at in range(0, len(questions), ROWS_AT_ONCE):
        completions += answers.generate([q.prompt for q in questions[at : at + ROWS_AT_ONCE]])
        advance(len(completions), len(questions))
    references = [question.references for question in questions]
    metrics = {"exact_match": exact_match(completions, references)}
    if is_json_task(references):
        metrics["json_exact_match"] = json_exact_match(completions, references)
        metrics["json_valid"] = json_valid(completions)
        metrics["slot_f1"] = slot_f1(completions, references)
    else:
        metrics["bleu"] = bleu(completions, references)
        metrics["rouge_l"] = rouge_l(completions, references)
    predictions = [
        {"line": question.line, "prediction": completion, "references": question.references}
        for question, completion in zip(questions, completions, strict=True)
    ]
    return metrics, predictions, skipped


@dataclass(frozen=True)
class Question:
    """A prompt, the line where it first stands, and every completion that the file has for it."""

    line: int
    prompt: Prompt
    references: list[str]


def _questions(source: Any, form: PromptFormat, *, skip_invalid: bool) -> tuple[list[Question], int]:
    found: dict[str, Question] = {}
    skipped = 0
    for row in source.rows:
        try:
            prompt, completion = _prompt_and_completion(row, form, where=f"{source.source}, line {row.line}")
        except DataError:
            if not skip_invalid:
                raise
            skipped += 1
            continue
        question = found.setdefault(json.dumps(prompt), Question(row.line, prompt, []))
        question.references.append(completion)
    if not found:
        raise DataError("no row can be used", where=source.source, got=f"{skipped} invalid rows")
    return list(found.values()), skipped


def _prompt_and_completion(row: Row, form: PromptFormat, *, where: str) -> tuple[Prompt, str]:
    if form.prompt is None or form.completion is None:
        return split_messages(row.values, system=form.system, where=where)
    prompt = row_prompt(form, row.values, where=where)
    return prompt, row_answer(form.completion, row.values, where=where, field="completion")


class BundleAnswers:
    """A bundle's answers with one of its adapters."""

    def __init__(self, runtime: Any, adapter: str | None) -> None:
        names = tuple(runtime.adapters)
        if adapter is None and len(names) != 1:
            raise InputError(
                "which adapter?", where=str(runtime.folder), expected=f"--adapter with one of {', '.join(names)}"
            )
        self.runtime, self.adapter = runtime, adapter if adapter is not None else names[0]
        packed = runtime.adapter(self.adapter)
        self.labels = tuple(packed.labels) if packed.labels is not None else None
        self.task: str = packed.task or "text-generation"
        self.problem: str = packed.problem
        self.prompt_format = PromptFormat(**(packed.prompt_format or {}))

    def classify(self, texts: Sequence[Text]) -> list[str]:
        """The label of each text."""
        return [answer.label for answer in self.runtime.classify(texts, adapter=self.adapter, truncate=True)]

    def label_sets(self, texts: Sequence[Text]) -> list[tuple[str, ...]]:
        """The labels of each text whose probability is at least 0.5 (multi-label)."""
        return [answer.labels for answer in self.runtime.classify(texts, adapter=self.adapter, truncate=True)]

    def values(self, texts: Sequence[Text]) -> list[float]:
        """The number of each text (regression)."""
        return [answer.value for answer in self.runtime.classify(texts, adapter=self.adapter, truncate=True)]

    def tag(self, rows: Sequence[Sequence[str]]) -> list[list[str]]:
        """The tag of every word of each row."""
        return [answer.tags for answer in self.runtime.tag(rows, adapter=self.adapter, truncate=True)]

    def rewards(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """A reward adapter's score of each answer."""
        scores: list[float] = self.runtime.score(list(zip(prompts, completions, strict=True)), adapter=self.adapter, truncate=True)
        return scores

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """The completion of each prompt, greedily, as long as the adapter's own limit allows."""
        return [answer.text for answer in self.runtime.generate(prompts, adapter=self.adapter, temperature=0.0)]
