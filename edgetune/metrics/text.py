"""Metrics of generated texts: exact match, JSON, slots, BLEU, ROUGE-L. Pure functions of
predictions and references.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from edgetune.metrics.statistics import share


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of rows whose text equals one of the row's references, surrounding white space
    aside.
    """
    pairs = zip(predictions, references, strict=True)
    return share(p.strip() in {reference.strip() for reference in r} for p, r in pairs)


def json_exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of rows whose text parses to the same JSON value as one of the references; the order of
    keys is free.
    """
    pairs = zip(predictions, references, strict=True)
    return share(_same_json(p, r) for p, r in pairs)


def json_valid(predictions: Sequence[str]) -> float:
    """Share of rows whose text is JSON."""
    return share(canonical_json(p) is not None for p in predictions)


def is_json_task(references: Sequence[Sequence[str]]) -> bool:
    """Whether every reference is a JSON object or list."""
    return bool(references) and all(
        canonical_json(text) is not None for row in references for text in row
    )


def canonical_json(text: str) -> str | None:
    """The JSON object or list in `text` with sorted keys, or None when it is anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else None


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (0-100) of sacrebleu with its default tokenisation, all references of a row
    counted.
    """
    import sacrebleu

    most = max(len(row) for row in references)
    columns = [[row[at] if at < len(row) else None for row in references] for at in range(most)]
    return float(sacrebleu.corpus_bleu(list(predictions), columns).score)


def _same_json(prediction: str, references: Sequence[str]) -> bool:
    value = canonical_json(prediction)
    return value is not None and value in {canonical_json(reference) for reference in references}


Pairs = Counter[tuple[str, str]]
INTENT = "intent"  # a label of the whole answer, not a slot


def slot_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Micro F1 over (path, value) pairs of JSON answers, all but a top-level "intent"; lists have
    no order.

    What is no JSON holds no pair. Of several references the one with the most hits counts. 1.0 when
    there are no slots at all, in answers or references.
    """
    hits = found = wanted = 0
    for prediction, row in zip(predictions, references, strict=True):
        pairs = _slots(prediction)
        candidates = [_slots(reference) for reference in row]
        best = max(candidates, key=lambda other: ((pairs & other).total(), -other.total()))
        hits, found, wanted = (
            hits + (pairs & best).total(),
            found + pairs.total(),
            wanted + best.total(),
        )
    return 2 * hits / (found + wanted) if found + wanted else 1.0


def _slots(text: str) -> Pairs:
    try:
        value = json.loads(text)
    except ValueError:
        return Counter()
    if isinstance(value, dict):
        value = {key: inner for key, inner in value.items() if key != INTENT}
    return Counter(_leaves(value, path="")) if isinstance(value, (dict, list)) else Counter()


def _leaves(value: Any, *, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, path=f"{path}/{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, path=f"{path}/*")
    else:
        yield path, json.dumps(value, ensure_ascii=False)


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over rows of the best ROUGE-L F-measure over a row's references (Lin 2004, section 3.1),
    by google's `rouge_score` without stemming.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    scores = [
        scorer.score_multi(row, prediction)["rougeL"].fmeasure
        for prediction, row in zip(predictions, references, strict=True)
    ]
    return float(sum(scores) / len(scores)) if scores else 0.0
