"""A look at the rows of a stage: how many, how long in tokens, which labels, and what is odd about
them. Rows that cannot be used are counted, not refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.tasks import METHODS
from edgetune.data.batching import IGNORE
from edgetune.data.examples import ExampleSet, Loading
from edgetune.data.findings import Finding, cut, find, without_names
from edgetune.data.loaders import loader_of, open_rows, texts_in
from edgetune.data.plain_text import encode_documents, text_rows
from edgetune.data.row import RowTexts
from edgetune.data.row_texts import row_texts
from edgetune.data.rows import read_rows
from edgetune.data.seq2seq import answer_length
from edgetune.models.base import Base
from edgetune.recipe.schema import Stage

WHOLE = 10_000_000  # tokens: no row is cut here
BINS = 24  # of the histogram of lengths


@dataclass(frozen=True)
class RowLength:
    """Tokens of a row, and of its prompt alone (0 where it has none)."""

    line: int
    tokens: int
    prompt: int = 0


@dataclass(frozen=True)
class Overview:
    """What a stage's files hold; "train" first, then perhaps "validation"."""

    source: str
    method: str
    problem: str
    reads: Mapping[str, Any]  # of the recipe's data: the columns or templates
    notes: Mapping[str, Sequence[str]]
    limit: int
    rows: Mapping[str, int]  # that can be used
    unusable: Mapping[str, int]
    lengths: Mapping[str, Sequence[RowLength]]
    labels: Mapping[str, Mapping[str, int]]  # label → rows of train, of validation
    names: Sequence[str] | None  # what a head tells apart
    findings: Sequence[Finding]
    texts: Mapping[str, Sequence[RowTexts]] = field(repr=False)
    examples: int = 0  # that are learned: a row may give several

    def to_dict(self) -> dict[str, Any]:
        """For JSON and the page."""
        return {
            "source": self.source,
            "method": self.method,
            "problem": self.problem,
            "reads": dict(self.reads),
            "taken_for": {name: list(notes) for name, notes in self.notes.items()},
            "max_length": self.limit,
            "rows": dict(self.rows),
            "unusable": dict(self.unusable),
            "tokens": {name: spread_of(found) for name, found in self.lengths.items() if found},
            "histogram": histogram(self.lengths, self.limit),
            "labels": {label: dict(counts) for label, counts in self.labels.items()},
            "findings": [finding.to_dict() for finding in self.findings],
        }


def look_at(
    stage: Stage, tokenizer: Any, base: Base, names: Sequence[str] | None = None, *, seed: int = 0
) -> Overview:
    """Look at the rows of a stage; `names` fixes the labels, as an earlier stage does.

    Raises what stops every training: files that cannot be read, a method that does not fit the
    base, no row that can be used.
    """
    lenient = replace(stage, data=replace(stage.data, skip_invalid=True))
    loading = open_rows(lenient, tokenizer, base, names, seed=seed)
    found, lengths = _measured(loading, base)
    texts = {n: texts_in(lenient, one, loading.form) for n, one in loading.sources.items()}
    data = {k: v for k in ROW_KEYS if (v := getattr(loading.form, k)) is not None}
    findings = [
        *without_names(loading.sources),
        *_unusable(stage, loading, found),
        *_long(stage, loading, lengths),
        *find(
            texts["train"],
            texts.get("validation", []),
            labelled=found.labels is not None,
            one_label=stage.learned == "sequence-classification",
        ),
    ]
    source = loading.sources["train"].source
    return Overview(
        source=source,
        method=stage.method,
        problem=stage.problem,
        reads=data,
        notes={name: list(one.notes) for name, one in loading.sources.items()},
        limit=loading.limit,
        rows={name: len(rows) for name, rows in lengths.items()},
        unusable=found.skipped,
        lengths=lengths,
        labels=_labels(texts),
        names=found.labels,
        findings=findings,
        texts=texts,
        examples=len(found.train),
    )


ROW_KEYS = (
    "text", "text_pair", "positive", "negative", "label", "tokens", "tags", "system", "prompt",
    "completion", "chosen", "rejected",
)  # fmt: skip


def _measured(loading: Loading, base: Base) -> tuple[ExampleSet, dict[str, list[RowLength]]]:
    """The examples without a limit, and how long each row is."""
    stage = loading.stage
    found = loader_of(stage, base)(replace(loading, limit=WHOLE))
    if stage.method == "causal-lm":
        rows = {
            name: text_rows(source, loading.form, skip_invalid=True)[0]
            for name, source in loading.sources.items()
        }
        return found, {
            name: [
                RowLength(line, len(ids)) for line, ids in encode_documents(of, loading.tokenizer)
            ]
            for name, of in rows.items()
        }
    parts = {"train": found.train, "validation": found.validation}
    seq2seq = base.kind == "encoder-decoder"
    lengths = {
        name: [_length(example, seq2seq=seq2seq) for example in parts[name] if example.row]
        for name in loading.sources
    }
    return found, {name: _of_rows(of) for name, of in lengths.items()}


