"""Rows of any adapters that join and leave between steps get the tokens each would get alone."""

from __future__ import annotations

import mmap
import random
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_helpers import decoder_bundle, peft_adapter

from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.bundle.manifest import GraphInfo, read_manifest
from edgetune.runtime.engine import batch as row_bindings
from edgetune.runtime.engine.batch import Batch
from edgetune.runtime.engine.decoder import DecoderEngine
from edgetune.runtime.engine.interface import BatchRow
from edgetune.runtime.engine.kv_cache import CacheArena
from edgetune.runtime.engine.session import BoundTensors

STEPS = 6


@pytest.fixture(scope="module")
def adapters(
    tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str | None, BoundTensors | None]:
    """Two of the bundle (r 4, r 7 on some modules) and one of rank 1 on one module."""
    folder, small = decoder_bundle(tiny_decoder), tmp_path_factory.mktemp("small")
    peft_adapter(tiny_decoder, small, seed=5, r=1, target_modules=["o_proj"])
    folders = {"a": folder / "adapters" / "a", "b": folder / "adapters" / "b", "c": small}
    manifest = read_manifest(folder)
    return {None: None} | {
        n: BoundTensors(pack_adapter(f, manifest).tensors) for n, f in folders.items()
    }


def alone(decoder: DecoderEngine, prompt: list[int], adapter: Any) -> list[int]:
    state, logits = decoder.start([prompt], [adapter], capacity=64)
    tokens = []
    for _ in range(STEPS):
        tokens.append(int(logits[0].argmax()))
        logits = state.step(tokens[-1:])
    return tokens


class Mix:
    """Requests that are let into a batch at random steps, in pieces of random length, and leave
    when they are done.
    """

    def __init__(
        self, batch: Batch, rng: random.Random, requests: list[tuple[list[int], Any, int]]
    ) -> None:
        self.batch, self.rng, self.waiting = batch, rng, list(enumerate(requests))
        self.rows: dict[int, tuple[BatchRow, int]] = {}
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.filling: tuple[int, list[int], int] | None = None

    def run(self) -> list[list[int]]:
        while self.waiting or self.rows or self.filling:
            if self.rng.random() < 0.7:
                self.prefill()
            if self.rows:
                self.step()
        return self.tokens

    def prefill(self) -> None:
        if self.filling is None:
            if not self.waiting or not self.batch.has_room(64):
                return
            i, (prompt, adapter, steps) = self.waiting.pop(0)
            self.row = self.batch.begin(adapter, tokens=64)
            self.filling = i, prompt, steps
        i, prompt, steps = self.filling
        size = self.rng.choice([3, 16, 64])
        logits = self.batch.prefill(prompt[:size])
        self.filling = i, prompt[size:], steps
        if not prompt[size:]:
            self.filling = None
            self.batch.join()
            self.rows[i] = self.row, steps
            self.take(i, logits)

    def step(self) -> None:
        order = sorted(self.rows, key=lambda i: self.rows[i][0].slot)
        logits = self.batch.step([self.tokens[i][-1] for i in order]).copy()
        for i, row in zip(order, logits, strict=True):
            self.take(i, row)

    def take(self, i: int, logits: Any) -> None:
        self.tokens[i].append(int(logits.argmax()))
        row, steps = self.rows[i]
        if len(self.tokens[i]) == steps:
            del self.rows[i]
            self.batch.leave(row)


def test_200_random_mixes_give_each_rows_own_tokens(
    decoder: DecoderEngine, adapters: dict[str | None, Any]
) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 352) for _ in range(rng.randrange(1, 30))] for _ in range(24)]
    expected = {
        (p, name): alone(decoder, prompts[p], adapters[name])
        for p in range(24)
        for name in adapters
    }
    batch = Batch(decoder, rows=4, budget=4 * 64)
    for mix in range(200):
        names = rng.choices(list(adapters), k=rng.randrange(2, 7))
        chosen = [(rng.randrange(24), name, rng.randrange(1, STEPS + 1)) for name in names]
        requests = [(prompts[p], adapters[name], steps) for p, name, steps in chosen]
        got = Mix(batch, rng, requests).run()
        assert got == [expected[p, name][:steps] for p, name, steps in chosen], (
            f"mix {mix}: {chosen}"
        )
        assert batch.rows == batch.arena.reserved == 0


