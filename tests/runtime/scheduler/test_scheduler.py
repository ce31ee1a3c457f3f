"""Requests that share the engine get the answers they would get alone, in time, and exactly one
last event.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from head_helpers import bundle as head_bundle
from runtime_helpers import (
    Listener,
    alone,
    decoder_bundle,
    encoder_bundle,
    merged_bundle,
    request,
)

from edgetune.core.errors import AdapterError, InputError
from edgetune.runtime import Runtime
from edgetune.runtime.engine.kv_cache import BLOCK
from edgetune.runtime.scheduler.requests import (
    Event,
    GenerationRequest,
    QueueFull,
    SchedulerClosed,
)
from edgetune.runtime.scheduler.scheduler import Scheduler


@pytest.fixture(scope="module")
def classifier(tiny_encoder: Path) -> Iterator[Runtime]:
    with Runtime.open(encoder_bundle(tiny_encoder), threads=1) as opened:
        yield opened


def random_ids(rng: random.Random, longest: int = 60) -> list[int]:
    return [rng.randrange(3, 352) for _ in range(rng.randrange(1, longest))]


def test_requests_from_many_threads_get_the_answers_they_would_get_alone(runtime: Runtime) -> None:
    rng = random.Random(0)
    cases = [
        (random_ids(rng), rng.choice(["a", "b", None]), rng.randrange(1, 9)) for _ in range(40)
    ]
    listeners = [Listener() for _ in cases]
    with Scheduler(runtime, max_rows=5, prefill_chunk=16) as scheduler:

        def submit(part: int) -> None:
            for case, listener in list(zip(cases, listeners, strict=True))[part::4]:
                ids, adapter, steps = case
                scheduler.submit(request(runtime, ids, adapter, max_new_tokens=steps), listener)

        threads = [threading.Thread(target=submit, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        done = [listener.done() for listener in listeners]
        for thread in threads:
            thread.join()
        stats = scheduler.stats()
    for (ids, adapter, steps), listener, completion in zip(cases, listeners, done, strict=True):
        assert list(completion.token_ids) == alone(runtime, ids, adapter, steps)
        assert "".join(event.text for event in listener.tokens) == completion.text
    assert (stats.running, stats.waiting, stats.cache_slots_used) == (0, 0, 0)
    assert sum(stats.requests_total.values()) == 40
    assert stats.tokens_generated_total == sum(c.completion_tokens for c in done)
    assert stats.prompt_tokens_total == sum(len(ids) for ids, _, _ in cases)
    assert sum(counts.requests for counts in stats.adapters.values()) == 40


def test_a_shared_beginning_is_computed_once(runtime: Runtime) -> None:
    rng = random.Random(1)
    system = [rng.randrange(3, 352) for _ in range(2 * BLOCK + 5)]
    with Scheduler(runtime) as scheduler:
        for adapter, tail, cached in [
            ("a", 3, 0),
            ("a", 2, 2),
            ("b", 3, 0),
            ("a", 1, 2),
            (None, 1, 0),
        ]:
            ids = [*system, *([7] * tail)]
            scheduler.submit(
                request(runtime, ids, adapter, max_new_tokens=5), listener := Listener()
            )
            completion = listener.done()
            assert completion.cached_tokens == cached * BLOCK
            assert list(completion.token_ids) == alone(runtime, ids, adapter, 5)
        assert scheduler.stats().prefix_hit_tokens_total == 4 * BLOCK


def test_a_conversation_goes_on_from_the_answer_before(runtime: Runtime) -> None:
    ids = [(i * 7) % 300 + 3 for i in range(40)]
    with Scheduler(runtime) as scheduler:
        scheduler.submit(request(runtime, ids, max_new_tokens=30), listener := Listener())
        first = listener.done()
        longer = [*ids, *first.token_ids, 5, 6]
        scheduler.submit(request(runtime, longer, max_new_tokens=4), listener := Listener())
        second = listener.done()
    assert second.cached_tokens == (40 + first.completion_tokens - 1) // BLOCK * BLOCK
    assert list(second.token_ids) == alone(runtime, longer, None, 4)


def test_a_new_adapter_under_an_old_name_does_not_find_the_old_ones_prefix(
    runtime: Runtime, tiny_decoder: Path
) -> None:
    folder = decoder_bundle(tiny_decoder) / "adapters"
    ids = [(i * 5) % 300 + 3 for i in range(70)]
    with Scheduler(runtime) as scheduler:
        for source in ("a", "b"):
            runtime.load_adapter("x", folder / source)
            scheduler.submit(request(runtime, ids, "x", max_new_tokens=4), listener := Listener())
            completion = listener.done()
            runtime.unload_adapter("x", in_use="wait", timeout_s=30)
            assert completion.cached_tokens == 0
            assert list(completion.token_ids) == alone(runtime, ids, source, 4)


def test_memory_bounds_how_many_run_and_nobody_is_lost(runtime: Runtime) -> None:
    rng = random.Random(2)
    cases = [(random_ids(rng, 100), rng.choice(["a", None])) for _ in range(12)]
    assert runtime.decoder is not None
    token_bytes = runtime.decoder.new_batch(rows=1).arena.token_bytes
    memory = 195 * token_bytes / 1e6  # 146 tokens, and a quarter for shared prefixes
    with Scheduler(runtime, max_rows=8, cache_mb=memory) as scheduler:
        assert 64 <= scheduler.context < 256
        listeners = [Listener() for _ in cases]
        for (ids, adapter), listener in zip(cases, listeners, strict=True):
            scheduler.submit(request(runtime, ids, adapter, max_new_tokens=9), listener)
        for (ids, adapter), listener in zip(cases, listeners, strict=True):
            assert list(listener.done().token_ids) == alone(runtime, ids, adapter, 9)
        with pytest.raises(
            InputError, match=r"longer than the context \(expected at most 14[56] tokens"
        ):
            scheduler.submit(request(runtime, [5] * 200), print)


def test_a_cancelled_request_frees_its_row_and_says_so(runtime: Runtime) -> None:
    with Scheduler(runtime, max_rows=1) as scheduler:
        listener, seen = Listener(), threading.Event()

        def on_event(event: Event) -> None:
            seen.set()
            listener(event)

        ticket = scheduler.submit(
            request(runtime, [5], max_new_tokens=200, logit_bias={2: -100}), on_event
        )
        scheduler.submit(request(runtime, [6], max_new_tokens=2), second := Listener())
        assert seen.wait(30)
        ticket.cancel()
        completion = listener.done()
        assert second.done().completion_tokens == 2
    assert completion.finish_reason == "cancelled"
    assert 1 <= completion.completion_tokens < 200
    assert completion.text == "".join(event.text for event in listener.tokens)
    assert ticket.wait(0)


def test_a_deadline_ends_a_request_wherever_it_is(runtime: Runtime) -> None:
    with Scheduler(runtime, max_rows=1) as scheduler:
        deadline, running, waiting = time.monotonic() + 0.3, Listener(), Listener()

        def slow(event: Event) -> None:
            running(event)
            time.sleep(max(0.0, deadline - time.monotonic()))

        settings: dict[str, Any] = {"max_new_tokens": 250, "logit_bias": {2: -100}}
        scheduler.submit(request(runtime, [5], deadline=deadline, **settings), slow)
        scheduler.submit(request(runtime, [5], deadline=deadline, **settings), waiting)
        first, late = running.done(), waiting.done()
    assert first.finish_reason == "deadline"
    assert first.completion_tokens <= 1  # 0 on a machine so busy that it began too late
    assert (late.finish_reason, late.completion_tokens, late.text) == ("deadline", 0, "")


def test_a_full_queue_refuses_and_a_closed_one_too(runtime: Runtime) -> None:
    scheduler = Scheduler(runtime, max_queue=2)
    listeners = [Listener(), Listener()]
    for listener in listeners:
        scheduler.submit(request(runtime, [5], max_new_tokens=2), listener)
    with pytest.raises(
        QueueFull, match=r"the queue is full \(expected at most 2 waiting, got one more\)"
    ) as full:
        scheduler.submit(request(runtime, [5]), print)
    assert full.value.retry_after_s >= 1
    assert scheduler.stats().requests_total == {"refused": 1}
    scheduler.start()
    scheduler.close(drain=True)
    assert [listener.done().completion_tokens for listener in listeners] == [2, 2]
    with pytest.raises(SchedulerClosed):
        scheduler.submit(request(runtime, [5]), print)


def test_closing_without_drain_cancels_what_runs_and_waits(runtime: Runtime) -> None:
    scheduler = Scheduler(runtime, max_rows=1).start()
    listeners = [Listener(), Listener()]
    for listener in listeners:
        scheduler.submit(request(runtime, [5], max_new_tokens=250, logit_bias={2: -100}), listener)
    scheduler.close(drain=False)
    assert [listener.done().finish_reason for listener in listeners] == ["cancelled", "cancelled"]


def test_closing_before_the_start_tells_those_who_wait(runtime: Runtime) -> None:
    scheduler = Scheduler(runtime)
    scheduler.submit(request(runtime, [5]), listener := Listener())
    scheduler.close(drain=True)
    assert listener.done().finish_reason == "cancelled"


def test_an_adapter_in_use_is_held_until_the_last_event(runtime: Runtime) -> None:
    scheduler = Scheduler(runtime)
    scheduler.submit(request(runtime, [5], "a", max_new_tokens=2), listener := Listener())
    with pytest.raises(AdapterError, match="'a' is in use"):
        runtime.unload_adapter("a", in_use="refuse")
    with scheduler:
        listener.done()
    assert [status.users for status in runtime.registry.statuses()] == [0, 0]


def test_a_listener_that_fails_ends_only_its_own_request(runtime: Runtime, caplog: Any) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("the client went away")

    with Scheduler(runtime) as scheduler:
        ticket = scheduler.submit(
            request(runtime, [5], max_new_tokens=200, logit_bias={2: -100}), broken
        )
        scheduler.submit(request(runtime, [6], max_new_tokens=3), listener := Listener())
        assert listener.done().completion_tokens == 3
        assert ticket.wait(30)
    assert "a listener of request" in caplog.text


@pytest.mark.parametrize("prompt", [[], [999], [5] * 256])
def test_a_prompt_that_cannot_be_run_is_refused_at_once(
    runtime: Runtime, prompt: list[int]
) -> None:
    with pytest.raises(InputError):
        Scheduler(runtime).submit(request(runtime, prompt), print)


def test_the_same_seed_gives_the_same_answer_beside_other_rows_and_choices_differ(
    runtime: Runtime,
) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 4}
    expected = runtime.generate(["hello"], **settings)[0].text
    with Scheduler(runtime) as scheduler:
        listeners = [Listener() for _ in range(3)]
        for i, listener in enumerate(listeners):
            ids = runtime.prompt_ids("hello")
            scheduler.submit(request(runtime, ids, choice=i % 2, **settings), listener)
        texts = [listener.done().text for listener in listeners]
    assert texts[0] == texts[2] == expected
    assert texts[1] != expected


def test_a_merged_bundle_answers_with_the_adapter_it_holds(
    runtime: Runtime, tiny_decoder: Path
) -> None:
    ids = runtime.prompt_ids("hello there", "a")
    with (
        Runtime.open(merged_bundle(tiny_decoder), threads=1) as merged,
        Scheduler(merged) as scheduler,
    ):
        listeners = [Listener(), Listener()]
        for name, listener in zip((None, "a"), listeners, strict=True):
            scheduler.submit(request(merged, ids, name, max_new_tokens=6), listener)
        for listener in listeners:
            assert list(listener.done().token_ids) == alone(runtime, ids, "a", 6)


def test_a_request_that_cannot_begin_fails_alone(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Scheduler(runtime, max_rows=1) as scheduler:
        assert scheduler.worker.loop is not None
        batch = scheduler.worker.loop.batch
        begun, arena = batch.begun, batch.arena
        problems = [RuntimeError("no memory on the device")]

        def failing(row: Any) -> None:
            if problems:
                raise problems.pop()
            begun(row)

        monkeypatch.setattr(batch, "begun", failing)
        listeners = [Listener(), Listener()]
        for listener in listeners:
            scheduler.submit(request(runtime, [5, 6, 7], "a", max_new_tokens=3), listener)
        with pytest.raises(RuntimeError, match="no memory on the device"):
            listeners[0].done()
        assert list(listeners[1].done().token_ids) == alone(runtime, [5, 6, 7], "a", 3)
        monkeypatch.setattr(scheduler.worker.loop.batch, "restore", lambda *a: 1 / 0)
        scheduler.submit(request(runtime, [5, 6, 7], "a", max_new_tokens=3), listener := Listener())
        with pytest.raises(ZeroDivisionError):
            listener.done()
        assert (
            arena.reserved,
            scheduler.worker.loop.batch.rows,
            scheduler.stats().requests_total["failed"],
        ) == (0, 0, 2)


def test_a_shorter_context_is_kept(runtime: Runtime) -> None:
    with Scheduler(runtime, max_context=20) as scheduler:
        scheduler.submit(
            request(runtime, [5] * 15, max_new_tokens=50, logit_bias={2: -100}),
            listener := Listener(),
        )
        completion = listener.done()
        with pytest.raises(InputError, match="expected at most 19 tokens"):
            scheduler.submit(request(runtime, [5] * 20), print)
    assert (completion.completion_tokens, completion.finish_reason) == (5, "length")


@pytest.mark.parametrize("name", ["max_rows", "max_queue", "prefill_chunk", "max_context"])
def test_settings_out_of_range_are_named(runtime: Runtime, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is out of range"):
        Scheduler(runtime, **{name: 0})  # type: ignore[arg-type]


TEXTS = ["where is my card", "lights", "the quick brown fox", "hello there, turn it on please"]


def test_texts_of_many_callers_share_batches(classifier: Runtime) -> None:
    scheduler = Scheduler(classifier)
    asked = [(text, name) for name in ("intent", "mood") for text in TEXTS]
    futures = [scheduler.classify([text, text], name) for text, name in asked]
    embedded = scheduler.embed(TEXTS)
    runs = []
    run, classifier.encoder.run = (
        classifier.encoder.run,
        lambda *a, **k: runs.append(len(a[0])) or run(*a, **k),
    )  # type: ignore[union-attr, method-assign, func-returns-value]
    try:
        with scheduler:
            for (text, name), future in zip(asked, futures, strict=True):
                expected = classifier.classify([text], name)[0]
                for got in future.result(60):
                    assert got.label == expected.label
                    assert got.scores == pytest.approx(expected.scores, abs=1e-5)
            np.testing.assert_allclose(embedded.result(60), classifier.embed(TEXTS), atol=1e-5)
    finally:
        classifier.encoder.run = run  # type: ignore[union-attr, method-assign]
    assert runs[0] == 2 * 8 + 4
    assert scheduler.stats().encoded_rows_total == 20


def test_a_text_that_fails_its_batch_fails_its_caller_only(classifier: Runtime) -> None:
    scheduler = Scheduler(classifier)
    fine = scheduler.embed(TEXTS, "mood")
    failed = scheduler.embed(["lights", "lamp"], "intent")
    also = scheduler.embed(["lights"] * 40, "intent")  # more than one batch
    run, lamp = classifier.encoder.run, classifier.text_ids("lamp", "intent")  # type: ignore[union-attr]

    def fail_on_a_lamp(rows: Any, *arguments: Any, **options: Any) -> Any:
        if lamp in rows:
            raise ValueError("out of memory")
        return run(rows, *arguments, **options)

    classifier.encoder.run = fail_on_a_lamp  # type: ignore[union-attr, method-assign]
    try:
        with scheduler:
            with pytest.raises(ValueError, match="out of memory"):
                failed.result(60)
            assert fine.result(60).shape == (len(TEXTS), 64)
            assert also.result(60).shape == (40, 64)
    finally:
        classifier.encoder.run = run  # type: ignore[union-attr, method-assign]
    assert [status.users for status in classifier.registry.statuses()] == [0, 0]
    assert scheduler.stats().waiting == 0


def test_texts_of_a_caller_that_left_between_batches_are_dropped(classifier: Runtime) -> None:
    scheduler = Scheduler(classifier)
    left = scheduler.embed(["lights"] * 60, "intent")
    scheduler.worker.turn()
    assert len(scheduler.worker.texts) == 60 - 32
    assert left.cancel()
    scheduler.worker.turn()
    assert (len(scheduler.worker.texts), scheduler.stats().waiting) == (0, 0)
    assert [status.users for status in classifier.registry.statuses()] == [0, 0]


@pytest.mark.parametrize("shared", [False, True])
def test_labels_are_of_the_adapter_whose_logits_they_name(
    shared: bool, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = encoder_bundle(tiny_encoder)
    with Runtime.open(bundle, threads=1) as runtime, Scheduler(runtime) as scheduler:
        expected = {
            name: runtime.classify(TEXTS[:1], name)[0].scores for name in ("intent", "mood")
        }
        encoder = runtime.encoder
        assert encoder is not None
        owner, hook = (runtime, "text_ids") if shared else (encoder, "run")
        call = getattr(owner, hook)

        def replace_meanwhile(*arguments: Any, **options: Any) -> Any:
            runtime.registry.replace("intent", bundle / "adapters" / "mood")
            return call(*arguments, **options)

        monkeypatch.setattr(owner, hook, replace_meanwhile)
        asked = (
            scheduler.classify(TEXTS[:1], "intent").result(60)
            if shared
            else runtime.classify(TEXTS[:1], "intent")
        )
        assert asked[0].scores == pytest.approx(expected["mood" if shared else "intent"], abs=1e-5)


def test_encoding_errors_are_the_callers(classifier: Runtime) -> None:
    with Scheduler(classifier) as scheduler:
        with pytest.raises(InputError, match="no adapter is chosen"):
            scheduler.classify(["x"])
        with pytest.raises(InputError, match="longer than the model's positions"):
            scheduler.embed(["card " * 200])
        with pytest.raises(InputError, match="generates no text"):
            scheduler.submit(GenerationRequest([5], None, classifier.settings()), print)
        assert scheduler.embed([]).result(5).shape == (0, 64)


def test_words_are_tagged_beside_texts_of_other_heads(tiny_encoder: Path) -> None:
    rows: list[Any] = [["Turn", "on", "the", "lights"], "my card", []]
    with Runtime.open(head_bundle(tiny_encoder), threads=1) as runtime:
        scheduler = Scheduler(runtime)
        labels = scheduler.classify(TEXTS, "intent")
        tagged = [scheduler.tag(rows, name) for name in ("rooms", "parts")]
        with pytest.raises(InputError, match="'intent' tags no words"):
            scheduler.tag(rows, "intent")
        with scheduler:
            for name, future in zip(("rooms", "parts"), tagged, strict=True):
                for got, expected in zip(future.result(60), runtime.tag(rows, name), strict=True):
                    assert got.tags == expected.tags
                    scores = [word.score for word in expected.words]
                    assert [word.score for word in got.words] == pytest.approx(scores, abs=1e-5)
            expected_labels = [c.label for c in runtime.classify(TEXTS, "intent")]
            assert [c.label for c in labels.result(60)] == expected_labels
