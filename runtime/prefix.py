"""Prompt beginnings that were computed once: keys and values of whole blocks of tokens, found again by what they say.

Keys and values depend on the adapter and on every token before, so a block's name is (adapter, the block before,
its own tokens); a chain of names is followed as far as it is known. The memory is one preallocated pool; the block that
was not asked for the longest gives way. A chain counts as asked for from its end to its beginning, so ends go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np

from edgetune.runtime.arena import CacheArena

BLOCK = 32
"""Tokens in a block: only whole blocks are shared."""

Name = tuple[Hashable, int, tuple[int, ...]]
"""(adapter, number of the block before or 0, token ids)"""


class PrefixCache:
    """Blocks copied out of an arena's slots and into them; `blocks` 0 keeps none."""

    def __init__(self, arena: CacheArena, *, blocks: int) -> None:
        self.arena = arena
        sides, _, heads, _, width = arena.memory.shape
        self._pool = np.zeros((blocks, sides, heads, BLOCK, width), arena.memory.dtype)  # pages come with the first write
        self._free = list(range(blocks))[::-1]
        self._known: OrderedDict[Name, tuple[int, int]] = OrderedDict()
        """name → (number, place in the pool), the one used least recently first; a number is never used twice"""
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
