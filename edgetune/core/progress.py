"""Progress of a training: one live line on a terminal, plain lines now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

PLAIN_EVERY_SECONDS = 10.0
LIVE_EVERY_SECONDS = 0.2


class Progress:
    """Shows step, loss, tokens/s and time left; messages go on lines of their own."""

    def __init__(
        self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.clock = clock
        self._shown_at: float | None = None
        self._width = 0

    def say(self, message: str) -> None:
        """A line that stays."""
        self._clear()
        self.stream.write(message + "\n")
        self.stream.flush()

    def step(
        self,
        step: int,
        total: int,
        *,
        loss: float,
        tokens_per_second: float,
        seconds: float,
        reward: float | None = None,
        stage: int | None = None,
    ) -> None:
        """Show step `step` of `total` (of a run's `stage`), reached after `seconds` of work on
        these steps.
        """
        now, pause = self.clock(), LIVE_EVERY_SECONDS if self.live else PLAIN_EVERY_SECONDS
        if self._shown_at is not None and now - self._shown_at < pause and step < total:
            return
        self._shown_at = now
        left = seconds / step * (total - step)
        what = f"loss {loss:.4f}" if reward is None else f"reward {reward:.3f}"
        where = "" if stage is None else f"stage {stage}  "
        speed = f"{tokens_per_second:,.0f} tokens/s"
        line = f"{where}step {step}/{total}  {what}  {speed}  {duration(left)} left"
        if self.live:
            self.stream.write("\r" + line.ljust(self._width))
            self.stream.flush()
            self._width = len(line)
        else:
            self.say(line)

    def close(self) -> None:
        """Leave the terminal on a fresh line."""
        if self.live and self._width:
            self.stream.write("\n")
            self._width = 0

    def _clear(self) -> None:
        if self.live and self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self._width = 0


def duration(seconds: float) -> str:
    """Seconds for people: 42s, 3m05s, 1h02m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


Say = Callable[[str], None]
