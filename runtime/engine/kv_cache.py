"""Keys and values: one preallocated block cut into slots, how much memory it gets, and prompt
beginnings kept for reuse.
"""

from __future__ import annotations

import math
import mmap
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.errors import InputError
from edgetune.devices.host import memory_mb
from edgetune.runtime.bundle.manifest import GraphInfo
from edgetune.runtime.engine.device_memory import DeviceBlock, Place, bind_cache
from edgetune.runtime.engine.session import ort_value

PAGE = mmap.PAGESIZE


class CacheArena:
    """Keys and values (2·layers, slots, kv_heads, capacity, head_dim) in `cache_dtype`; `budget` is
    in tokens, over all slots.
    """

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
        """tokens of the budget that a cache beside the block holds, while answers are read for
        their scores
        """

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.memory, self._map = _lazy_zeros(shape, dtype)

    @property
    def shares_prefixes(self) -> bool:
        """Whether blocks of tokens can be copied out of slots and into them."""
        return True

    @property
    def token_bytes(self) -> int:
        """Memory of one token's keys and values in all layers."""
        return token_bytes(
            self.memory.shape[0], self.memory.shape[2], self.memory.shape[4], self.memory.itemsize
        )

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
        """Copy a row's first tokens to another slot, with its reservation; the source is free
        then.
        """
        self._reserved[to], self._reserved[source] = self._reserved[source], 0
        self.touched[to] = max(self.touched[to], self._reserved[to])
        self.memory[:, to, :, :tokens] = self.memory[:, source, :, :tokens]

    def trim(self) -> None:
        """Give the pages of ended rows back to the system (where it can: Linux, macOS); live rows
        keep theirs.
        """
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
        """Bind slots first…first+count-1 as past and as present; the caller keeps what is returned
        alive.
        """
        values = [ort_value(side[first : first + count]) for side in self.memory]
        bind_cache(io, self.names, values)
        return values


class DeviceArena(CacheArena):
    """The same on a device, whose memory is taken at once: slots as long as the budget allows for
    all of them.
    """

    def __init__(
        self, place: Place, graph: GraphInfo, *, slots: int, capacity: int, budget: int
    ) -> None:
        self._place = place
        super().__init__(
            graph, slots=slots, capacity=min(capacity, max(budget // slots, 1)), budget=budget
        )

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
        """Bind slots first…first+count-1 as past and as present; the caller keeps what is returned
        alive.
        """
        values: list[Any] = self.memory.views(first, count)
        bind_cache(io, self.names, values)
        return values


def new_arena(
    graph: GraphInfo, *, slots: int, capacity: int, budget: int, place: Place | None
) -> CacheArena:
    """An arena where the session wants its cache (None: in the processor's memory)."""
    if place is None:
        return CacheArena(graph, slots=slots, capacity=capacity, budget=budget)
    return DeviceArena(place, graph, slots=slots, capacity=capacity, budget=budget)


def token_bytes(sides: int, heads: int, width: int, itemsize: int = 4) -> int:
    """Memory of one token's keys and values: sides (2·layers) × heads × width numbers of so many
    bytes.
    """
    return sides * heads * width * itemsize


def _lazy_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], mmap.mmap]:
    """Zeros whose pages exist from their first write on, in small pages: huge ones would be whole
    slots at once.
    """
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


USUAL_TOKENS = 1024
"""Tokens a row is given room for, on average, where no memory is named."""
PREFIX_SHARE = 4
"""One part in so many of the memory is for shared prefixes."""


@dataclass(frozen=True)
class CachePlan:
    """Tokens of cache over all rows, and blocks of shared prefixes."""

    tokens: int
    prefix_blocks: int


