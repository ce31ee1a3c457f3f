"""Guessing from the prompt changes how many steps an answer takes, never the answer."""

from __future__ import annotations

import json
import queue
import random
from pathlib import Path
from typing import Any

import pytest
from runtime_helpers import decoder_bundle, engines_here

from edgetune.runtime import Runtime
from edgetune.runtime.generation.prompt_lookup import PAUSE, PromptLookup
from edgetune.runtime.generation.sampling import TokenSequence
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


def test_guesses_beside_other_rows_and_forced_tokens_change_no_answer(
    tiny_decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    shape = {"type": "object", "properties": {"name": {"enum": ["lights", "doors"]}, "n": {}}}
    schema = json.dumps({**shape, "required": ["name", "n"], "additionalProperties": False})
    bundle, engine = decoder_bundle(tiny_decoder), engines_here()[-1]
    with Runtime.open(bundle, threads=2, engine=engine) as runtime:
        requests = []
        for i in range(12):
            name = rng.choice(["a", "b", None])
            ids = [rng.randrange(3, 352) for _ in range(5)] * 4
            form = {"schema": schema, "temperature": rng.choice([0.0, 1.0]), "seed": i}
            settings = runtime.settings(name, max_new_tokens=40, **(form if i % 2 else {}))
            requests.append(GenerationRequest(ids, name, settings))
        found = []
        for rows, lookup in ((4, 3), (1, 0)):
            if not lookup:  # and nothing that a form forces
                monkeypatch.setattr(TokenSequence, "forced", lambda self: [])
            done: list[queue.Queue[Any]] = [queue.Queue() for _ in requests]
            with Scheduler(runtime, max_rows=rows, lookup=lookup) as scheduler:
                for asked, listener in zip(requests, done, strict=True):
                    scheduler.submit(asked, listener.put)
                completions = []
                for listener in done:
                    while not isinstance(event := listener.get(timeout=120), FinishedEvent):
                        pass
                    completions.append(event.completion)
                found.append(([c.token_ids for c in completions], scheduler.stats()))
    (guessed, stats), (plain, slow) = found
    assert slow.guessed_tokens_total == 0
    assert guessed == plain
    assert stats.right_guesses_total > 20  # '{"name":"' and the like, in one step each
