"""Threads that poll: one for each alias that follows a source, beside the server."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from edgetune.runtime.rollout.rollout import AliasRollout

log = logging.getLogger("edgetune.server")
LOOK_S = 5.0
"""How often a trial's time is looked at, at least."""


class Follower:
    """Runs roll-outs for the length of a with statement. The first poll comes at a random moment of
    the first interval: a thousand devices that start together do not ask together.
    """

    def __init__(self, rollouts: Sequence[AliasRollout], *, every_s: float) -> None:
        self._every_s, self._ending = every_s, threading.Event()
        self._rollouts = rollouts
        self._threads = [
            threading.Thread(
                target=self._run, args=(one,), name=f"edgetune-follow-{one.alias}", daemon=True
            )
            for one in rollouts
        ]

    def __enter__(self) -> Follower:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        for rollout in self._rollouts:
            rollout.woken.set()
        for thread in self._threads:
            thread.join(1.0)  # a fetch may hang; what is on the disk is whole at any moment

    def _run(self, rollout: AliasRollout) -> None:
        due = time.monotonic() + random.random() * self._every_s
        while not self._ending.is_set():
            polls = time.monotonic() >= due
            try:
                rollout.step(poll=polls)
            except Exception as error:  # a defect of ours must not end what keeps a device current
                if self._ending.is_set():  # what it works with is being closed
                    return
                log.error("error", exc_info=error, extra={"fields": {"alias": rollout.alias}})
            if polls:
                due = time.monotonic() + self._every_s
            if not self._ending.is_set():
                rollout.woken.wait(max(0.0, min(LOOK_S, due - time.monotonic())))
