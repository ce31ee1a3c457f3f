"""What watches a trial of a search while it trains: its validations, and the time that is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgetune.core.progress import Progress
from edgetune.training.context import ResolvedStage
from edgetune.training.journal import Journal


class OutOfTimeError(Exception):
    """The search's time is over."""


class TrialJournal(Journal):
    """Writes nothing; hears of the last stage's validations."""

    def __init__(
        self, last: int, seen: Callable[[Mapping[str, Any]], None], progress: TrialProgress
    ) -> None:
        super().__init__(None)
        self._last, self._seen, self._progress = last, seen, progress

    def write(self, **record: Any) -> None:
        """Keep the record, and pass a validation on."""
        super().write(**record)
        if record["kind"] == "validation":
            self._progress.validated()
        if record["kind"] == "validation" and record["stage"] == self._last:
            self._seen(record)


@dataclass
class Pace:
    """Seconds that the latest validation of a search took; 0 before there is one."""

    validation: float = 0.0


class TrialProgress(Progress):
    """Shows a trial's steps and not what it says; ends it before what comes next, a step or a
    validation, would pass the deadline.
    """

    def __init__(self, outer: Progress, deadline: float, pace: Pace, last: ResolvedStage) -> None:
        super().__init__(outer.stream)
        self._deadline, self._pace, self._last = deadline, pace, last
        self._at = math.nan  # when the latest step or validation ended
        self._step_seconds = 0.0

    def validated(self) -> None:
        """A validation has ended."""
        now = time.monotonic()
        if self._at < now:  # not so before the first step
            self._pace.validation = now - self._at
        self._at = now

    def say(self, message: str) -> None:
        """Nothing: a trial is one line, when it has ended."""

    def step(self, step: int, total: int, **facts: Any) -> None:
        """Raises when the search's time is over, or not enough is left."""
        now = time.monotonic()
        if self._at < now:  # not so for the first step
            self._step_seconds = now - self._at
        self._at = now
        every, stage = self._last.validate_every, facts.get("stage")
        due = stage in (None, self._last.index) and (step % every == 0 or step == total)
        if now + (self._pace.validation if due else self._step_seconds) > self._deadline:
            self.close()
            raise OutOfTimeError
        if self.live:
            super().step(step, total, **facts)
