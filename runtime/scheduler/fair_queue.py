"""A queue that is fair between adapters (start-time fair queueing)."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items with a key (whose share) and a cost (what serving them takes, in any unit). Not
    thread-safe.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, float, Item, Hashable]] = []
        self._last: dict[Hashable, float] = {}
        self._now, self._count = 0.0, 0

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Item]:
        """All items, in no particular order."""
        return (entry[3] for entry in self._heap)

    def put(self, item: Item, *, key: Hashable, cost: float) -> None:
        """Queue an item."""
        start = max(self._now, self._last.get(key, 0.0))
        self._last[key] = start + cost
        self._count += 1
        heapq.heappush(self._heap, (start, self._count, cost, item, key))

    def peek(self) -> Item | None:
        """Whose turn it is; None when nobody waits."""
        return self._heap[0][3] if self._heap else None

    def pop(self) -> Item:
        """Take the item whose turn it is."""
        self._now, _, _, item, _ = heapq.heappop(self._heap)
        self._forget_if_idle()
        return item

    def remove(self, wanted: Callable[[Item], bool]) -> list[Item]:
        """Take out every item for which `wanted` is true; its adapter's later items come as if it
        had not been there.
        """
        out = [entry for entry in self._heap if wanted(entry[3])]
        if out:
            gone = {entry[1] for entry in out}
            self._heap = [entry for entry in self._heap if entry[1] not in gone]
            for _, count, cost, _, key in out:
                self._give_back(key, count, cost)
            heapq.heapify(self._heap)
            self._forget_if_idle()
        return [entry[3] for entry in sorted(out, key=lambda entry: entry[1])]

    def _give_back(self, key: Hashable, count: int, cost: float) -> None:
        """What was queued after a removed item of the same key moves up by its cost."""
        self._last[key] -= cost
        for i, (start, number, own, item, whose) in enumerate(self._heap):
            if whose == key and number > count:
                self._heap[i] = (start - cost, number, own, item, whose)

    def _forget_if_idle(self) -> None:
        """Virtual time need not run for ever."""
        if not self._heap:
            self._last.clear()
            self._now = 0.0
