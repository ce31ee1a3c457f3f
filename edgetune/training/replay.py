"""Replay: general text in every step of a stage, so that learning the task forgets less.

With share s a step's loss is (1 − s) · task + s · causal-lm of the general text, and the text is s of the step's tokens.
Which text a step sees follows from the seed and the step alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.batching import Batch, Example, collate, steps_per_epoch
from edgetune.data import read_rows
from edgetune.errors import DataError
from edgetune.examples.text import encode_documents, pack, text_rows
from edgetune.prompts import PromptFormat, row_template
from edgetune.recipe import Stage

SHORTEST = 32  # tokens of a sequence; below, a step would see too little context to learn from


@dataclass(frozen=True)
class ReplayText:
    """Packed general text; `rows` sequences go into every step."""

    examples: list[Example]
    rows: int
    share: float
    pad_id: int
    digest: str

    def batch(self, step: int) -> Batch:
        """The text of optimizer step `step` (from 1); after the last sequence the first ones come again."""
        start = (step - 1) * self.rows
        return collate([self.examples[at % len(self.examples)] for at in range(start, start + self.rows)], self.pad_id)


def load_replay(stage: Stage, examples: Sequence[Example], tokenizer: object, *, limit: int, pad_id: int, seed: int) -> ReplayText | None:
    """The text of a stage's `replay`, cut to what a step needs; None when it has none.

    `limit`: tokens a sequence may have. DataError for rows that cannot be used.
    """
    replay = stage.replay
    if replay is None:
        return None
    source = read_rows(replay.data, stage.data.skip_invalid)
    form = PromptFormat(text=row_template(replay.text, "text", key="replay.text"))
    rows, _ = text_rows(source, form, skip_invalid=stage.data.skip_invalid)
    step = sum(len(example.input_ids) for example in examples) / steps_per_epoch(len(examples), stage.batch_size)
    wanted = replay.share / (1 - replay.share) * step
    count = max(1, round(wanted / limit))
    packed: list[Example] = [*pack(encode_documents(rows, tokenizer), min(limit, max(SHORTEST, round(wanted / count))))]
    if not packed:
        raise DataError("there is no text to learn from", where=source.source, expected="at least two tokens")
    random.Random(f"replay/{seed}").shuffle(packed)
    return ReplayText(packed, count, replay.share, pad_id, source.digest)
