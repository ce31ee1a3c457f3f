"""A new version beside the one before it: who answered what, how fast, how often alike; and the
verdict.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from edgetune.core.errors import InputError

Decision = Literal["go on", "keep", "roll back"]
RECENT = 512
"""Times of a version that are kept."""
FEWEST_TIMES, FEWEST_FAILURES = 20, 3
"""Below these nobody is judged by times or shadowed requests, or by failures."""


@dataclass(frozen=True)
class RolloutBounds:
    """What a new version must stay within, and how long it is tried."""

    share: float = 0.1
    """of an alias's requests that it answers while it is tried"""
    shadow: float = 0.1
    """of the alias's requests that both versions answer once more, to be compared"""
    requests: int = 100
    """answers after which it is kept, and for as many more it is watched"""
    wait_s: float = 3600.0
    """after which it is kept with fewer"""
    errors: float = 0.02
    """share of its answers that may fail beyond the other's share"""
    latency: float = 1.5
    """its median time at most, as a multiple of the other's"""
    agreement: float = 0.5
    """share of the compared answers that must be alike; free text differs easily"""
    proof: float = 0.95
    """share of the rows of its own `edgetune_proof.jsonl` that it must answer as written there"""


RANGES = {
    "share": (0.001, 1.0),
    "shadow": (0.0, 1.0),
    "requests": (1.0, 1e9),
    "wait_s": (0.0, 1e9),
    "errors": (0.0, 1.0),
    "latency": (0.0, 1e9),
    "agreement": (0.0, 1.0),
    "proof": (0.0, 1.0),
}
"""What each bound may be, from and to."""


def parse_bounds(pairs: tuple[str, ...]) -> RolloutBounds:
    """`key=value` each. InputError for an unknown key or a value out of range."""
    given: dict[str, float] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        if key not in RANGES:
            raise InputError(
                "cannot read a bound of the roll-out",
                expected=f"KEY=NUMBER, where KEY is one of {', '.join(RANGES)}",
                got=pair,
            )
        least, most = RANGES[key]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise InputError(
                f"the roll-out's bound {key} is out of its range",
                expected=f"a number from {least:g} to {most:g}",
                got=text,
            )
        given[key] = value
    asked = int(given.pop("requests", RolloutBounds.requests))
    return RolloutBounds(requests=asked, **given)


@dataclass
class Seen:
    """What one version did."""

    answered: int = 0
    failed: int = 0
    times: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    @property
    def failing(self) -> float:
        """Share of the requests that failed."""
        return self.failed / self.answered if self.answered else 0.0


@dataclass
class VersionTrial:
    """A new version and the one before it (None: there was none) while the new one is on trial."""

    new: str
    old: str | None
    bounds: RolloutBounds
    began: float
    """a moment of `time.monotonic()`"""
    seen: dict[str | None, Seen] = field(default_factory=dict)
    compared: int = 0
    alike: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, version: str, seconds: float, *, failed: bool) -> None:
        """One request: `seconds` for an answer, or for a token where it has several."""
        with self._lock:
            one = self.seen.setdefault(version, Seen())
            one.answered += 1
            one.failed += failed
            if not failed:
                one.times.append(seconds)

    def shadowed(self, *, alike: bool) -> None:
        """One request that both have answered."""
        with self._lock:
            self.compared += 1
            self.alike += alike

    def begin_again(self, now: float) -> None:
        """The new one answers alone now: it is counted anew, the old one's figures stay."""
        with self._lock:
            self.seen[self.new] = Seen()
            self.began = now

    def decide(self, now: float) -> tuple[Decision, str]:
        """What to do, and why in words."""
        with self._lock:
            new, old = self.seen.get(self.new, Seen()), self.seen.get(self.old, Seen())
            bounds = self.bounds
            if new.failed >= FEWEST_FAILURES and new.failing > old.failing + bounds.errors:
                return "roll back", f"{new.failed} of {new.answered} requests failed"
            if min(len(new.times), len(old.times)) >= FEWEST_TIMES:
                times = median(new.times) / max(median(old.times), 1e-9)
                if times > bounds.latency:
                    return "roll back", f"it takes {times:.2f} times as long"
            if self.compared >= FEWEST_TIMES and self.alike < bounds.agreement * self.compared:
                return "roll back", f"{self.alike} of {self.compared} answers alike"
            over = new.answered >= bounds.requests or now - self.began >= bounds.wait_s
            if over and new.failed * 2 > new.answered:  # too few requests for the bound above
                return "roll back", f"{new.failed} of {new.answered} requests failed"
            if new.answered >= bounds.requests:
                return "keep", f"{new.answered} requests, {new.failed} failed"
            if now - self.began >= bounds.wait_s:
                return "keep", f"{bounds.wait_s:g} s with {new.answered} requests"
        return "go on", ""
