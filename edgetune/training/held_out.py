"""Which of the held-out rows a trained adapter answers wrongly, for the run's page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy.typing as npt
from scipy.special import expit, softmax

from edgetune.core.confidence import Confidence, scored
from edgetune.core.tag_sequences import likeliest_tags
from edgetune.core.tasks import TAGGING
from edgetune.core.text import outside_tag
from edgetune.data.batching import Batch
from edgetune.metrics.error_analysis import (
    Decided,
    JudgedRow,
    error_analysis,
    score_curves,
    set_analysis,
    tag_analysis,
)
from edgetune.training.context import ResolvedStage

Logits = Sequence[npt.NDArray[Any]]
"""of each batch, as the stage's `outputs` give them"""


def analyse(
    stage: ResolvedStage, batches: Sequence[Batch], logits: Logits, confidence: Confidence
) -> dict[str, Any]:
    """See `metrics.error_analysis`. Texts are as the model read them: its tokens as text again."""
    if stage.task == TAGGING:
        words, sentences = _tagged(stage, batches, logits, confidence)
        return tag_analysis(words, sentences)
    if stage.problem == "multi-label":
        return set_analysis(list(_sets(stage, batches, logits, confidence)))
    rows = list(_labelled(stage, batches, logits, confidence))
    return {**error_analysis(rows), **score_curves(rows)}


def _texts(stage: ResolvedStage) -> dict[int, str]:
    decode = stage.tokenizer.decode
    return {
        example.row: decode(example.input_ids, skip_special_tokens=True)
        for example in stage.examples.validation
    }


def _labelled(
    stage: ResolvedStage, batches: Sequence[Batch], logits: Logits, confidence: Confidence
) -> Iterator[JudgedRow]:
    labels, texts = stage.examples.labels or (), _texts(stage)
    for batch, found in zip(batches, logits, strict=True):
        rows = softmax(found / confidence.temperature, axis=-1).tolist()
        for line, row, right in zip(batch.rows, rows, batch.labels.tolist(), strict=True):
            one = scored(labels, row, confidence)
            yield JudgedRow(line, texts[line], labels[right], one.label, one.score, one.rejected)


def _sets(
    stage: ResolvedStage, batches: Sequence[Batch], logits: Logits, confidence: Confidence
) -> Iterator[Decided]:
    labels, texts = stage.examples.labels or (), _texts(stage)
    for batch, found in zip(batches, logits, strict=True):
        yes = found[:, 1].reshape(len(batch.rows), len(labels))  # of each label: no and yes
        p = expit(yes / confidence.temperature).tolist()
        for line, row, right in zip(batch.rows, p, batch.labels.tolist(), strict=True):
            wanted = [label for label, on in zip(labels, right, strict=True) if on]
            yield line, texts[line], wanted, dict(zip(labels, row, strict=True))


def _tagged(
    stage: ResolvedStage, batches: Sequence[Batch], logits: Logits, confidence: Confidence
) -> tuple[list[JudgedRow], list[JudgedRow]]:
    """Every word, and every sentence as one answer that is as sure as its least certain word."""
    labels, texts = stage.examples.labels or (), _texts(stage)
    words, sentences = list[JudgedRow](), list[JudgedRow]()
    shares = [softmax(found / confidence.temperature, axis=-1) for found in logits]
    for p, tags in zip(shares, sentence_tags(stage, batches, logits), strict=True):
        rows = iter(p)  # word after word
        for example, best in tags:
            line = example.row
            own = [
                JudgedRow(line, "", tag, outside_tag(labels))
                if chosen is None
                else JudgedRow(line, "", tag, labels[chosen], float(next(rows)[chosen]))
                for chosen, tag in zip(best, example.tags, strict=True)
            ]
            words += own
            sure = min((one.score for one in own if one.score is not None), default=None)
            wanted, got = (" ".join(one.wanted for one in own), " ".join(one.got for one in own))
            sentences.append(JudgedRow(line, texts[line], wanted, got, sure))
    return words, sentences


def sentence_tags(
    stage: ResolvedStage, batches: Sequence[Batch], logits: Logits
) -> Iterator[list[tuple[Any, list[int | None]]]]:
    """Of each batch: its sentences with the number of every word's tag, chosen together; None for
    a word that the model never sees.
    """
    labels, scheme = stage.examples.labels or (), stage.examples.prompt_format.tag_scheme
    examples: dict[int, Any] = {example.row: example for example in stage.examples.validation}
    for batch, found in zip(batches, logits, strict=True):
        rows = iter(found)  # word after word
        own = [examples[line] for line in batch.rows]
        seen = [[None if token is None else next(rows) for token in one.first] for one in own]
        yield [
            (one, likeliest_tags(words, labels, scheme=scheme))
            for one, words in zip(own, seen, strict=True)
        ]
