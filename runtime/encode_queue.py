"""Texts of many callers in one batch of the encoder: the oldest first, with those nearest to it in length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.runtime.registry import Lease
from edgetune.runtime.runtime import ENCODE_ROWS, Runtime

Float32 = npt.NDArray[np.float32]
Finish = Callable[[list[Float32], Float32], Any]
"""Logits (labels,) or (tokens, labels) a text and pooled states (texts, hidden) → what the caller asked for."""


class EncodeJob:
    """One caller's texts; `future` has the answer when the last of them is done. `words`: logits of every token.

    Until then the future can be cancelled: what of its texts still waits is dropped.
    """

    def __init__(
        self, ids: Sequence[list[int]], lease: Lease | None, hidden: int, finish: Finish, *, words: bool = False
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
        """Let go of the adapter and answer the caller, if it still waits; a second call does nothing."""
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


class EncodeQueue:
    """Texts that wait for the encoder. The scheduler's lock guards `put` and `take`."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._waiting: list[tuple[EncodeJob, int]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def cache_tokens(self) -> int:
        """Tokens of key-value cache that the work under way holds: an encoder has none."""
        return 0

    @property
    def jobs(self) -> int:
        """How many callers wait."""
        return len({id(job) for job, _ in self._waiting})

    def put(self, job: EncodeJob) -> None:
        """Queue a caller's texts."""
        self._waiting += [(job, place) for place in range(len(job.ids))]

    def take(self) -> list[tuple[EncodeJob, int]]:
        """The next batch: the text that waited longest, then those nearest in length, older ones first."""
        over = {id(job): job for job, _ in self._waiting if job.future.done()}  # cancelled, or failed with a batch
        for job in over.values():
            job.end()
        self._waiting = [entry for entry in self._waiting if id(entry[0]) not in over]
        if not self._waiting:
            return []
        oldest = self._waiting[0][0]
        length = [len(job.ids[place]) for job, place in self._waiting]
        alike = [i for i, (job, _) in enumerate(self._waiting) if job.words is oldest.words]
        order = [alike[i] for i in self.fitting([length[i] for i in alike])]
        batch = [self._waiting[i] for i in order]
        self._waiting = [entry for i, entry in enumerate(self._waiting) if i not in {*order}]
        return batch

    def fitting(self, lengths: Sequence[int]) -> list[int]:
        """Of waiting texts, those of one batch: the first, then its nearest in length."""
        return sorted(range(len(lengths)), key=lambda i: (i > 0, abs(lengths[i] - lengths[0]), i))[:ENCODE_ROWS]

    def run(self, batch: Sequence[tuple[EncodeJob, int]]) -> None:
        """Run one batch and answer the callers whose last text it was."""
        jobs = {id(job): job for job, _ in batch}
        encoder = self.runtime.encoder
        assert encoder is not None
        try:
            rows = [job.ids[place] for job, place in batch]
            adapters = [None if job.lease is None else job.lease.resident.bound for job, _ in batch]
            pad = self.runtime.tokenizer.pad_token_id
            if batch[0][0].words:
                found, _ = encoder.tokens(rows, adapters, pad_token_id=pad)
                pooled = np.zeros((len(rows), 0), np.float32)
            else:
                found, pooled = encoder.run(rows, adapters, pad_token_id=pad)
            for (job, place), logits, states in zip(batch, found, pooled, strict=True):
                job.take(place, logits.copy(), states)
        except Exception as error:  # whatever it is, these callers get it, and the worker goes on
            for job in jobs.values():
                job.end(error)
            return
        for job in jobs.values():
            if not job.left:
                job.end()

    def abandon(self, error: Exception) -> None:
        """Answer everyone who waits with an error."""
        for job, _ in self._waiting:
            job.end(error)
        self._waiting = []
