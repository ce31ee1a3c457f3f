"""A file of questions and the answers to it → metrics, one function a kind of task."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgetune.core.errors import DataError, InputError
from edgetune.core.tasks import EMBEDDING, TAGGING
from edgetune.core.templates import columns_of
from edgetune.data.conversations import (
    Prompt,
    row_answer,
    row_prompt,
    row_system,
    split_messages,
)
from edgetune.data.implicit_prompts import paired, row_pair, well_answered
from edgetune.data.plain_text import text_rows
from edgetune.data.preferences import PreferenceRow, preference_rows
from edgetune.data.prompts import PromptFormat
from edgetune.data.row import Row
from edgetune.data.rows import Rows
from edgetune.data.targets import value_rows
from edgetune.evaluation.answers import Advance, Answers, BundleAnswers, HeadAnswers
from edgetune.evaluation.embeddings import measure_embeddings
from edgetune.evaluation.forgetting.measure import Subject
from edgetune.evaluation.forgetting.subjects import BundleSubject
from edgetune.evaluation.forgetting.tasks import text_measures
from edgetune.evaluation.label_measures import (
    Measured,
    answered,
    measure_classification,
    measure_sets,
    measure_words,
)
from edgetune.metrics.calibration import calibration_error, coverage_curve, reliability
from edgetune.metrics.error_analysis import JudgedRow, worst, wrong_first
from edgetune.metrics.labels import regression_metrics
from edgetune.metrics.statistics import preference_metrics
from edgetune.metrics.text import (
    bleu,
    exact_match,
    is_json_task,
    json_exact_match,
    json_valid,
    rouge_l,
    slot_f1,
)


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
    predictions: list[
        dict[str, Any]
    ]  # {"line", "prediction", "label" | "references"}, of a reward "chosen", "rejected"
    notes: tuple[
        str, ...
    ] = ()  # what else shaped the answers, or should have: the adapter's own form and penalties
    # see `metrics.error_analysis`: figures a class, confusions, worst rows, what scores are worth
    analysis: dict[str, Any] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)  # every wrong row, the surest first


def measure_text(
    subject: Subject,
    folder: Path,
    source: Rows,
    form: PromptFormat,
    *,
    adapter: str | None = None,
    skip_invalid: bool = False,
    windows: int | None = None,
) -> Evaluation:
    """Perplexity and bits per byte of the texts in `source`, with the adapter on; of at most so
    many windows of 512 tokens.
    """
    rows, skipped = text_rows(source, form, skip_invalid=skip_invalid)
    if subject.texts is None:
        raise InputError(
            "an encoder predicts no text",
            where=str(folder),
            fix="--forgetting measures its embeddings.",
        )
    started = time.perf_counter()
    found = text_measures(
        [row.text for row in rows],
        subject.texts,
        lambda items: subject.score(items, adapted=True),
        limit=windows,
    )
    return Evaluation(
        source=str(folder),
        adapter=adapter,
        task="text-generation",
        data=source.source,
        data_digest=source.digest,
        rows=len(rows),
        skipped=source.skipped + skipped,
        metrics={one.metric: one.statistic(one.values) for one in found},
        seconds=time.perf_counter() - started,
        predictions=[],
    )


def _text_subject(answers: Answers) -> Subject:
    if isinstance(answers, BundleAnswers):
        return BundleSubject(answers.runtime, answers.adapter)
    from edgetune.evaluation.forgetting.torch_subject import torch_texts

    known: Any = answers
    return torch_texts(known.model, known.tokenizer)


def check_answers(answers: Answers, folder: Path) -> None:
    """Raises InputError where there is nothing to ask: masked-lm trains no answers."""
    has_read = answers.prompt_format.label or answers.prompt_format.positive
    if answers.task == "masked-lm" or (answers.task == EMBEDDING and not has_read):
        raise InputError(
            "what masked-lm trained answers nothing by itself",
            where=str(folder),
            fix="--forgetting measures its embeddings.",
        )


def measure_rows(
    answers: Answers,
    folder: Path,
    source: Rows,
    *,
    skip_invalid: bool = False,
    advance: Advance | None = None,
    windows: int | None = None,
) -> Evaluation:
    """The same on rows that are read already; of what learned from text, at most so many `windows`
    of 512 tokens.
    """
    check_answers(answers, folder)
    embeds = answers.task == EMBEDDING
    if answers.labels is None and not embeds and answers.prompt_format.text is not None:
        return measure_text(
            _text_subject(answers),
            folder,
            source,
            answers.prompt_format,
            adapter=answers.adapter,
            skip_invalid=skip_invalid,
            windows=windows,
        )
    started = time.perf_counter()
    measured = _measure_of(answers)(
        answers, source, skip_invalid, advance or (lambda done, total: None)
    )
    return Evaluation(
        source=str(folder),
        adapter=answers.adapter,
        task=answers.task,
        data=source.source,
        data_digest=source.digest,
        rows=len(measured.predictions),
        skipped=source.skipped + measured.skipped,
        metrics=measured.metrics,
        seconds=time.perf_counter() - started,
        predictions=measured.predictions,
        notes=(*answers.notes, *_nothing_given(answers, measured)),
        analysis=measured.analysis,
        errors=measured.errors,
    )


def _nothing_given(answers: Answers, measured: Measured) -> Iterator[str]:
    if measured.metrics.get("answered") == 0.0:
        least = answers.confidence.threshold
        yield f"no row reaches the adapter's threshold of {least}, so none is answered"


def _measure_of(answers: Answers) -> Callable[[Any, Rows, bool, Advance], Measured]:
    """How a task is measured."""
    if answers.task == "reward":
        return _measure_preference
    if answers.task == EMBEDDING:
        return measure_embeddings
    if answers.labels is None:
        return _measure_generation
    if answers.task == TAGGING:
        return measure_words
    heads = {"multi-label": measure_sets, "regression": _measure_numbers}
    return heads.get(answers.problem, measure_classification)


def _measure_numbers(
    answers: HeadAnswers, source: Rows, skip_invalid: bool, advance: Advance
) -> Measured:
    """Pearson and Spearman correlation, and the mean squared error."""
    rows, skipped = value_rows(source, answers.prompt_format, skip_invalid=skip_invalid)
    predicted = answered(answers.values, [row.text for row in rows], advance)
    predictions = [
        {"line": row.line, "prediction": value, "value": row.target}
        for row, value in zip(rows, predicted, strict=True)
    ]
    metrics = regression_metrics(predicted, [row.target for row in rows])
    return Measured(metrics, predictions, skipped)


def _measure_preference(
    answers: HeadAnswers, source: Rows, skip_invalid: bool, advance: Advance
) -> Measured:
    """How often the chosen answer has the higher reward, beside how often it is the longer one."""
    rows, skipped = preference_rows(source, answers.prompt_format, skip_invalid=skip_invalid)

    def rewards_of(part: Sequence[PreferenceRow]) -> list[tuple[float, float]]:
        prompts = [row.prompt for row in part]
        rewards = answers.rewards(
            [*prompts, *prompts], [*(row.chosen for row in part), *(row.rejected for row in part)]
        )
        return list(zip(rewards[: len(part)], rewards[len(part) :], strict=True))

    scores = answered(rewards_of, rows, advance)
    right = [0.5 if chosen == rejected else float(chosen > rejected) for chosen, rejected in scores]
    metrics = preference_metrics(right, [row.longer for row in rows])
    predictions = [
        {"line": row.line, "chosen": chosen, "rejected": rejected}
        for row, (chosen, rejected) in zip(rows, scores, strict=True)
    ]
    return Measured(metrics, predictions, skipped)


def _measure_generation(
    answers: Answers, source: Rows, skip_invalid: bool, advance: Advance
) -> Measured:
    """Rows with the same prompt are one question with several references, as in E2E."""
    questions, skipped = grouped_questions(source, answers.prompt_format, skip_invalid=skip_invalid)
    prompts = [question.prompt for question in questions]
    given = answered(answers.generate_surely, prompts, advance)
    completions = [text for text, _ in given]
    references = [question.references for question in questions]
    metrics = {"exact_match": exact_match(completions, references)}
    as_json = is_json_task(references)
    if as_json:
        metrics["json_exact_match"] = json_exact_match(completions, references)
        metrics["json_valid"] = json_valid(completions)
        metrics["slot_f1"] = slot_f1(completions, references)
    else:
        metrics["bleu"] = bleu(completions, references)
        metrics["rouge_l"] = rouge_l(completions, references)
    predictions = [
        {"line": question.line, "prediction": text, "references": question.references}
        | ({} if sure is None else {"score": sure})
        for question, (text, sure) in zip(questions, given, strict=True)
    ]
    right = [
        is_right(text, of, as_json=as_json)
        for text, of in zip(completions, references, strict=True)
    ]
    judged = [
        JudgedRow(one.line, shown_prompt(one.prompt), one.references[0], text, sure)
        for one, (text, sure), hit in zip(questions, given, right, strict=True)
        if not hit
    ]
    analysis = worst(judged)
    if scores := [sure for _, sure in given if sure is not None]:
        metrics["expected_calibration_error"] = calibration_error(reliability(scores, right))
        analysis["coverage"] = [asdict(one) for one in coverage_curve(scores, right)]
    return Measured(
        metrics, predictions, skipped, analysis, [one.to_dict() for one in wrong_first(judged)]
    )


@dataclass(frozen=True)
class Question:
    """A prompt, the line where it first stands, and every completion that the file has for it."""

    line: int
    prompt: Prompt
    references: list[str]


def grouped_questions(
    source: Rows, form: PromptFormat, *, skip_invalid: bool
) -> tuple[list[Question], int]:
    """Every prompt once, with all its completions, and how many rows are left out."""
    found: dict[str, Question] = {}
    skipped = 0
    source = well_answered(source, form) if form.chosen is None else paired(source, form)
    for row in source.rows:
        try:
            prompt, completion = _prompt_and_completion(
                row, form, where=f"{source.source}, line {row.line}"
            )
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


def is_right(completion: str, references: Sequence[str], *, as_json: bool) -> bool:
    """Whether it is one of the references; of JSON the same value, else the same text."""
    metric = json_exact_match if as_json else exact_match
    return metric([completion], [references]) == 1.0


def shown_prompt(prompt: Prompt) -> str:
    """A prompt for people: of a conversation its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")


def _paired_columns(form: PromptFormat) -> set[str]:
    """The columns of both answers of a preference row."""
    return {name for text in (form.chosen, form.rejected) if text for name in columns_of(text)}


def _prompt_and_completion(row: Row, form: PromptFormat, *, where: str) -> tuple[Prompt, str]:
    if form.rejected is not None and _paired_columns(form) <= set(row.values):
        prompt, better, _ = row_pair(form, row.values, where=where)
        return prompt, better
    if form.chosen is None and (form.prompt is None or form.completion is None):
        return split_messages(
            row.values, system=row_system(form, row.values, where=where), where=where
        )
    prompt = row_prompt(form, row.values, where=where)
    completion = form.completion or "{{ completion }}"
    return prompt, row_answer(completion, row.values, where=where, field="completion")
