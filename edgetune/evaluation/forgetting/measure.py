"""General ability before and after, task by task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgetune.core.errors import DataError
from edgetune.core.progress import Say
from edgetune.core.tasks import lower_is_better
from edgetune.evaluation.forgetting.likelihood import ChoiceItem, Score
from edgetune.evaluation.forgetting.tasks import (
    GENERAL_ENCODER_TASKS,
    GENERAL_TASKS,
    MeasuredSet,
    Texts,
)
from edgetune.metrics.statistics import paired_interval


class Subject(Protocol):
    """A model with its adapter on or off: in torch or in a bundle. `texts` is None for an
    encoder.
    """

    texts: Texts | None

    def score(self, items: Sequence[ChoiceItem], *, adapted: bool) -> list[list[Score]]:
        """A score for every choice of every item (decoders)."""

    def embed(self, texts: Sequence[str], *, adapted: bool) -> Any:
        """Pooled states (texts, hidden) (encoders)."""


@dataclass(frozen=True)
class General:
    """A metric of a general task. `change` = after − before, `low` … `high` its 95 % interval; None
    without an after.
    """

    task: str
    metric: str
    higher_is_better: bool
    items: int
    before: float
    after: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None


def compare_general(
    subject: Subject,
    folder: Path,
    *,
    limit: int | None = None,
    tasks: Sequence[str] = (),
    trained: bool = True,
    say: Say = lambda line: None,
) -> list[General]:
    """Every task of `folder` (or those named) before and, when `trained`, after; `limit` items of
    each at most.

    DataError when a named file is missing, or none is there.
    """
    results: list[General] = []
    for name, path in _found(subject, folder, tasks):
        before = _measure(subject, name, path, limit=limit, adapted=False)
        after = (
            _measure(subject, name, path, limit=limit, adapted=True)
            if trained
            else [None] * len(before)
        )
        for old, new in zip(before, after, strict=True):
            results.append(_general(name, old, new))
            say(line(results[-1]))
    return results


def _found(subject: Subject, folder: Path, tasks: Sequence[str]) -> Iterator[tuple[str, Path]]:
    known = GENERAL_ENCODER_TASKS if subject.texts is None else GENERAL_TASKS
    if unknown := [name for name in tasks if name not in known]:
        raise DataError(
            f'there is no general task "{unknown[0]}" for this kind of model',
            expected=", ".join(known),
        )
    any_found = False
    for name in tasks or known:
        file = known[name].file
        path = next(
            (
                place
                for place in (folder / file, folder / Path(file).name, folder.parent / file)
                if place.is_file()
            ),
            None,
        )
        if path is None and tasks:
            raise DataError(
                f'the file of the general task "{name}" is missing',
                where=str(folder),
                expected=file,
            )
        if path is not None:
            any_found = True
            yield name, path
    if not any_found:
        raise DataError(
            "there is no general-ability set in this folder",
            where=str(folder),
            expected="one of " + ", ".join(known[name].file for name in known),
            fix="Give the folder with these files.",
        )


def _measure(
    subject: Subject, name: str, path: Path, *, limit: int | None, adapted: bool
) -> list[MeasuredSet]:
    if subject.texts is None:
        return GENERAL_ENCODER_TASKS[name].measure(
            path, lambda texts: subject.embed(texts, adapted=adapted), limit=limit
        )
    return GENERAL_TASKS[name].measure(
        path, subject.texts, lambda items: subject.score(items, adapted=adapted), limit=limit
    )


def _general(task: str, old: MeasuredSet, new: MeasuredSet | None) -> General:
    before = old.statistic(old.values)
    result = General(task, old.metric, not lower_is_better(old.metric), len(old.values), before)
    if new is None:
        return result
    after = new.statistic(new.values)
    low, high = paired_interval(old.values, new.values, old.statistic)
    return General(
        task,
        old.metric,
        not lower_is_better(old.metric),
        len(old.values),
        before,
        after,
        after - before,
        low,
        high,
    )


def line(general: General) -> str:
    """For a person."""
    name = f"{general.task} {general.metric}"
    if general.after is None:
        return f"{name:<26}{general.before:9.4f}   ({general.items} items)"
    return (
        f"{name:<26}{general.before:9.4f} → {general.after:.4f}   change {general.change:+.4f} "
        f"[{general.low:+.4f}, {general.high:+.4f}]   ({general.items} items)"
    )
