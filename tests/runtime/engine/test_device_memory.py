"""A cache in a device's memory answers as one in arrays: here on the processor's memory, by the
very ways a GPU's goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from runtime_helpers import decoder_bundle

from edgetune.runtime import Runtime
from edgetune.runtime.engine.device_memory import DeviceBlock, DeviceKVCache, Place, view
from edgetune.runtime.engine.kv_cache import DeviceArena
from edgetune.runtime.scheduler.requests import Event, FinishedEvent, GenerationRequest
from edgetune.runtime.scheduler.scheduler import Scheduler

PLACE = Place("cpu")
PROMPTS = ["hello", "a longer prompt than the others are", "x", "what is this?", "no"]
ADAPTERS = ["a", "b", None, "a", "b"]


@contextmanager
def opened(bundle: Path, place: Place | None) -> Iterator[Runtime]:
    """A runtime whose session wants its cache there."""
    with Runtime.open(bundle, threads=1, engine="onnxruntime") as runtime:
        assert runtime.decoder is not None
        assert runtime.decoder.place is None
        runtime.decoder.place, runtime.decoder.rebinds = place, place is not None
        yield runtime


def test_a_view_is_rows_of_the_same_memory_and_keeps_it_alive() -> None:
    whole = PLACE.new((4, 2, 3))
    whole.update_inplace(np.arange(24, dtype=np.float32).reshape(4, 2, 3))
    part = view(whole, 1, 2)
    assert part.shape() == [2, 2, 3]
    part.update_inplace(np.zeros((2, 2, 3), np.float32))
    np.testing.assert_array_equal(whole.numpy()[:, 0, 0], [0, 0, 0, 18])
    del whole
    assert part.numpy().sum() == 0
    assert view(view(part, 1, 1), 0, 1).shape() == [1, 2, 3]
    with pytest.raises(IndexError, match="rows 1 to 3 of 2"):
        view(part, 1, 2)


def test_a_slot_is_copied_in_every_layer_and_in_half_precision_too() -> None:
    for dtype in (np.float32, np.float16):
        block = DeviceBlock(Place("cpu", dtype=dtype), (3, 4, 2, 5, 2))
        for i, side in enumerate(block.views(0, 4)):
            side.update_inplace(
                np.full((4, 2, 5, 2), i, dtype) + np.arange(4, dtype=dtype)[:, None, None, None]
            )
        block.copy(3, 1)
        assert (block.dtype, block.itemsize) == (
            np.dtype(dtype),
            np.dtype(dtype).itemsize,
        )  # what sizes shared prefixes and metrics
        assert [side.numpy()[:, 0, 0, 0].tolist() for side in block.views(0, 4)] == [
            [i, i + 3, i + 2, i + 3] for i in range(3)
        ]


def test_generate_gives_the_same_tokens_while_rows_leave(tiny_decoder: Path) -> None:
    bundle, found = decoder_bundle(tiny_decoder), []
    for place in (None, PLACE):
        with opened(bundle, place) as runtime:
            done = runtime.generate(
                PROMPTS, adapters=ADAPTERS, max_new_tokens=12, stop=[" ", "e"], logprobs=0
            )
            found.append([(c.token_ids, c.finish_reason) for c in done])
    assert found[0] == found[1]
    assert len({len(tokens) for tokens, _ in found[0]}) > 1  # they do leave at different times


def test_a_repeated_prompt_goes_on_from_the_copied_cache(tiny_decoder: Path) -> None:
    with opened(decoder_bundle(tiny_decoder), PLACE) as runtime:
        assert runtime.decoder is not None
        state, first = runtime.decoder.start([[5, 6, 7], [8, 9]], [runtime.bound("a"), None])
        assert isinstance(state.cache, DeviceKVCache)
        four, alone = state.repeat(2), state.step([11, 12]).copy()
        again = four.step([11, 11, 12, 12])
    np.testing.assert_allclose(again, np.repeat(alone, 2, axis=0), atol=1e-5)
    assert first.shape == (2, runtime.manifest.graph.vocab_size)


def test_the_scheduler_gives_the_same_tokens_while_rows_join_and_leave(tiny_decoder: Path) -> None:
    bundle, found = decoder_bundle(tiny_decoder), []
    for place in (None, PLACE):
        with (
            opened(bundle, place) as runtime,
            Scheduler(runtime, max_rows=3, prefill_chunk=4) as scheduler,
        ):
            assert scheduler.worker.loop is not None
            assert isinstance(scheduler.worker.loop.batch.arena, DeviceArena) == (place is not None)
            found.append(answers(runtime, scheduler))
    assert found[0] == found[1]


def answers(runtime: Runtime, scheduler: Scheduler) -> list[tuple[int, ...]]:
    """Tokens of every prompt, of different lengths."""
    events: dict[int, list[Event]] = {i: [] for i in range(len(PROMPTS))}
    tickets = []
    for i, (prompt, name) in enumerate(zip(PROMPTS, ADAPTERS, strict=True)):
        request = GenerationRequest(
            runtime.prompt_ids(prompt, name), name, runtime.settings(name, max_new_tokens=4 + 3 * i)
        )
        tickets.append(scheduler.submit(request, events[i].append))
    for ticket in tickets:
        assert ticket.wait(30)
    return [
        last.completion.token_ids
        for (*_, last) in events.values()
        if isinstance(last, FinishedEvent)
    ]


def test_a_device_arena_stays_within_its_budget(tiny_decoder: Path) -> None:
    with Runtime.open(decoder_bundle(tiny_decoder), threads=1) as runtime:
        arena = DeviceArena(PLACE, runtime.manifest.graph, slots=4, capacity=256, budget=400)
    assert (arena.capacity, arena.memory.shape[1]) == (100, 4)
    assert not arena.shares_prefixes
    assert all(isinstance(side, onnxruntime.OrtValue) for side in arena.memory.views(1, 2))