def test_rows_of_one_adapter_bind_its_own_tensors(
    decoder: DecoderEngine, adapters: dict[str | None, Any]
) -> None:
    batch = Batch(decoder, rows=2, budget=128)
    for _ in range(2):
        batch.begin(adapters["a"], tokens=64)
        batch.prefill([5, 6, 7])
        batch.join()
    logits = batch.step([9, 9])
    np.testing.assert_array_equal(logits[0], logits[1])
    assert batch._adapters.nbytes == 0


def first_step(batch: Batch, adapter: Any) -> tuple[int, np.ndarray]:
    """A request of one step, and which binding ran it."""
    row = batch.begin(adapter, tokens=8)
    batch.prefill([5, 6, 7])
    batch.join()
    logits = batch.step([9])[0].copy()
    binding = id(batch._step)
    batch.leave(row)
    return binding, logits


def test_an_adapter_that_comes_back_finds_its_binding(
    decoder: DecoderEngine, adapters: dict[str | None, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(decoder, rows=2, budget=128)
    first = {name: first_step(batch, adapter) for name, adapter in adapters.items()}
    bind = list[Any]()
    monkeypatch.setattr(decoder, "bind_adapters", lambda *a: bind.append(a))
    for name, adapter in reversed(adapters.items()):
        binding, logits = first_step(batch, adapter)
        assert binding == first[name][0]
        np.testing.assert_array_equal(logits, first[name][1])
    assert not bind


def test_bindings_of_unloaded_adapters_go_and_others_are_bounded(
    decoder: DecoderEngine, adapters: dict[str | None, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, tensors = Batch(decoder, rows=2, budget=128), adapters["a"].tensors
    _, expected = first_step(batch, adapters["a"])
    for scale in (1, 0, 1, 0, 1):  # new tensors may lie where the old ones lay, and have their id
        _, logits = first_step(
            batch, BoundTensors({name: scale * array for name, array in tensors.items()})
        )
        assert np.array_equal(logits, expected) == bool(scale)
    gone = BoundTensors(tensors)
    first_step(batch, gone)
    held = weakref.ref(gone)
    del gone
    assert held() is None
    first_step(batch, adapters["b"])
    alive = [owner() for owner, _ in batch._bindings._kept.values()]
    assert alive == [adapters["a"], adapters["b"]]
    monkeypatch.setattr(row_bindings, "KEPT", 2)
    for adapter in adapters.values():
        first_step(batch, adapter)
    assert len(batch._bindings._kept) == 2


def test_memory_of_ended_rows_goes_back_when_the_budget_needs_it(decoder: DecoderEngine) -> None:
    batch = Batch(decoder, rows=3, budget=300)
    assert batch.arena.capacity == 256
    long = batch.begin(None, tokens=200)
    batch.prefill(list(range(3, 203)))
    assert not batch.has_room(101)
    batch.leave(long)
    kept = batch.begin(None, tokens=250)  # the same slot: its pages are there already
    batch.prefill([5] * 20)
    batch.join()
    assert batch.has_room(50)
    batch.begin(None, tokens=50)
    logits = batch.prefill([7, 8, 9])
    np.testing.assert_allclose(logits, decoder.logits([[7, 8, 9]])[0][-1], atol=1e-5)
    batch.leave(kept)
    batch.join()
    assert batch.arena.reserved == 50
    batch.arena.trim()
    assert batch.arena.touched == [50, 0, 0]
    np.testing.assert_allclose(
        batch.step([10])[0], decoder.logits([[7, 8, 9, 10]])[0][-1], atol=1e-5
    )


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_an_arena_takes_memory_where_it_is_written_and_gives_it_back() -> None:
    graph = GraphInfo("engine.onnx", None, None, 4096, 352, 64, layers=4, kv_heads=2, head_dim=64)
    before = resident_mb()
    arena = CacheArena(graph, slots=16, capacity=4096, budget=8192)  # 268 MB of addresses
    assert resident_mb() - before < 5
    arena.reserve(3, 4000)
    arena.memory[:, 3, :, :4000] = 1
    assert 14 < resident_mb() - before < 24  # 4,000 tokens of 4,096 bytes
    arena.free(3)
    arena.reserve(0, 4000)
    arena.reserve(1, 4000)
    assert resident_mb() - before < 5
    assert arena.touched == [4000, 4000] + [0] * 14
