"""The general-ability sets: their files, how an item is put to a model, and the metrics.

Prompts and metrics are those of lm-evaluation-harness without examples (0-shot): `accuracy` takes
the choice of the highest log-likelihood, `accuracy_norm` of the highest per character. WikiText-2
is read in windows; each token is predicted once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.core.errors import DataError
from edgetune.data.rows import read_rows, spread
from edgetune.evaluation.forgetting.likelihood import ChoiceItem, Encode, ItemScorer, make_item
from edgetune.metrics.statistics import Statistic, Values, bits_per_byte, mean, perplexity, spearman

WINDOW = 512  # tokens
Embed = Callable[[Sequence[str]], Any]  # texts → (texts, hidden)


@dataclass(frozen=True)
class MeasuredSet:
    """One metric of one set: a row of `values` an item, and the statistic of all rows."""

    metric: str
    values: Values
    statistic: Statistic


@dataclass(frozen=True)
class Texts:
    """How a decoder's texts become token ids."""

    encode: Encode
    start: list[int]
    limit: int  # positions


@dataclass(frozen=True)
class Choices:
    """A multiple-choice set: rows with query, choices and gold."""

    file: str
    between: str  # what stands between query and choice

    def measure(
        self, path: Path, texts: Texts, scorer: ItemScorer, *, limit: int | None
    ) -> list[MeasuredSet]:
        """accuracy and accuracy_norm."""
        rows = spread(_rows(path, ("query", "choices", "gold")), limit)
        items = [
            make_item(
                row["query"] + self.between,
                [f" {choice}" for choice in row["choices"]],
                texts.encode,
                start=texts.start,
                limit=texts.limit,
            )
            for row in rows
        ]
        hits, normed = [], []
        for row, scores in zip(rows, scorer(items), strict=True):
            logprobs = np.array([score.logprob for score in scores])
            lengths = np.array([max(1, len(choice)) for choice in row["choices"]])
            hits.append(float(logprobs.argmax() == row["gold"]))
            normed.append(float((logprobs / lengths).argmax() == row["gold"]))
        return [
            MeasuredSet("accuracy", _column(hits), mean),
            MeasuredSet("accuracy_norm", _column(normed), mean),
        ]


@dataclass(frozen=True)
class LastWord:
    """LAMBADA: the last word of a passage."""

    file: str

    def measure(
        self, path: Path, texts: Texts, scorer: ItemScorer, *, limit: int | None
    ) -> list[MeasuredSet]:
        """Whether every token of the word is the likeliest, and the word's perplexity."""
        rows = spread(_rows(path, ("context", "continuation")), limit)
        items = [
            make_item(
                row["context"],
                [f" {row['continuation']}"],
                texts.encode,
                start=texts.start,
                limit=texts.limit,
            )
            for row in rows
        ]
        scores = [only for (only,) in scorer(items)]
        nats = np.array([[-score.logprob, 1.0] for score in scores])
        return [
            MeasuredSet("accuracy", _column([float(score.greedy) for score in scores]), mean),
            MeasuredSet("perplexity", nats, perplexity),
        ]


@dataclass(frozen=True)
class RunningText:
    """A whole text, in windows."""

    file: str

    def measure(
        self, path: Path, texts: Texts, scorer: ItemScorer, *, limit: int | None
    ) -> list[MeasuredSet]:
        """Token perplexity and bits per byte."""
        (row,) = read_rows(path).rows
        return text_measures([row.values["text"]], texts, scorer, limit=limit)


def text_measures(
    documents: Sequence[str], texts: Texts, scorer: ItemScorer, *, limit: int | None = None
) -> list[MeasuredSet]:
    """Perplexity and bits per byte of documents, each in windows of its own."""
    windows, sizes = list[ChoiceItem](), list[tuple[int, float]]()
    for document in documents:
        ids, length = [*texts.start, *texts.encode(document)], min(WINDOW, texts.limit)
        cut = [
            ids[at : at + length] for at in range(0, len(ids) - 1, length - 1)
        ]  # the last token of one begins the next
        share = len(document.encode()) / max(1, len(ids) - 1)
        for window in cut:
            windows.append(ChoiceItem(window[:1], [window[1:]]))
            sizes.append((len(window) - 1, share * (len(window) - 1)))
    chosen = spread(range(len(windows)), limit)
    scores = scorer([windows[index] for index in chosen])
    values = np.array([[-scores[n][0].logprob, *sizes[index]] for n, index in enumerate(chosen)])
    return [
        MeasuredSet("perplexity", values, perplexity),
        MeasuredSet("bits_per_byte", values, bits_per_byte),
    ]


@dataclass(frozen=True)
class Similarity:
    """STS-B: the cosine of two sentences' embeddings against people's scores."""

    file: str

    def measure(self, path: Path, embed: Embed, *, limit: int | None) -> list[MeasuredSet]:
        """Spearman's rank correlation."""
        rows = spread(_rows(path, ("sentence1", "sentence2", "score")), limit)
        left, right = (
            np.asarray(embed([row[name] for row in rows]), np.float64)
            for name in ("sentence1", "sentence2")
        )
        sizes = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosine = (left * right).sum(1) / np.maximum(sizes, 1e-12)
        values = np.stack([cosine, np.array([float(row["score"]) for row in rows])], axis=1)
        return [MeasuredSet("spearman", values, spearman)]


GENERAL_TASKS: dict[str, Choices | LastWord | RunningText] = {
    "wikitext2": RunningText("wikitext2_raw_test.txt.gz"),
    "lambada": LastWord("lambada_openai_test.jsonl.gz"),
    "piqa": Choices("piqa_val.jsonl.gz", between="Answer:"),
    "hellaswag": Choices("hellaswag_val_1000.jsonl.gz", between=""),
    "arc_easy": Choices("arc_easy_test.jsonl.gz", between="\nAnswer:"),
}
GENERAL_ENCODER_TASKS = {"stsb": Similarity("stsb_en/test.jsonl.gz")}


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    source = read_rows(path)
    for row in source.rows:
        if missing := [name for name in columns if name not in row.values]:
            raise DataError(
                f'there is no column "{missing[0]}"',
                where=f"{path}, line {row.line}",
                expected=", ".join(columns),
                got=", ".join(row.values),
            )
    return [row.values for row in source.rows]


def _column(values: Sequence[float]) -> Values:
    return np.array(values, np.float64)[:, None]
