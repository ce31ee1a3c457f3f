"""Texts to encode or to score: what one caller asks for, and the queue of all callers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from edgetune.core.arrays import Float32
from edgetune.runtime.adapters.registry import Lease
from edgetune.runtime.engine.interface import AdapterRow

Finish = Callable[[list[Float32], Float32], Any]
"""Logits (labels,) or (tokens, labels) a text and pooled states (texts, hidden) → what the caller
asked for.
"""


class EncodeJob:
    """One caller's texts; `future` has the answer when the last of them is done. `words`: logits of
    every token.

    Until then the future can be cancelled: what of its texts still waits is dropped.
    """

    def __init__(
        self,
        ids: Sequence[list[int]],
        lease: Lease | None,
        hidden: int,
        finish: Finish,
        *,
        words: bool = False,
    ) -> None:
        self.ids, self.lease, self.finish, self.words = ids, lease, finish, words
        self.future: Future[Any] = Future()
        self.logits: list[Float32] = [np.zeros(0, np.float32)] * len(ids)
        self.pooled: Float32 = np.zeros((len(ids), 0 if words else hidden), np.float32)
        self.left = len(ids)

    def take(self, place: int, logits: Float32, pooled: Float32) -> None:
        """One text's result."""
        self.logits[place], self.pooled[place] = logits, pooled
        self.left -= 1

    def end(self, error: BaseException | None = None) -> None:
        """Let go of the adapter and answer the caller, if it still waits; a second call does
        nothing.
        """
        if self.lease is not None:
            self.lease.release()
        if self.future.done() or not self.future.set_running_or_notify_cancel():
            return
        try:
            if error is None:
                self.future.set_result(self.finish(self.logits, self.pooled))
        except Exception as problem:  # the caller's own answer: it hears of it
            error = problem
        if error is not None:
            self.future.set_exception(error)


Entry = tuple[EncodeJob, int]
"""A job, and the place of one of its texts."""


class JobQueue(ABC):
    """Texts that wait for the engine. The scheduler's lock guards `put`, `take` and `abandon`."""

    def __init__(self) -> None:
        self._waiting: list[Entry] = []
        self._again: list[Entry] = []
        """texts of a batch that failed: each is run again, alone"""

    def __len__(self) -> int:
        return len(self._waiting) + len(self._again)

    @property
    def cache_tokens(self) -> int:
        """Tokens of key-value cache that the work under way holds."""
        return 0

    @property
    def jobs(self) -> int:
        """How many callers wait."""
        return len({id(job) for job, _ in [*self._waiting, *self._again]})

    def put(self, job: EncodeJob) -> None:
        """Queue a caller's texts."""
        self._waiting += [(job, place) for place in range(len(job.ids))]

    def take(self) -> list[Entry]:
        """The next batch: the text that waited longest, then those nearest in length, older ones
        first.
        """
        over = {
            id(job): job for job, _ in [*self._waiting, *self._again] if job.future.done()
        }  # cancelled, or failed with a batch
        for job in over.values():
            job.end()
        self._waiting = [entry for entry in self._waiting if id(entry[0]) not in over]
        self._again = [entry for entry in self._again if id(entry[0]) not in over]
        if self._again:
            return [self._again.pop(0)]
        if not self._waiting:
            return []
        oldest = self._waiting[0][0]
        length = [len(job.ids[place]) for job, place in self._waiting]
        alike = [i for i, (job, _) in enumerate(self._waiting) if job.words is oldest.words]
        order = [alike[i] for i in self.fitting([length[i] for i in alike])]
        batch = [self._waiting[i] for i in order]
        self._waiting = [entry for i, entry in enumerate(self._waiting) if i not in {*order}]
        return batch

    def fail(self, batch: Sequence[Entry], error: Exception) -> None:
        """A batch failed. Of several texts each is run again, alone: the error belongs to the
        caller whose text brings it about, not to its neighbours.
        """
        if len(batch) == 1:
            end_jobs(batch, error=error)
            return
        self._again += batch

    def abandon(self, error: Exception) -> None:
        """Answer everyone who waits with an error."""
        for job, _ in [*self._waiting, *self._again]:
            job.end(error)
        self._waiting, self._again = [], []

    @abstractmethod
    def fitting(self, lengths: Sequence[int]) -> list[int]:
        """Of waiting texts, those of one batch: the first, then its nearest in length."""

    @abstractmethod
    def run(self, batch: Sequence[Entry]) -> None:
        """Run one batch, or a piece of it, and answer the callers whose last text it was."""


def nearest_first(lengths: Sequence[int]) -> list[int]:
    """Places of texts: the first, then those nearest to it in length, older ones first."""
    return sorted(range(len(lengths)), key=lambda i: (i > 0, abs(lengths[i] - lengths[0]), i))


def adapters_of(batch: Sequence[Entry]) -> list[AdapterRow]:
    """The adapter of each text of a batch."""
    return [None if job.lease is None else job.lease.resident.bound for job, _ in batch]


def end_jobs(batch: Sequence[Entry], *, error: Exception | None = None) -> None:
    """Answer the callers whose last text this was, or all of them with an error."""
    for job in {id(job): job for job, _ in batch}.values():
        if error is not None or not job.left:
            job.end(error)
