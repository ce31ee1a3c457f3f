"""One preallocated block of keys and values, cut into slots: a row lives in one slot from prefill to its last token.

Grouped-query attention appends in place when past and present are the same memory, and a batch's memory must be one
piece along the batch dimension. So the rows being decoded sit in slots 0…n-1, a step binds the front of the block, and
no step copies a cache. Bytes that are copied, of a row of T tokens with b bytes a token (SmolLM2-135M: b = 46 kB):

- prefill: none, it runs on a view of the row's own slot;
- a row leaves: the last row moves into its slot, T·b once in its life (300 tokens: 14 MB, one or two milliseconds);
- a known prefix: its T·b are copied instead of computed (200 tokens: 9 MB against 0.2 s of prefill on two cores).

Slots are as long as the context, but memory is used where it is written: the operating system gives pages at the
first write, and takes those of ended rows back when the budget asks for it (`trim`).
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import InputError
from edgetune.runtime.binding import ort_value
from edgetune.runtime.device_memory import DeviceBlock, Place, bind_cache
from edgetune.runtime.manifest import GraphInfo

PAGE = mmap.PAGESIZE


class CacheArena:
    """Keys and values (2·layers, slots, kv_heads, capacity, head_dim) in `cache_dtype`; `budget` is in tokens, over all slots."""

    def __init__(self, graph: GraphInfo, *, slots: int, capacity: int, budget: int) -> None:
        layers, heads, width = graph.layers or 0, graph.kv_heads or 0, graph.head_dim or 0
        self.slots, self.capacity, self.budget = slots, capacity, budget
        self.names = [f"{layer}.{side}" for layer in range(layers) for side in ("key", "value")]
        shape = (len(self.names), slots, heads, capacity, width)
        self._allocate(shape, np.dtype(graph.cache_dtype or "float32"))
        self.touched = [0] * slots
        """tokens of a slot that were written since its pages were given back"""
        self._reserved = [0] * slots
        self.lent = 0
        """tokens of the budget that a cache beside the block holds, while answers are read for their scores"""

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.memory, self._map = _lazy_zeros(shape, dtype)

    @property
    def shares_prefixes(self) -> bool:
        """Whether blocks of tokens can be copied out of slots and into them."""
        return True

    @property
    def token_bytes(self) -> int:
        """Memory of one token's keys and values in all layers."""
        return token_bytes(self.memory.shape[0], self.memory.shape[2], self.memory.shape[4], self.memory.itemsize)

    @property
    def reserved(self) -> int:
        """Tokens promised to rows, or lent."""
        return sum(self._reserved) + self.lent

    def fits(self, tokens: int) -> bool:
        """Whether a row that may grow to so many tokens can be let in now."""
        return self.reserved + tokens <= self.budget

    def reserve(self, slot: int, tokens: int) -> None:
        """Promise memory to the row of a slot; pages that ended rows left behind make room."""
        self._reserved[slot] = tokens
        if sum(map(max, self.touched, self._reserved)) + self.lent > self.budget:
            self.trim()
        self.touched[slot] = max(self.touched[slot], tokens)

    def free(self, slot: int) -> None:
        """The row of this slot has ended."""
        self._reserved[slot] = 0

    def move(self, source: int, to: int, *, tokens: int) -> None:
        """Copy a row's first tokens to another slot, with its reservation; the source is free then."""
        self._reserved[to], self._reserved[source] = self._reserved[source], 0
        self.touched[to] = max(self.touched[to], self._reserved[to])
        self.memory[:, to, :, :tokens] = self.memory[:, source, :, :tokens]

    def trim(self) -> None:
        """Give the pages of ended rows back to the system (where it can: Linux, macOS); live rows keep theirs."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        sides, slots, heads, capacity, width = self.memory.shape
        token = width * self.memory.itemsize
        for slot in range(slots):
            if self.touched[slot] <= self._reserved[slot]:
                continue
            for side in range(sides):
                for head in range(heads):
                    row = ((side * slots + slot) * heads + head) * capacity
                    first = -(-(row + self._reserved[slot]) * token // PAGE) * PAGE
                    end = (row + self.touched[slot]) * token // PAGE * PAGE
                    if end > first:
                        self._map.madvise(mmap.MADV_DONTNEED, first, end - first)
            self.touched[slot] = self._reserved[slot]

    def bind(self, io: Any, first: int, count: int) -> list[Any]:
        """Bind slots first…first+count-1 as past and as present; the caller keeps what is returned alive."""
        values = [ort_value(side[first : first + count]) for side in self.memory]
        bind_cache(io, self.names, values)
        return values


class DeviceArena(CacheArena):
    """The same on a device, whose memory is taken at once: slots as long as the budget allows for all of them."""

    def __init__(self, place: Place, graph: GraphInfo, *, slots: int, capacity: int, budget: int) -> None:
        self._place = place
        super().__init__(graph, slots=slots, capacity=min(capacity, max(budget // slots, 1)), budget=budget)

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.memory: Any = DeviceBlock(self._place, shape)

    @property
    def shares_prefixes(self) -> bool:
        """Not on a device: a block of tokens is in as many pieces as there are layers and heads."""
        return False

    def move(self, source: int, to: int, *, tokens: int) -> None:
        """Copy a row's slot to another one, with its reservation; the source is free then."""
        self._reserved[to], self._reserved[source] = self._reserved[source], 0
        self.memory.copy(source, to)

    def trim(self) -> None:
        """A device's memory is not given back."""
        self.touched = list(self._reserved)

    def bind(self, io: Any, first: int, count: int) -> list[Any]:
        """Bind slots first…first+count-1 as past and as present; the caller keeps what is returned alive."""
        values: list[Any] = self.memory.views(first, count)
        bind_cache(io, self.names, values)
        return values


def new_arena(graph: GraphInfo, *, slots: int, capacity: int, budget: int, place: Place | None) -> CacheArena:
    """An arena where the session wants its cache (None: in the processor's memory)."""
    if place is None:
        return CacheArena(graph, slots=slots, capacity=capacity, budget=budget)
    return DeviceArena(place, graph, slots=slots, capacity=capacity, budget=budget)


def token_bytes(sides: int, heads: int, width: int, itemsize: int = 4) -> int:
    """Memory of one token's keys and values: sides (2·layers) × heads × width numbers of so many bytes."""
    return sides * heads * width * itemsize


def _lazy_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], mmap.mmap]:
    """Zeros whose pages exist from their first write on, in small pages: huge ones would be whole slots at once."""
    size = max(math.prod(shape) * dtype.itemsize, PAGE)
    options: dict[str, int] = {}
    if hasattr(mmap, "MAP_PRIVATE"):  # shared memory, Python's default, would not give pages back
        options["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, size, **options)
    except (OSError, ValueError, OverflowError) as error:
        what = f"the system gives no {size / 1e6:,.0f} MB of addresses for keys and values: {error}"
        raise InputError(what, fix="Lower max_context, max_rows or cache_mb.") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(memory, dtype, count=math.prod(shape)).reshape(shape)
    return array, memory
