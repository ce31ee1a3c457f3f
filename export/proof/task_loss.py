"""What an adapter's task loses between torch and the bundle: row by row, and whether it is more
than chance.

Both sides answer the same rows, so what counts is the rows that come out differently. Where a row
is right or wrong: the exact two-sided sign test over those rows (McNemar 1947). Of means of shares,
F1 and correlations: the 95 % percentile interval of the difference, rows drawn with replacement.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetune.core.text import entities
from edgetune.data.row import Row
from edgetune.metrics.statistics import (
    Statistic,
    Values,
    mean,
    paired_bootstrap,
    paired_interval,
    spearman,
)
from edgetune.metrics.text import json_exact_match, rouge_l

POINT = 0.01
"""What may be lost whatever chance allows: of a share, an F1 or a correlation; of a perplexity one
hundredth of it."""
CHANCE = 0.05
"""A loss is chance where a bundle that loses nothing would show such a difference this often."""
LEAST_WORSE = 6
"""Rows that must be worse before chance can be excluded: 5 of 5 are not enough (p = 0.06)."""
ENOUGH_ROWS = 60
"""Of so many rows a loss of ten points is seen: `LEAST_WORSE` of them."""
SHOWN, IN_A_LINE, TEXT = 5, 3, 100  # rows that changed, and characters of each of their texts
WANTED = ("label", "labels", "tags", "value", "references")  # keys of a prediction
Prediction = Mapping[str, Any]


@dataclass(frozen=True)
class ChangedRow:
    """A row that torch and the bundle answer differently, each text cut to `TEXT` characters."""

    line: str
    text: str
    wanted: str
    torch: str
    bundle: str
    worse: bool

    def __str__(self) -> str:
        return (
            f"row {self.line} {self.text!r}: wanted {self.wanted!r}, torch {self.torch!r}, bundle"
            f" {self.bundle!r}"
        )


@dataclass(frozen=True)
class TaskLoss:
    """The rows of one adapter that torch and the bundle answer differently."""

    answered: int
    """rows, or questions where several rows share one"""
    changed: int
    worse: int
    better: int
    beyond_chance: bool
    chance: str
    """what the test found, for people"""
    rows: tuple[ChangedRow, ...]
    """the first few, those that lost most before the others"""
    lines: tuple[str, ...]
    """of all that are worse"""


def task_loss(
    metric: str,
    in_torch: Sequence[Prediction],
    in_bundle: Sequence[Prediction],
    rows: Sequence[Row],
) -> TaskLoss | None:
    """Both sides' predictions on the same rows, in the same order; None of a metric that has none
    (perplexity).
    """
    if not in_torch or metric not in SCORES:
        return None
    score, statistic = SCORES[metric]
    before, after = (
        np.array([score(one) for one in side], np.float64) for side in (in_torch, in_bundle)
    )
    difference = _row_scores(after, metric) - _row_scores(before, metric)
    worse, better = int((difference < 0).sum()), int((difference > 0).sum())
    beyond, chance = _beyond_chance(before, after, statistic, worse, better)
    width = float(before[:, -1].std()) if metric == "spearman" else 0.0
    changed = [
        at
        for at in np.argsort(difference, kind="stable").tolist()
        if _differ(in_torch[at], in_bundle[at], least=POINT * width)
    ]
    values = {row.line: row.values for row in rows}
    return TaskLoss(
        answered=len(in_torch),
        changed=len(changed),
        worse=worse,
        better=better,
        beyond_chance=beyond,
        chance=chance,
        rows=tuple(
            _changed_row(in_torch[at], in_bundle[at], values, worse=bool(difference[at] < 0))
            for at in changed[:SHOWN]
        ),
        lines=tuple(str(in_torch[at]["line"]) for at in sorted(changed) if difference[at] < 0),
    )


def _beyond_chance(
    before: Values, after: Values, statistic: Statistic, worse: int, better: int
) -> tuple[bool, str]:
    """Whether a loss is more than chance, and in words what says so."""
    from scipy.stats import binomtest

    if statistic is mean and np.isin([before, after], (0.0, 0.5, 1.0)).all():
        p = float(binomtest(worse, worse + better).pvalue) if worse + better else 1.0
        return worse > better and p < CHANCE, f"sign test, p = {p:.2g}"
    low, high = (
        paired_bootstrap((after - before)[:, 0].tolist())
        if statistic is mean
        else paired_interval(before, after, statistic)
    )
    return high < 0 and worse >= LEAST_WORSE, f"bootstrap, 95 % interval {low:+.3f} to {high:+.3f}"


def _text_score(metric: Callable[..., float]) -> Callable[[Prediction], list[float]]:
    return lambda one: [metric([one["prediction"]], [one["references"]])]


def _preference(one: Prediction) -> list[float]:
    chosen, rejected = one["chosen"], one["rejected"]
    return [0.5 if chosen == rejected else float(chosen > rejected)]


def _overlap(found: Collection[Hashable], wanted: Collection[Hashable]) -> list[float]:
    """Hits, and all that was found or wanted: F1 is twice the one over the other."""
    return [len(set(found) & set(wanted)), len(set(found)) + len(set(wanted))]


def _words(one: Prediction) -> list[float]:
    pairs = list(zip(one["prediction"], one["tags"], strict=True))
    return [sum(ours == theirs for ours, theirs in pairs), len(pairs)]


def _f1(values: Values) -> float:
    hits, all_of_both = values.sum(axis=0)
    return float(2 * hits / all_of_both) if all_of_both else 1.0


def _ratio(values: Values) -> float:
    return float(values[:, 0].sum() / max(values[:, 1].sum(), 1.0))


SCORES: Mapping[str, tuple[Callable[[Prediction], list[float]], Statistic]] = {
    "accuracy": (lambda one: [float(one["prediction"] == one["label"])], mean),
    "recall_at_1": (lambda one: [float(one["prediction"] == one["label"])], mean),
    "json_exact_match": (_text_score(json_exact_match), mean),
    "rouge_l": (_text_score(rouge_l), mean),
    "preference_accuracy": (_preference, mean),
    "entity_f1": (lambda one: _overlap(entities(one["prediction"]), entities(one["tags"])), _f1),
    "micro_f1": (lambda one: _overlap(one["prediction"], one["labels"]), _f1),
    "token_accuracy": (_words, _ratio),
    "spearman": (lambda one: [float(one["prediction"]), float(one["value"])], spearman),
}
"""Metric → what a row adds to it, and the metric of all rows' (rows, columns)."""


