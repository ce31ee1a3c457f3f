"""Guessing from the prompt changes how many steps an answer takes, never the answer."""

from __future__ import annotations

import queue
import random
from pathlib import Path
from typing import Any

from runtime_helpers import decoder_bundle

from edgetune.runtime import Runtime
from edgetune.runtime.generation.prompt_lookup import PAUSE, PromptLookup
from edgetune.runtime.scheduler.requests import FinishedEvent, GenerationRequest
from edgetune.runtime.scheduler.scheduler import Scheduler


def test_what_followed_the_last_three_tokens_is_the_guess() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 1, 2, 3])
    assert lookup.guess(2) == [4, 5]
    assert lookup.guess(9) == [4, 5, 1, 2, 3]
    lookup.add(9)
    assert lookup.guess(2) == []
    for token in (1, 2, 3):
        lookup.add(token)
    assert lookup.guess(1) == [9]


def test_wrong_guesses_make_it_pause() -> None:
    lookup = PromptLookup([7] * 5)
    assert lookup.guess(2) == [7]
    while lookup.guess(2):
        lookup.tell(guessed=2, right=0)
    for _ in range(PAUSE):
        assert lookup.guess(2) == []
        lookup.add(7)
    assert lookup.guess(2)


def answers(
    runtime: Runtime, cases: list[tuple[list[int], str | None]], **options: Any
) -> tuple[list[Any], Any]:
    done: queue.Queue[Any] = queue.Queue()
    found = []
    with Scheduler(runtime, max_rows=2, **options) as scheduler:
        for ids, adapter in cases:
            settings = runtime.settings(adapter, max_new_tokens=40)
            scheduler.submit(GenerationRequest(ids, adapter, settings), done.put)
            while not isinstance(event := done.get(timeout=120), FinishedEvent):
                pass
            found.append(event.completion)
        return found, scheduler.stats()


def test_answers_are_those_without_guessing_in_fewer_steps(tiny_decoder: Path) -> None:
    rng = random.Random(0)
    with Runtime.open(decoder_bundle(tiny_decoder), threads=1) as runtime:
        prompts = [[rng.randrange(3, 352) for _ in range(6)] * 4 for _ in range(12)]
        cases = [(ids, rng.choice(["a", "b", None])) for ids in prompts]
        # what a model says is repeated in the next prompt, as in extraction
        first, _ = answers(runtime, cases)
        cases = [
            ([*done.token_ids, *ids, *ids], name)
            for (ids, name), done in zip(cases, first, strict=True)
        ]
        plain, slow = answers(runtime, cases)
        guessed, fast = answers(runtime, cases, lookup=4)
    assert [c.token_ids for c in guessed] == [c.token_ids for c in plain]
    assert [c.finish_reason for c in guessed] == [c.finish_reason for c in plain]
    assert fast.right_guesses_total > 0
    assert fast.steps_total == slow.steps_total - fast.right_guesses_total
