"""Dynamic masking for encoders (BERT: Devlin et al. 2019, arXiv:1810.04805, section 3.1).

What is masked is a pure function of (seed, step, the row's tokens), however a step's rows are spread over batches.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch

from edgetune.batching import IGNORE, Batch

SHARE = 0.15  # of the tokens that may be masked
MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens: replaced by the mask token, by any token; the rest stays as it is


@dataclass(frozen=True)
class Masking:
    """Chooses tokens of a batch, hides them, and leaves labels on them alone."""

    mask_id: int
    vocab_size: int
    seed: int

    def __call__(self, batch: Batch, step: int) -> Batch:
        """The batch of optimizer step `step` with tokens hidden; its labels say which tokens may be chosen."""
        input_ids, labels = batch.input_ids.clone(), torch.full_like(batch.labels, IGNORE)
        for row, line in enumerate(batch.rows):
            length = int(batch.attention_mask[row].sum())
            ids = batch.input_ids[row, :length]
            draw = torch.rand(2, length, generator=self._generator(step, line, ids), dtype=torch.float64)  # (which, how)
            chosen = (draw[0] < SHARE) & (batch.labels[row, :length] != IGNORE)
            labels[row, :length][chosen] = ids[chosen]
            hidden = input_ids[row, :length]
            hidden[chosen & (draw[1] < MASKED)] = self.mask_id
            randomly = chosen & (draw[1] >= MASKED) & (draw[1] < MASKED + RANDOM)
            # Uniform within its interval, so that no further draw is needed.
            words = ((draw[1] - MASKED) / RANDOM * self.vocab_size).long().clamp(0, self.vocab_size - 1)
            hidden[randomly] = words[randomly]
        return replace(batch, input_ids=input_ids, labels=labels, targets=int((labels != IGNORE).sum()))

    def _generator(self, step: int, line: int, ids: torch.Tensor) -> torch.Generator:
        key = zlib.crc32(f"{self.seed}/{step}/{line}/".encode() + ids.numpy().tobytes())
        return torch.Generator().manual_seed(key)