def _row_scores(values: Values, metric: str) -> Values:
    """(rows,): the metric of each row alone; of a correlation how near the number is."""
    if metric == "spearman":
        return -np.abs(values[:, 0] - values[:, 1])
    statistic = SCORES[metric][1]
    return np.array([statistic(values[at : at + 1]) for at in range(len(values))])


def _differ(in_torch: Prediction, in_bundle: Prediction, *, least: float) -> bool:
    ours, theirs = answer_of(in_torch), answer_of(in_bundle)
    return abs(ours - theirs) > least if isinstance(ours, float) else bool(ours != theirs)


def answer_of(prediction: Prediction) -> Any:
    """What was answered: of a reward, whether it prefers the chosen one; None where the label was
    not sure enough to count.
    """
    if prediction.get("rejected") is True:  # of two answers it is the other one's score
        return None
    if "prediction" in prediction:
        return prediction["prediction"]
    return prediction["chosen"] > prediction["rejected"]


def _changed_row(
    in_torch: Prediction,
    in_bundle: Prediction,
    values: Mapping[int, Mapping[str, Any]],
    *,
    worse: bool,
) -> ChangedRow:
    line = in_torch["line"]
    wanted: Any = next(
        (in_torch[key] for key in WANTED if key in in_torch),
        True,  # of a reward: the chosen answer
    )
    own = {_plain(wanted), *(map(_plain, wanted) if isinstance(wanted, list) else ())}
    asked = (text for value in values.get(line, {}).values() if (text := _plain(value)) not in own)
    return ChangedRow(
        line=str(line),
        text=_cut(next(asked, "")),
        wanted=_cut(_plain(wanted[0] if "references" in in_torch else wanted)),
        torch=_cut(_plain(answer_of(in_torch))),
        bundle=_cut(_plain(answer_of(in_bundle))),
        worse=worse,
    )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "the chosen answer" if value else "the rejected answer"
    if value is None:
        return "no label"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]}…"


def line_of(loss: TaskLoss) -> str:
    """The rows that changed, in one line: how many, and the first few in full."""
    shown = loss.rows[:IN_A_LINE]
    more = f"; … {loss.changed - len(shown)} more" if loss.changed > len(shown) else ""
    return (
        f"{loss.changed} rows answered differently, {loss.worse} worse and {loss.better} better"
        f" ({loss.chance}): {'; '.join(map(str, shown))}{more}"
    )
