"""First come first served, and nobody waits because somebody else asks a lot."""

from __future__ import annotations

from edgetune.runtime.scheduler.fair_queue import FairQueue


def drained(queue: FairQueue[str]) -> str:
    return "".join(queue.pop() for _ in range(len(queue)))


def queue_of(items: str, cost: float = 1.0) -> FairQueue[str]:
    """Items whose key is their letter's case-less self."""
    queue: FairQueue[str] = FairQueue()
    for item in items:
        queue.put(item, key=item, cost=cost)
    return queue


def test_one_key_is_a_plain_queue() -> None:
    queue: FairQueue[str] = FairQueue()
    for i, item in enumerate("abcdef"):
        queue.put(item, key="same", cost=10 - i)
    assert drained(queue) == "abcdef"


def test_a_flood_delays_itself_only() -> None:
    assert drained(queue_of("aaaaaab")) == "abaaaaa"
    assert drained(queue_of("aaaabbbb")) == "abababab"


def test_shares_are_in_cost_not_in_requests() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(2):
        queue.put("L", key="large", cost=4)
    for _ in range(6):
        queue.put("s", key="small", cost=1)
    assert drained(queue) == "LssssLss"


def test_a_newcomer_gets_no_credit_for_the_time_it_was_away() -> None:
    queue = queue_of("aaaa")
    assert [queue.pop(), queue.pop()] == ["a", "a"]
    for _ in range(3):
        queue.put("b", key="b", cost=1)
    assert drained(queue) == "babab"[:5]


def test_nobody_starves_beside_keys_that_always_ask() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(3):
        queue.put("rare", key="rare", cost=1)
    served = []
    for i in range(15):
        queue.put("busy", key=i % 4, cost=1)
        served.append(queue.pop())
    assert served.count("rare") == 3


def test_what_is_removed_is_given_back_in_the_order_of_arrival() -> None:
    queue = queue_of("abcab")
    assert queue.remove(lambda item: item == "a") == ["a", "a"]
    assert (len(queue), sorted(queue)) == (3, ["b", "b", "c"])
    assert queue.peek() == "b"
    assert drained(queue) == "bcb"
    assert queue.peek() is None


def test_what_is_removed_costs_its_key_nothing() -> None:
    queue = queue_of("aaabb")
    assert len(queue.remove(lambda item: item == "a")) == 3
    queue.put("a", key="a", cost=1)
    assert drained(queue) == "bab"
    queue = queue_of("axabbb")
    queue.put("c", key="a", cost=1)
    queue.remove(lambda item: item == "a")  # "c" was behind both
    assert drained(queue) == "xbcbb"


def test_a_queue_that_is_emptied_by_removals_forgets() -> None:
    queue = queue_of("aaa")
    queue.remove(lambda _: True)
    for item in "aabb":
        queue.put(item, key=item, cost=1)
    assert drained(queue) == "abab"
