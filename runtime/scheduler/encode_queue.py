"""Texts to encode and answers to score, of many callers in one batch; fair between adapters
(start-time fair queueing).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import numpy as np

from edgetune.core.arrays import Float32
from edgetune.runtime.adapters.registry import Lease
from edgetune.runtime.tasks.encoder import ENCODE_ROWS
from edgetune.runtime.tasks.runtime import Runtime
from edgetune.runtime.tasks.scoring import SCORE_ROWS, SCORE_TOKENS, Reading

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
        """The next batch: the text that waited longest, then those nearest in length, older ones
        first.
        """
        over = {
            id(job): job for job, _ in self._waiting if job.future.done()
        }  # cancelled, or failed with a batch
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
        return sorted(range(len(lengths)), key=lambda i: (i > 0, abs(lengths[i] - lengths[0]), i))[
            :ENCODE_ROWS
        ]

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


Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items with a key (whose share) and a cost (what serving them takes, in any unit). Not
    thread-safe.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, float, Item, Hashable]] = []
        self._last: dict[Hashable, float] = {}
        self._now, self._count = 0.0, 0

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Item]:
        """All items, in no particular order."""
        return (entry[3] for entry in self._heap)

    def put(self, item: Item, *, key: Hashable, cost: float) -> None:
        """Queue an item."""
        start = max(self._now, self._last.get(key, 0.0))
        self._last[key] = start + cost
        self._count += 1
        heapq.heappush(self._heap, (start, self._count, cost, item, key))

    def peek(self) -> Item | None:
        """Whose turn it is; None when nobody waits."""
        return self._heap[0][3] if self._heap else None

    def pop(self) -> Item:
        """Take the item whose turn it is."""
        self._now, _, _, item, _ = heapq.heappop(self._heap)
        self._forget_if_idle()
        return item

    def remove(self, wanted: Callable[[Item], bool]) -> list[Item]:
        """Take out every item for which `wanted` is true; its adapter's later items come as if it
        had not been there.
        """
        out = [entry for entry in self._heap if wanted(entry[3])]
        if out:
            gone = {entry[1] for entry in out}
            self._heap = [entry for entry in self._heap if entry[1] not in gone]
            for _, count, cost, _, key in out:
                self._give_back(key, count, cost)
            heapq.heapify(self._heap)
            self._forget_if_idle()
        return [entry[3] for entry in sorted(out, key=lambda entry: entry[1])]

    def _give_back(self, key: Hashable, count: int, cost: float) -> None:
        """What was queued after a removed item of the same key moves up by its cost."""
        self._last[key] -= cost
        for i, (start, number, own, item, whose) in enumerate(self._heap):
            if whose == key and number > count:
                self._heap[i] = (start - cost, number, own, item, whose)

    def _forget_if_idle(self) -> None:
        """Virtual time need not run for ever."""
        if not self._heap:
            self._last.clear()
            self._now = 0.0


NO_STATES = np.zeros(0, np.float32)


class ScoreQueue(EncodeQueue):
    """Answers that wait for the decoder. The scheduler's lock guards `put`, `take` and
    `abandon`.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self._reading: tuple[list[tuple[EncodeJob, int]], Reading | None] | None = None

    def __len__(self) -> int:
        return super().__len__() + (0 if self._reading is None else len(self._reading[0]))

    @property
    def cache_tokens(self) -> int:
        """Tokens of cache that the answers under way hold, beside the rows' block."""
        return 0 if self._reading is None or self._reading[1] is None else self._reading[1].tokens

    @property
    def jobs(self) -> int:
        """How many callers wait."""
        under_way = [] if self._reading is None else self._reading[0]
        return len({id(job) for job, _ in [*self._waiting, *under_way]})

    def take(self) -> list[tuple[EncodeJob, int]]:
        """The batch under way, else the answer that waited longest with those nearest to it in
        length that fit beside it.
        """
        if self._reading is not None and all(job.future.done() for job, _ in self._reading[0]):
            for job, _ in self._reading[0]:
                job.end()
            self._reading = None
        if self._reading is None and (batch := super().take()):
            self._reading = batch, None
        return [] if self._reading is None else self._reading[0]

    def fitting(self, lengths: Sequence[int]) -> list[int]:
        """Of waiting answers, those of one batch: the first, then its nearest in length while the
        padded batch is small.
        """
        chosen: list[int] = []
        for place in sorted(
            range(len(lengths)), key=lambda i: (i > 0, abs(lengths[i] - lengths[0]), i)
        ):
            longest = max(lengths[i] for i in [*chosen, place])
            if chosen and (len(chosen) == SCORE_ROWS or (len(chosen) + 1) * longest > SCORE_TOKENS):
                break
            chosen.append(place)
        return chosen

    def run(self, batch: Sequence[tuple[EncodeJob, int]]) -> None:
        """One piece of the batch's work; its callers are answered after the last."""
        assert self._reading is not None
        jobs = {id(job): job for job, _ in batch}
        engine = self.runtime.decoder
        assert engine is not None
        try:
            reading = self._reading[1]
            if reading is None:
                adapters = [
                    None if job.lease is None else job.lease.resident.bound for job, _ in batch
                ]
                reading = Reading(engine, [job.ids[place] for job, place in batch], adapters)
                self._reading = list(batch), reading
            found = reading.step()
        except Exception as error:  # whatever it is, these callers get it, and the worker goes on
            self._reading = None
            for job in jobs.values():
                job.end(error)
            return
        if found is None:
            return
        self._reading = None
        for (job, place), score in zip(batch, found[0], strict=True):
            job.take(place, np.array([score], np.float32), NO_STATES)
        for job in jobs.values():
            if not job.left:
                job.end()

    def abandon(self, error: Exception) -> None:
        """Answer everyone who waits, or is under way, with an error."""
        super().abandon(error)
        for job, _ in [] if self._reading is None else self._reading[0]:
            job.end(error)
        self._reading = None
