"""A look at the examples of a stage before it trains: rows that repeat, contradict each other, or
are measured although they are learned; labels that differ in spelling alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

NAMED = 3  # labels that a line names


def look(
    train: Sequence[Any], labels: Sequence[str] | None, measured: tuple[int, int]
) -> list[str]:
    """What a user should know of these examples, a line each; `measured`: how many validation rows
    stand in train too, of all.
    """
    notes = []
    learned: dict[Any, dict[Any, int]] = {}
    repeated = 0
    for example in train:
        targets = learned.setdefault(_asked(example), {})
        target = _target(example)
        repeated += target in targets
        targets.setdefault(target, example.row)
    if repeated:
        notes.append(f"{repeated} of {len(train)} training rows repeat an earlier one")
    contradicting = [list(targets.values()) for targets in learned.values() if len(targets) > 1]
    if contradicting and labels is not None:
        first, second, *_ = contradicting[0]
        notes.append(
            f"texts with contradicting labels: {len(contradicting)} (the first in lines {first}"
            f" and {second})"
        )
    if measured[0]:
        notes.append(standing(*measured))
    twins: dict[str, list[str]] = {}
    for label in labels or ():
        twins.setdefault(" ".join(label.casefold().replace("_", " ").split()), []).append(label)
    for alike in [found for found in twins.values() if len(found) > 1][:NAMED]:
        notes.append(
            "labels that differ only in case or spaces: "
            + ", ".join(repr(label) for label in alike)
            + " (data.normalise_labels = true makes them one)"
        )
    return notes


def standing_in(train: Iterable[Any], validation: Sequence[Any]) -> int:
    """How many validation examples ask what a training example asks."""
    learned = {_asked(example) for example in train} if validation else set()
    return sum(_asked(example) in learned for example in validation)


def standing(measured: int, total: int) -> str:
    """That so many of the validation rows stand in train too."""
    share = "all" if measured == total else f"{measured} of"
    return (
        f"{share} {total} validation rows stand in train too: what is measured on them says nothing"
        " of other rows"
    )


def _asked(example: Any) -> Any:
    """What the model reads of an example, where a target stands apart from it; else all of it."""
    if isinstance(example, str):
        return example
    rejected = getattr(example, "rejected_ids", ())
    return tuple(example.input_ids), tuple(rejected)


def _target(example: Any) -> Any:
    if hasattr(example, "target"):
        return example.target
    labels = getattr(example, "labels", None)
    return tuple(labels) if isinstance(labels, list) else labels
