"""What the fuzz tests share: how many cases, from which seed on, a watch against freezing, and the
figures that `make fuzz` prints in one table.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from edgetune.core.errors import EdgetuneError

ROUNDS = int(os.environ.get("EDGETUNE_FUZZ", "60"))
"""adapters, recipes, bundles of each kind and clients; a twentieth of it processes are killed"""
SEED = int(os.environ.get("EDGETUNE_FUZZ_SEED", "0"))
FROZEN_S = 120
"""what takes longer has frozen the process"""
LONGEST = 40_000
"""characters of a message"""
FAULTS = ("other exceptions", "frozen", "not finite", "wrong", "status 5xx", "not resumed")
TABLE: list[Figures] = []


class Frozen(BaseException):
    """No handler of an exception may take it for one of its own."""


@contextmanager
def not_frozen(seconds: int = FROZEN_S) -> Iterator[None]:
    """Frozen where a block takes longer."""

    def stop(*_: object) -> None:
        raise Frozen

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Figures:
    """How many cases of one kind there were, and what came of them."""

    def __init__(self, kind: str) -> None:
        self.kind, self.tried = kind, 0
        self.seen: Counter[str] = Counter()
        self.examples: list[str] = []
        TABLE.append(self)

    @contextmanager
    def case(self, seed: int) -> Iterator[None]:
        """One case: an error of ours is a refusal; another one, or no end, is a fault."""
        self.tried += 1
        try:
            with not_frozen():
                yield
        except EdgetuneError as error:
            self.seen["refused"] += 1
            if len(str(error)) > LONGEST:
                self.fault("other exceptions", f"seed {seed}: {len(str(error))} characters")
        except Frozen:
            self.fault("frozen", f"seed {seed}")
        except Exception as error:
            self.fault("other exceptions", f"seed {seed}: {type(error).__name__}: {error}")

    def count(self, what: str) -> None:
        self.seen[what] += 1

    def fault(self, what: str, example: str) -> None:
        self.seen[what] += 1
        self.examples.append(f"{what}: {example[:500]}")

    def check(self) -> None:
        """AssertionError with the first faults."""
        assert not self.examples, "\n".join([str(dict(self.seen)), *self.examples[:20]])

    def line(self) -> str:
        good = ", ".join(f"{n} {what}" for what, n in self.seen.items() if what not in FAULTS)
        faults = " | ".join(str(self.seen[what]) for what in FAULTS)
        return f"| {self.kind} | {self.tried} | {good} | {faults} |"


def table() -> list[str]:
    """Markdown, a line a kind."""
    head = ("tried", "tried", "what came of it", *FAULTS)
    return [
        f"| {' | '.join(('kind', *head[1:]))} |",
        "|---" * (len(head)) + "|",
        *(figures.line() for figures in TABLE),
    ]
