"""Known beginnings are found by adapter and tokens; the ends of what was not asked for the longest
go first.
"""

from __future__ import annotations

import numpy as np
import pytest

from edgetune.core.errors import InputError
from edgetune.runtime.bundle.manifest import GraphInfo
from edgetune.runtime.engine.kv_cache import BLOCK, CacheArena, PrefixCache, plan_cache

GRAPH = GraphInfo("engine.onnx", None, None, 512, 352, 64, layers=2, kv_heads=2, head_dim=4)


def cache(blocks: int) -> PrefixCache:
    arena = CacheArena(GRAPH, slots=2, capacity=512, budget=1024)
    arena.memory[:, 0] = np.arange(512)[:, None]  # a token's keys and values say where it stands
    return PrefixCache(arena, blocks=blocks)


def tokens(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))


def test_the_longest_known_beginning_is_copied() -> None:
    prefixes = cache(8)
    prefixes.store(0, "a", tokens(3 * BLOCK + 5))
    assert prefixes.restore(1, "a", [*tokens(2 * BLOCK), 999, *tokens(BLOCK)]) == 2 * BLOCK
    copied = prefixes.arena.memory[:, 1]
    np.testing.assert_array_equal(
        copied[:, :, : 2 * BLOCK], prefixes.arena.memory[:, 0, :, : 2 * BLOCK]
    )
    assert not copied[:, :, 2 * BLOCK :].any()
    assert prefixes.hit_tokens == 2 * BLOCK


def test_one_token_is_always_left_to_compute() -> None:
    prefixes = cache(8)
    prefixes.store(0, "a", tokens(2 * BLOCK))
    assert prefixes.restore(1, "a", tokens(2 * BLOCK)) == BLOCK
    assert prefixes.restore(1, "a", tokens(2 * BLOCK + 1)) == 2 * BLOCK


def test_another_adapter_or_another_beginning_finds_nothing() -> None:
    prefixes = cache(8)
    prefixes.store(0, "a", tokens(3 * BLOCK))
    assert prefixes.restore(1, "b", tokens(99)) == 0
    assert prefixes.restore(1, "a", tokens(99, first=BLOCK)) == 0


def test_the_end_of_the_oldest_gives_way_first() -> None:
    prefixes = cache(4)
    prefixes.store(0, "old", tokens(2 * BLOCK))
    prefixes.store(0, "new", tokens(3 * BLOCK))
    assert prefixes.evictions == 1
    assert prefixes.restore(1, "old", tokens(99)) == BLOCK
    assert prefixes.restore(1, "new", tokens(99)) == 3 * BLOCK
    prefixes.store(0, "newest", tokens(2 * BLOCK))
    assert prefixes.restore(1, "old", tokens(99)) == 0
    assert prefixes.restore(1, "newest", tokens(99)) == 2 * BLOCK


def test_a_prompt_longer_than_the_pool_keeps_what_fits() -> None:
    prefixes = cache(2)
    prefixes.store(0, "a", tokens(5 * BLOCK))
    prefixes.store(0, "a", tokens(5 * BLOCK))
    assert prefixes.evictions == 0
    assert prefixes.restore(1, "a", tokens(5 * BLOCK)) == 2 * BLOCK
    assert prefixes.nbytes == prefixes.limit_bytes == 2 * BLOCK * 4 * 2 * 4 * 4


def test_no_pool_keeps_nothing() -> None:
    prefixes = cache(0)
    prefixes.store(0, "a", tokens(99))
    assert prefixes.restore(1, "a", tokens(99)) == 0


def test_memory_is_divided_between_rows_and_prefixes() -> None:
    plan = plan_cache(
        GRAPH, rows=4, cache_mb=0.128 * 4 / 3
    )  # a token: 4 sides of 2 heads of 4 floats, 128 bytes
    assert plan.tokens == 1000
    assert plan.prefix_blocks == 10
    assert plan_cache(GRAPH, rows=4, cache_mb=1000).tokens == 4 * 512
    assert plan_cache(GRAPH, rows=4).tokens == 4 * 512


def test_too_little_memory_names_the_least() -> None:
    with pytest.raises(
        InputError, match=r"cache_mb is too small \(expected at least 0\.0109, got 0\.001\)"
    ):
        plan_cache(GRAPH, rows=4, cache_mb=0.001)
