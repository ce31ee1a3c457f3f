"""Encoder-decoders behind the scheduler and over HTTP: rows join, step together and leave, and
answer as they would alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_helpers import export, make_adapter
from runtime_helpers import Listener, alone, request
from seq2seq_helpers import make_seq2seq
from server_helpers import Running, serve

from edgetune.core.errors import InputError
from edgetune.runtime import Runtime
from edgetune.runtime.scheduler.scheduler import Scheduler

TEXTS = [
    "Turn on the lights",
    "My card",
    "The quick brown fox jumps over the lazy dog.",
    "a",
    "please, the kitchen",
    "What should I do?",
]
ADAPTERS = ["a", None, "b", "a", "b", None]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: Any) -> Path:
    """Two adapters of different rank on one base."""
    folder = tmp_path_factory.mktemp("served")
    base = make_seq2seq("flan-t5", folder / "base")
    adapters = [
        make_adapter(base, folder / name, seed=i, rank=rank)
        for i, (name, rank) in enumerate((("a", 4), ("b", 2)))
    ]
    export(folder / "bundle", *adapters)
    return folder / "bundle"


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> Iterator[Runtime]:
    with Runtime.open(bundle, threads=1) as opened:
        yield opened


def test_rows_that_join_and_leave_at_any_time_answer_as_they_would_alone(runtime: Runtime) -> None:
    prompts = [runtime.tokenizer.encode(text) for text in TEXTS]
    steps = [3, 17, 9, 1, 24, 12]
    with Scheduler(runtime, max_rows=3) as scheduler:
        listeners = [Listener() for _ in prompts]
        for listener, ids, adapter, count in zip(listeners, prompts, ADAPTERS, steps, strict=True):
            scheduler.submit(request(runtime, ids, adapter, max_new_tokens=count), listener)
        found = [listener.done() for listener in listeners]
    for completion, ids, adapter, count in zip(found, prompts, ADAPTERS, steps, strict=True):
        assert list(completion.token_ids) == alone(runtime, ids, adapter, count)
        assert completion.prompt_tokens == len(ids)


def test_many_callers_at_once_get_their_own_answers(runtime: Runtime) -> None:
    numbers = np.random.default_rng(3)
    jobs = [(i, ADAPTERS[i % 6], int(numbers.integers(1, 20))) for i in range(24)]
    found: dict[int, list[int]] = {}
    with Scheduler(runtime, max_rows=4) as scheduler:

        def ask(i: int, adapter: str | None, count: int) -> None:
            listener = Listener()
            scheduler.submit(
                request(
                    runtime, runtime.tokenizer.encode(TEXTS[i % 5]), adapter, max_new_tokens=count
                ),
                listener,
            )
            found[i] = list(listener.done().token_ids)

        threads = [threading.Thread(target=ask, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert scheduler.stats().cache_bytes == 0
    for i, adapter, count in jobs:
        assert found[i] == alone(runtime, runtime.tokenizer.encode(TEXTS[i % 5]), adapter, count)


def test_a_row_that_is_called_off_leaves_the_others_alone(runtime: Runtime) -> None:
    ids = runtime.tokenizer.encode(TEXTS[2])
    with Scheduler(runtime, max_rows=2) as scheduler:
        first, second = Listener(), Listener()
        ticket = scheduler.submit(
            request(runtime, ids, "a", max_new_tokens=2000, logit_bias=((1, -100.0),)), first
        )
        scheduler.submit(request(runtime, ids, "b", max_new_tokens=20), second)
        first.events.get(timeout=120)
        ticket.cancel()
        assert first.done().finish_reason == "cancelled"
        assert list(second.done().token_ids) == alone(runtime, ids, "b", 20)


def test_memory_bounds_prompt_and_answer_together_and_nobody_starves(runtime: Runtime) -> None:
    token_mb = 2 * 3 * 4 * 16 * 4 / 1e6
    with Scheduler(runtime, max_rows=4, cache_mb=400 * token_mb) as scheduler:
        assert scheduler.context == 150  # three quarters of 400 tokens, half of them for a prompt
        with pytest.raises(InputError, match="at most 149 tokens"):
            scheduler.submit(request(runtime, [5] * 150, None), Listener())
        listeners = [Listener() for _ in range(3)]
        for listener in listeners:
            scheduler.submit(
                request(
                    runtime, [5] * 148 + [1], None, max_new_tokens=500, logit_bias=((1, -100.0),)
                ),
                listener,
            )
        assert [len(listener.done().token_ids) for listener in listeners] == [149] * 3


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Running]:
    with serve(bundle) as running:
        yield running


def test_completions_over_http_are_the_runtimes(server: Running) -> None:
    client = server.client()
    for text, adapter in zip(TEXTS, ADAPTERS, strict=True):
        got = client.completions.create(
            model=adapter or "tiny", prompt=text, max_tokens=9, temperature=0
        )
        expected = server.runtime.generate([text], adapter=adapter, max_new_tokens=9)[0]
        assert (
            got.choices[0].text == expected.text
            and got.usage.prompt_tokens == expected.prompt_tokens
        )  # type: ignore[union-attr]


def test_a_completion_is_streamed(server: Running) -> None:
    pieces = server.client().completions.create(
        model="a", prompt=TEXTS[0], max_tokens=9, temperature=0, stream=True
    )
    assert (
        "".join(piece.choices[0].text for piece in pieces)
        == server.runtime.generate(TEXTS[:1], adapter="a", max_new_tokens=9)[0].text
    )


def test_a_conversation_needs_a_chat_template(server: Running) -> None:
    answer = server.post(
        "/v1/chat/completions", {"model": "a", "messages": [{"role": "user", "content": "hello"}]}
    )
    assert answer.status_code == 400 and "chat template" in answer.json()["error"]["message"]
