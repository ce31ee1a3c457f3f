"""Metrics as pure functions of predictions and references."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "mse", "rmse", "mae")


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of rows with the right label."""
    return _share(p == r for p, r in zip(predictions, references, strict=True))


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 over the labels that occur in predictions or references, each label weighing the same."""
    labels = sorted(set(predictions) | set(references))
    return sum(_f1(label, predictions, references) for label in labels) / len(labels) if labels else 0.0


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of rows whose text equals one of the row's references, surrounding white space aside."""
    pairs = zip(predictions, references, strict=True)
    return _share(p.strip() in {reference.strip() for reference in r} for p, r in pairs)


def json_exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of rows whose text parses to the same JSON value as one of the references; the order of keys is free."""
    pairs = zip(predictions, references, strict=True)
    return _share(_same_json(p, r) for p, r in pairs)


def json_valid(predictions: Sequence[str]) -> float:
    """Share of rows whose text is JSON."""
    return _share(canonical_json(p) is not None for p in predictions)


def is_json_task(references: Sequence[Sequence[str]]) -> bool:
    """Whether every reference is a JSON object or list."""
    return bool(references) and all(canonical_json(text) is not None for row in references for text in row)


def canonical_json(text: str) -> str | None:
    """The JSON object or list in `text` with sorted keys, or None when it is anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else None


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (0-100) of sacrebleu with its default tokenisation, all references of a row counted."""
    import sacrebleu

    most = max(len(row) for row in references)
    columns = [[row[at] if at < len(row) else None for row in references] for at in range(most)]
    return float(sacrebleu.corpus_bleu(list(predictions), columns).score)


def _same_json(prediction: str, references: Sequence[str]) -> bool:
    value = canonical_json(prediction)
    return value is not None and value in {canonical_json(reference) for reference in references}


def _f1(label: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    pairs = list(zip(predictions, references, strict=True))
    hits = sum(p == r == label for p, r in pairs)
    wrong = sum((p == label) != (r == label) for p, r in pairs)
    return 2 * hits / (2 * hits + wrong) if hits else 0.0


def _share(hits: Any) -> float:
    flags = list(hits)
    return sum(flags) / len(flags) if flags else 0.0