def plan_cache(graph: GraphInfo, *, rows: int, cache_mb: float | None = None) -> CachePlan:
    """Divide `cache_mb` (10⁶ bytes) between rows and shared prefixes.

    None: 1,024 tokens a row (the context where that is shorter), at most a quarter of the machine's
    memory. It is an upper bound: memory is used where tokens are written. InputError when it does
    not hold 64 tokens.
    """
    itemsize = np.dtype(graph.cache_dtype or "float32").itemsize
    token = token_bytes(2 * (graph.layers or 0), graph.kv_heads or 0, graph.head_dim or 0, itemsize)
    if cache_mb is None:
        wanted = (
            rows * min(graph.max_length, USUAL_TOKENS) * token * PREFIX_SHARE / (PREFIX_SHARE - 1)
        )
        total = min(wanted, (memory_mb() or 4096) * 1e6 / 4)
    else:
        total = cache_mb * 1e6
    tokens = int(total * (PREFIX_SHARE - 1) / PREFIX_SHARE / token)
    if tokens < 64:
        least = 64 * token * PREFIX_SHARE / (PREFIX_SHARE - 1) / 1e6
        raise InputError(
            "cache_mb is too small", expected=f"at least {least:.3g}", got=f"{total / 1e6:g}"
        )
    return CachePlan(
        min(tokens, rows * graph.max_length), int(total / PREFIX_SHARE / (token * BLOCK))
    )


BLOCK = 32
"""Tokens in a block: only whole blocks are shared."""
Name = tuple[Hashable, int, tuple[int, ...]]
"""(adapter, number of the block before or 0, token ids)"""


class PrefixCache:
    """Blocks copied out of an arena's slots and into them; `blocks` 0 keeps none."""

    def __init__(self, arena: CacheArena, *, blocks: int) -> None:
        self.arena = arena
        sides, _, heads, _, width = arena.memory.shape
        self._pool = np.zeros(
            (blocks, sides, heads, BLOCK, width), arena.memory.dtype
        )  # pages come with the first write
        self._free = list(range(blocks))[::-1]
        self._known: OrderedDict[Name, tuple[int, int]] = OrderedDict()
        """name → (number, place in the pool), the one used least recently first; a number is never
        used twice
        """
        self._numbers = 0
        self.hit_tokens = self.evictions = 0

    @property
    def nbytes(self) -> int:
        """Memory of the blocks that are kept."""
        return len(self._known) * BLOCK * self.arena.token_bytes

    @property
    def limit_bytes(self) -> int:
        """Memory the pool may come to."""
        return len(self._pool) * BLOCK * self.arena.token_bytes

    def restore(self, slot: int, adapter: Hashable, tokens: Sequence[int]) -> int:
        """Copy the longest known beginning of a prompt into a slot; how many tokens that is.

        One token at least is left to compute, because its logits are wanted.
        """
        chain = self._chain(adapter, tokens[: len(tokens) - 1])
        for i, name in enumerate(chain):
            place = self._known[name][1]
            self.arena.memory[:, slot, :, i * BLOCK : (i + 1) * BLOCK] = self._pool[place]
        self._touch(chain)
        self.hit_tokens += len(chain) * BLOCK
        return len(chain) * BLOCK

    def store(self, slot: int, adapter: Hashable, tokens: Sequence[int]) -> None:
        """Keep the whole blocks of a slot's first tokens, as many as the pool can hold."""
        chain = self._chain(adapter, tokens)
        self._touch(chain)
        for at in range(len(chain) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
            if len(chain) == len(self._pool):
                break
            before = self._known[chain[-1]][0] if chain else 0
            name = (adapter, before, tuple(tokens[at : at + BLOCK]))
            place = self._free.pop() if self._free else self._evict()
            self._pool[place] = self.arena.memory[:, slot, :, at : at + BLOCK]
            self._numbers += 1
            self._known[name] = self._numbers, place
            chain.append(name)
            self._touch(chain)

    def _chain(self, adapter: Hashable, tokens: Sequence[int]) -> list[Name]:
        """Names of the blocks that are known, from the beginning on."""
        chain: list[Name] = []
        for at in range(0, len(tokens) - BLOCK + 1, BLOCK):
            before = self._known[chain[-1]][0] if chain else 0
            name = (adapter, before, tuple(tokens[at : at + BLOCK]))
            if name not in self._known:
                break
            chain.append(name)
        return chain

    def _touch(self, chain: Sequence[Name]) -> None:
        for name in reversed(chain):
            self._known.move_to_end(name)

    def _evict(self) -> int:
        self.evictions += 1
        return self._known.popitem(last=False)[1][1]
