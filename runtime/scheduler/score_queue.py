"""Answers that wait for their scores by a decoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgetune.runtime.engine.interface import Decoder, ScoreReading
from edgetune.runtime.scheduler.jobs import (
    Entry,
    JobQueue,
    adapters_of,
    end_jobs,
    nearest_first,
)
from edgetune.runtime.tasks.scoring import SCORE_ROWS, SCORE_TOKENS

NO_STATES = np.zeros(0, np.float32)


class ScoreQueue(JobQueue):
    """Each turn reads one piece of a batch, so that rows being decoded need not wait for all of
    it.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self._decoder = decoder
        self._reading: tuple[list[Entry], ScoreReading | None] | None = None

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
        return len({id(job) for job, _ in [*self._waiting, *self._again, *under_way]})

    def take(self) -> list[Entry]:
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
        for place in nearest_first(lengths):
            longest = max(lengths[i] for i in [*chosen, place])
            if chosen and (len(chosen) == SCORE_ROWS or (len(chosen) + 1) * longest > SCORE_TOKENS):
                break
            chosen.append(place)
        return chosen

    def run(self, batch: Sequence[Entry]) -> None:
        """One piece of the batch's work; its callers are answered after the last."""
        assert self._reading is not None
        try:
            reading = self._reading[1]
            if reading is None:
                rows = [job.ids[place] for job, place in batch]
                reading = self._decoder.begin_scores(rows, adapters_of(batch))
                self._reading = list(batch), reading
            found = reading.step()
        except Exception as error:  # whatever it is, a caller gets it, and the worker goes on
            self._reading = None
            self.fail(batch, error)
            return
        if found is None:
            return
        self._reading = None
        for (job, place), score, states in zip(batch, *found, strict=True):
            job.take(place, np.array([score], np.float32), NO_STATES if job.words else states)
        end_jobs(batch)

    def abandon(self, error: Exception) -> None:
        """Answer everyone who waits, or is under way, with an error."""
        super().abandon(error)
        for job, _ in [] if self._reading is None else self._reading[0]:
            job.end(error)
        self._reading = None
