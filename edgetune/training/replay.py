"""Replay: general text in every step of a stage, so that learning the task forgets less.

With share s a step's loss is (1 − s) · task + s · causal-lm of the general text, and the text is s
of the step's tokens. Which text a step sees follows from the seed and the step alone.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from typing import Any

from edgetune.core.errors import DataError, TrainingError
from edgetune.data.batching import Batch, Example
from edgetune.data.collation import collate
from edgetune.data.plain_text import encode_documents, pack, text_rows
from edgetune.data.prompts import PromptFormat, row_template
from edgetune.data.rows import read_rows
from edgetune.objectives.language import sft
from edgetune.recipe.schema import Replay
from edgetune.training.learner import Learned, Learner

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
        """The text of optimizer step `step` (from 1); after the last sequence the first ones come
        again.
        """
        return collate([self.examples[at] for at in self._places(step)], self.pad_id)

    def add_gradient(self, learner: Learner, step: int) -> Learned:
        """Add `share` times the gradient of the text's mean loss; of several processes each takes
        its part of the rows.

        Raises TrainingError when the loss is not finite.
        """
        parts = [
            collate([self.examples[at]], self.pad_id)
            for at in learner.group.share(self._places(step))
        ]
        spare = functools.partial(collate, self.examples[:1], self.pad_id)
        learned = learner.add_gradient(sft, parts, spare=spare, weight=self.share)
        if not math.isfinite(learned.loss):
            lines = sorted(self.examples[at].row for at in self._places(step))
            raise TrainingError(
                f"the loss of the replayed text became {learned.loss} at step {step}, on rows"
                f" {', '.join(map(str, lines))} of its file",
                fix=(
                    'Look at these rows; a lower learning_rate or precision = "fp32" usually helps.'
                ),
            )
        return learned

    def _places(self, step: int) -> list[int]:
        start = (step - 1) * self.rows
        return [at % len(self.examples) for at in range(start, start + self.rows)]


def load_replay(
    replay: Replay,
    tokenizer: Any,
    *,
    step_tokens: float,
    limit: int,
    pad_id: int,
    seed: int,
    skip_invalid: bool = False,
) -> ReplayText:
    """General text, cut to what a step needs.

    `step_tokens`: those of the stage's own rows in a step; `limit`: tokens a sequence may have.
    DataError for rows that cannot be used.
    """
    source = read_rows(replay.data, skip_invalid)
    form = PromptFormat(text=row_template(replay.text, "text", key="replay.text"))
    rows, _ = text_rows(source, form, skip_invalid=skip_invalid)
    wanted = replay.share / (1 - replay.share) * step_tokens
    count = max(1, round(wanted / limit))
    packed: list[Example] = [
        *pack(encode_documents(rows, tokenizer), min(limit, max(SHORTEST, round(wanted / count))))
    ]
    if not packed:
        raise DataError(
            "there is no text to learn from", where=source.source, expected="at least two tokens"
        )
    random.Random(f"replay/{seed}").shuffle(packed)
    return ReplayText(packed, count, replay.share, pad_id, source.digest)