def _of_rows(lengths: Sequence[RowLength]) -> list[RowLength]:
    """One length a row: of several examples the longest."""
    longest: dict[int, RowLength] = {}
    for one in lengths:
        known = longest.setdefault(one.line, one)
        longest[one.line] = max(known, one, key=lambda of: of.tokens)
    return list(longest.values())


def _length(example: Any, *, seq2seq: bool) -> RowLength:
    ids = len(example.input_ids)
    if seq2seq:
        return RowLength(example.row, max(ids, answer_length(example)), ids)
    if hasattr(example, "rejected_ids"):
        return RowLength(example.row, example.padded_length // 2, example.labels.count(IGNORE))
    if hasattr(example, "max_new_tokens"):
        return RowLength(example.row, example.padded_length, ids)
    if hasattr(example, "others"):  # several texts, each a sequence of its own
        return RowLength(example.row, max(ids, *map(len, example.others), 0))
    labels = example.labels
    if isinstance(labels, list) and labels and labels[0] == IGNORE and labels[-1] != IGNORE:
        answer = next((at for at, one in enumerate(reversed(labels)) if one == IGNORE), 0)
        return RowLength(example.row, ids, ids - answer)
    return RowLength(example.row, ids)


def _unusable(stage: Stage, loading: Loading, found: ExampleSet) -> list[Finding]:
    """Rows that cannot be used, and the first reason."""
    findings = []
    for name, count in found.skipped.items():
        if not count:
            continue
        source = loading.sources[name]
        _, refused = row_texts(loading.stage, source, loading.form)
        reason = next((str(error) for error in refused.values()), "")
        reason = reason or _first_unreadable(stage, name)
        done = "left out" if stage.data.skip_invalid else "a training stops at the first"
        line = f"{count} {name} rows cannot be used ({done})" + (f": {reason}" if reason else "")
        total = len(source.rows) + source.skipped
        findings.append(Finding("unusable", count, total, line, True, tuple(refused)[:5]))
    return findings


def _first_unreadable(stage: Stage, name: str) -> str:
    """Why the first line that is no row at all is none; "" where all are rows."""
    data = stage.data
    source = data.train if name == "train" or data.validation is None else data.validation
    try:
        read_rows(source, encoding=data.encoding)
    except DataError as error:
        return str(error)
    return ""


def _long(
    stage: Stage, loading: Loading, lengths: Mapping[str, Sequence[RowLength]]
) -> list[Finding]:
    """Rows of more tokens than there may be: cut, or refused."""
    limit = loading.limit
    long = {name: [one for one in of if one.tokens > limit] for name, of in lengths.items()}
    if stage.method in ("causal-lm", "masked-lm"):
        return []
    if "encoder" in METHODS[stage.method].kinds:  # texts lose their end
        return cut(
            {name: len(rows) for name, rows in long.items()},
            {name: [one.line for one in of] for name, of in lengths.items()},
            limit,
        )
    findings = []
    done = "are left out" if stage.data.skip_invalid else "stop a training"
    for name, of in lengths.items():
        full = [one for one in of if one.prompt >= limit]
        wide = [one for one in long[name] if one.prompt < limit]
        for kind, rows, what in (
            (
                "no-room",
                full,
                f"the prompts of {len(full)} {name} rows leave no room for an answer",
            ),
            ("too-long", wide, f"{len(wide)} {name} rows are too long"),
        ):
            if rows:
                first = rows[0]
                line = (
                    f"{what} and {done}: more than max_length = {limit} tokens, line {first.line}"
                    f" has {first.tokens}"
                )
                lines = tuple(one.line for one in rows[:5])
                findings.append(Finding(kind, len(rows), len(of), line, True, lines))
    return findings


def _labels(texts: Mapping[str, Sequence[RowTexts]]) -> dict[str, dict[str, int]]:
    counts = {name: Counter(n for row in rows for n in row.names) for name, rows in texts.items()}
    order = Counter[str]()
    for of in counts.values():
        order.update(of)
    return {
        label: {name: of[label] for name, of in counts.items()} for label, _ in order.most_common()
    }


def spread_of(lengths: Sequence[RowLength]) -> dict[str, int]:
    """Tokens: the median, what 90 and 99 % of the rows have at most, and the longest."""
    tokens = sorted(one.tokens for one in lengths)
    at = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
    return {name: tokens[max(1, math.ceil(len(tokens) * share)) - 1] for name, share in at.items()}


def histogram(lengths: Mapping[str, Sequence[RowLength]], limit: int) -> list[tuple[int, int, int]]:
    """(first token count, last, rows) of bins of one width over all rows."""
    tokens = [one.tokens for of in lengths.values() for one in of]
    if not tokens:
        return []
    width = max(1, -(-(max(tokens) + 1) // BINS))
    bins = Counter(one // width for one in tokens)
    return [
        (at * width, at * width + width - 1, bins[at]) for at in range(max(tokens) // width + 1)
    ]
