"""Texts that wait for an encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgetune.runtime.engine.interface import Encoder
from edgetune.runtime.scheduler.jobs import (
    Entry,
    JobQueue,
    adapters_of,
    end_jobs,
    nearest_first,
)
from edgetune.runtime.tasks.encoder import ENCODE_ROWS


class EncodeQueue(JobQueue):
    """Each turn runs one whole batch of at most `ENCODE_ROWS` texts."""

    def __init__(self, encoder: Encoder, *, pad_token_id: int) -> None:
        super().__init__()
        self._encoder, self._pad_token_id = encoder, pad_token_id

    def fitting(self, lengths: Sequence[int]) -> list[int]:
        """Of waiting texts, those of one batch: the first, then its nearest in length."""
        return nearest_first(lengths)[:ENCODE_ROWS]

    def run(self, batch: Sequence[Entry]) -> None:
        """Run one batch and answer the callers whose last text it was."""
        try:
            rows, adapters = [job.ids[place] for job, place in batch], adapters_of(batch)
            if batch[0][0].words:
                found, _ = self._encoder.tokens(rows, adapters, pad_token_id=self._pad_token_id)
                pooled = np.zeros((len(rows), 0), np.float32)
            else:
                found, pooled = self._encoder.run(rows, adapters, pad_token_id=self._pad_token_id)
            results = list(zip(batch, found, pooled, strict=True))
        except Exception as error:  # whatever it is, a caller gets it, and the worker goes on
            self.fail(batch, error)
            return
        for (job, place), logits, states in results:
            job.take(place, logits.copy(), states)
        end_jobs(batch)
