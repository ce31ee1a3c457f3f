"""Requests, cancellations and adapters that come and go, all at once: no answer is another
adapter's.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runtime_helpers import decoder_bundle, engines_here, peft_adapter

from edgetune.core.errors import AdapterError
from edgetune.runtime import Runtime
from edgetune.runtime.scheduler.requests import (
    Event,
    FinishedEvent,
    GenerationRequest,
    QueueFull,
    TokenEvent,
)
from edgetune.runtime.scheduler.scheduler import Scheduler
from edgetune.runtime.tasks.answers import Completion

RANKS = {"m0": 1, "m1": 2, "m2": 4, "m3": 8}
PROMPTS = [[5, 6, 7], list(range(10, 80)), [300] * 40, [*range(10, 50), 9]]
STEPS = 6


@pytest.fixture(scope="module")
def many(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("churn")
    for seed, (name, rank) in enumerate(RANKS.items()):
        peft_adapter(
            tiny_decoder, folder / name, seed=seed, r=rank, target_modules=["q_proj", "down_proj"]
        )
    return folder


@pytest.fixture(scope="module")
def runtime(tiny_decoder: Path, many: Path) -> Iterator[Runtime]:
    bundle = decoder_bundle(tiny_decoder)
    engine = engines_here()[-1]
    memory = 0.015 if engine == "native" else 0.03
    with Runtime.open(
        bundle, threads=1, adapter_folder=many, adapter_memory_mb=memory, engine=engine
    ) as opened:
        yield opened


class Client:
    """Sends requests one after the other and compares each answer with its adapter's own."""

    def __init__(
        self, scheduler: Scheduler, expected: dict[Any, tuple[int, ...]], seed: int
    ) -> None:
        self.scheduler, self.expected, self.rng = scheduler, expected, random.Random(seed)
        self.compared, self.wrong, self.unknown = 0, 0, 0

    def __call__(self) -> None:
        for _ in range(40):
            prompt, name = self.rng.randrange(len(PROMPTS)), self.rng.choice([*RANKS, "hot", None])
            try:
                done = self.ask(PROMPTS[prompt], name, vanish=self.rng.random() < 0.2)
            except AdapterError:
                self.unknown += 1
                continue
            except QueueFull:
                continue
            if done.finish_reason != "cancelled":
                self.compared += 1
                key = (prompt, "m0" if name == "hot" else name)
                self.wrong += done.token_ids != self.expected[key]

    def ask(self, ids: list[int], name: str | None, *, vanish: bool) -> Completion:
        settings = self.scheduler.runtime.settings(None, max_new_tokens=STEPS)
        ended, last = threading.Event(), []

        def on_event(event: Event) -> None:
            if not isinstance(event, TokenEvent):
                last.append(event)
                ended.set()

        ticket = self.scheduler.submit(GenerationRequest(ids, name, settings), on_event)
        if vanish:
            ticket.cancel()
        assert ended.wait(60)
        assert isinstance(last[0], FinishedEvent), last[0]
        return last[0].completion


def test_no_answer_is_another_adapters_while_adapters_come_and_go(
    runtime: Runtime, many: Path
) -> None:
    expected = {
        (p, name): runtime_answer(runtime, ids, name)
        for p, ids in enumerate(PROMPTS)
        for name in (*RANKS, None)
    }
    assert len({expected[0, name] for name in (*RANKS, None)}) > 3  # the adapters do differ
    with Scheduler(
        runtime, max_rows=5, max_queue=8, cache_mb=0.4, prefill_chunk=32, lookup=2
    ) as scheduler:
        clients = [Client(scheduler, expected, seed) for seed in range(6)]
        threads = [threading.Thread(target=client) for client in clients]
        for thread in threads:
            thread.start()
        for turn in range(40):
            runtime.load_adapter("hot", many / "m0")
            runtime.unload_adapter("hot", in_use=("wait", "forget")[turn % 2])
        for thread in threads:
            thread.join()
        stats = scheduler.stats()
    assert sum(client.compared for client in clients) > 60
    assert sum(client.wrong for client in clients) == 0
    assert (stats.running, stats.waiting, scheduler.stats().cache_slots_used) == (0, 0, 0)
    assert stats.adapter_evictions_total > 0
    assert all(status.users == 0 for status in runtime.registry.statuses())


def runtime_answer(runtime: Runtime, ids: list[int], name: str | None) -> tuple[int, ...]:
    state, logits = runtime.decoder.start([ids], [runtime.bound(name)], capacity=len(ids) + STEPS)  # type: ignore[union-attr]
    tokens: list[int] = []
    while len(tokens) < STEPS and not (tokens and tokens[-1] in runtime.tokenizer.eos_token_ids):
        tokens.append(int(logits[0].argmax()))
        logits = state.step(tokens[-1:])
    return tuple(tokens)
