"""Keys and values of the native engine in one arena: bytes, of which those of 16 tokens lie
together, so whole steps of 16 are copied, promised and given back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from edgetune.runtime.bundle.manifest import GraphInfo
from edgetune.runtime.engine.kv_cache import CacheArena
from edgetune.runtime.engine.native.library import CSizes


def native_graph(graph: GraphInfo, sizes: CSizes) -> GraphInfo:
    """The sizes of a model's cache as the native engine keeps it."""
    return replace(graph, cache_dtype="uint8", head_dim=sizes.cache_bytes)


class NativeArena(CacheArena):
    """See `CacheArena`; `step`: tokens that lie together."""

    def __init__(
        self, graph: GraphInfo, *, slots: int, capacity: int, budget: int, step: int
    ) -> None:
        self._step = step
        super().__init__(graph, slots=slots, capacity=capacity, budget=budget)

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        sides, slots, heads, capacity, width = shape
        super()._allocate((sides, slots, heads, self._whole(capacity), width), dtype)

    def reserve(self, slot: int, tokens: int) -> None:
        """Promise memory to the row of a slot, in whole steps."""
        super().reserve(slot, self._whole(tokens))

    def move(self, source: int, to: int, *, tokens: int) -> None:
        """Copy a row's first tokens to another slot, with its reservation."""
        super().move(source, to, tokens=self._whole(tokens))

    def _whole(self, tokens: int) -> int:
        return -(-tokens // self._step) * self._step
