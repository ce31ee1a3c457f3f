"""Prompts that fit share a turn's tokens; one that does not waits for the next turn, and nobody
overtakes it.
"""

from __future__ import annotations

import pytest

from edgetune.runtime import Runtime
from edgetune.runtime.scheduler.requests import Event, FinishedEvent, GenerationRequest
from edgetune.runtime.scheduler.scheduler import Scheduler

CHUNK = 32


def submitted(scheduler: Scheduler, lengths: list[int], events: list[list[Event]]) -> None:
    """Prompts of these lengths, which nobody works on yet: the scheduler is not started."""
    for place, length in enumerate(lengths):
        heard: list[Event] = []
        events.append(heard)
        ids = [(place * 31 + i * 7) % 300 + 3 for i in range(length)]
        settings = scheduler.runtime.settings(
            "a" if place % 2 else None,
            max_new_tokens=6,
            logit_bias=dict.fromkeys(scheduler.runtime.tokenizer.eos_token_ids, -100.0),
        )
        scheduler.submit(GenerationRequest(ids, "a" if place % 2 else None, settings), heard.append)


@pytest.mark.parametrize(
    ("lengths", "joined"),
    [
        ([8, 8, 8, 8, 8], [4, 5]),  # four fill the first turn
        (
            [8, 30, 2],
            [1, 3],
        ),  # the second does not fit any more, and the third does not overtake it
        ([70, 4], [0, 0, 2]),  # 32, 32, then 6 and 4
        ([32, 1], [1, 2]),
    ],
)
def test_rows_join_turn_by_turn(runtime: Runtime, lengths: list[int], joined: list[int]) -> None:
    scheduler, events = Scheduler(runtime, max_rows=8, prefill_chunk=CHUNK), list[list[Event]]()
    submitted(scheduler, lengths, events)
    for expected in joined:
        scheduler.worker.turn()
        assert sum(bool(heard) for heard in events) == expected
    scheduler.close(drain=False)


def test_all_that_share_a_turn_answer_as_alone(runtime: Runtime) -> None:
    answers = []
    for together in (True, False):
        scheduler, events = (
            Scheduler(runtime, max_rows=8, prefill_chunk=CHUNK if together else 7),
            list[list[Event]](),
        )
        submitted(scheduler, [7, 7, 7, 9, 40], events)
        for _ in range(40):
            scheduler.worker.turn()
        finished = [heard[-1] for heard in events]
        answers.append(
            [event.completion.token_ids for event in finished if isinstance(event, FinishedEvent)]
        )
        scheduler.close(drain=False)
    assert len(answers[0]) == 5 and answers[0] == answers[1]
