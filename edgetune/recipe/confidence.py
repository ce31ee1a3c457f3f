"""A recipe's `[confidence]`: what is fitted on the validation rows after training, and what it may
be asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgetune.core.settings import option
from edgetune.core.tasks import CLASSIFICATION, TAGGING, Problem, Task


@dataclass(frozen=True, kw_only=True)
class ConfidenceSettings:
    """How sure an adapter with labels is of its answers, by the last stage's validation rows."""

    calibrate: bool = option(
        True,
        help=(
            "fit a temperature, so that of the answers with a score of 0.8 about 80 in 100 are"
            " right; also without this table, from 30 validation rows on"
        ),
    )
    target: float | None = option(
        None,
        help=(
            "single-label: share of right answers among those given; what is less sure is"
            ' answered with `"label": null`. Not set: every row is answered'
        ),
        above=0,
        below=1,
    )
    answered: float | None = option(
        None,
        help=(
            "single-label: share of the validation rows that is answered, such as 0.95: the least"
            " sure others, and what is none of the labels, are not. With `target` too, the"
            " higher of both thresholds holds"
        ),
        above=0,
        at_most=1,
    )
    out_of_scope: str | None = option(
        None,
        help=(
            "single-label: the label that validation rows have which are none of the labels,"
            " beside an empty one: they are no class, and count as wrong where they are answered"
        ),
    )

    @property
    def has_threshold(self) -> bool:
        """Whether some answers shall not be given."""
        return self.target is not None or self.answered is not None


def can_calibrate(task: Task, problem: Problem) -> bool:
    """Whether the answers are labels with probabilities."""
    return task == TAGGING or (task == CLASSIFICATION and problem != "regression")
