"""Regular expressions out of an adapter's configuration, matched in time linear in the name.

An adapter comes from somewhere else, and Python's engine backtracks: `(\\w+\\.?)*!` on a module's
name takes longer than anyone lives. So the expression is only parsed by Python and then followed as
a set of states (Thompson 1968), whose steps are bounded by the expression's size times the name's
length. What has no such automaton (lookaround, back-references, flags) or a large one is refused.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

_NEW = sys.version_info >= (3, 11)
op: Any = import_module("re._constants" if _NEW else "sre_constants")
parser: Any = import_module("re._parser" if _NEW else "sre_parse")
MAX_LENGTH = 1000
"""Characters of one expression."""
MAX_STATES = 500
"""Of its automaton: `(a{100}){100}` has ten thousand."""
MAX_STEPS = 10_000
"""Steps that are kept: names of one model begin alike."""

Test = Callable[[str], bool]
CATEGORIES: dict[Any, str] = {
    op.CATEGORY_DIGIT: r"\d",
    op.CATEGORY_NOT_DIGIT: r"\D",
    op.CATEGORY_SPACE: r"\s",
    op.CATEGORY_NOT_SPACE: r"\S",
    op.CATEGORY_WORD: r"\w",
    op.CATEGORY_NOT_WORD: r"\W",
}
STARTS = (op.AT_BEGINNING, op.AT_BEGINNING_STRING)
ENDS = (op.AT_END, op.AT_END_STRING)


class UnsafePattern(ValueError):  # noqa: N818
    """An expression that is invalid, or has no small automaton."""


class Pattern:
    """One expression. UnsafePattern where it cannot be matched in bounded time."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise UnsafePattern(f"longer than {MAX_LENGTH} characters")
        try:
            tree = parser.parse(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise UnsafePattern(str(error)) from error
        if tree.state.flags & ~re.UNICODE.value:
            raise UnsafePattern("flags")
        self._tests: list[Test | None] = []
        self._next: list[list[int]] = []
        self._anchor: list[Any] = []
        end = self._state()
        try:
            start = self._sequence(tree, end)
        except RecursionError as error:
            raise UnsafePattern("too deeply nested") from error
        self._first, self._end = frozenset([start]), end
        self._steps: dict[tuple[frozenset[int], Sequence[Any], str], frozenset[int]] = {}

    def fullmatch(self, name: str) -> bool:
        """Whether the whole name is one that the expression describes."""
        states, before = self._first, ""
        for character in name:
            here = _anchors(before, character)
            if (following := self._steps.get((states, here, character))) is None:
                if len(self._steps) > MAX_STEPS:
                    self._steps.clear()
                following = self._step(self._closure(states, here), character)
                self._steps[states, here, character] = following
            states, before = following, character
            if not states:
                return False
        return self._end in self._closure(states, _anchors(before, ""))

    def _step(self, states: frozenset[int], character: str) -> frozenset[int]:
        return frozenset(
            self._next[state][0]
            for state in states
            if (test := self._tests[state]) is not None and test(character)
        )

    def _state(self, test: Test | None = None, *to: int, anchor: Any = None) -> int:
        if len(self._next) >= MAX_STATES:
            raise UnsafePattern(f"an automaton of more than {MAX_STATES} states")
        self._tests.append(test)
        self._next.append(list(to))
        self._anchor.append(anchor)
        return len(self._next) - 1

    def _sequence(self, tree: Iterable[tuple[Any, Any]], to: int) -> int:
        """The state before a sequence that ends in state `to`."""
        for kind, value in reversed(list(tree)):
            to = self._item(kind, value, to)
        return to

    def _item(self, kind: Any, value: Any, to: int) -> int:
        if kind is op.AT and value in (*STARTS, *ENDS, op.AT_BOUNDARY, op.AT_NON_BOUNDARY):
            return self._state(None, to, anchor=value)
        if kind is op.BRANCH:
            return self._state(None, *(self._sequence(branch, to) for branch in value[1]))
        if kind is op.SUBPATTERN and not value[1] and not value[2]:
            return self._sequence(value[3], to)
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeat(value, to)
        return self._state(_test(kind, value), to)

    def _repeat(self, value: tuple[int, Any, Any], to: int) -> int:
        least, most, body = value
        if most is op.MAXREPEAT:
            loop = self._state(None)
            self._next[loop] = [self._sequence(body, loop), to]
            to = loop
        else:
            for _ in range(most - least):
                to = self._state(None, self._sequence(body, to), to)
        for _ in range(least):
            to = self._state(None, self._sequence(body, to))
        return to

    def _closure(self, states: Iterable[int], here: Sequence[Any]) -> frozenset[int]:
        """The states that are reached without another character; `here`: the anchors that hold."""
        found, left = set[int](), list(states)
        while left:
            state = left.pop()
            if state in found:
                continue
            found.add(state)
            anchor = self._anchor[state]
            if self._tests[state] is None and (anchor is None or anchor in here):
                left += self._next[state]
        return frozenset(found)


def _anchors(before: str, after: str) -> tuple[Any, ...]:
    """The anchors that hold between two characters; "" stands for an end of the name."""
    words = [bool(re.fullmatch(r"\w", character)) for character in (before, after)]
    border = op.AT_BOUNDARY if words[0] != words[1] else op.AT_NON_BOUNDARY
    return (*(() if before else STARTS), *(() if after else ENDS), border)


def _test(kind: Any, value: Any) -> Test:
    """Whether one character is the one, or one of those, that an item stands for."""
    if kind is op.LITERAL:
        return chr(value).__eq__
    if kind is op.NOT_LITERAL:
        return chr(value).__ne__
    if kind is op.ANY:
        return "\n".__ne__
    if kind is op.IN:
        negated = value[0][0] is op.NEGATE
        tests = [_member(*one) for one in value[negated:]]
        return lambda character: any(test(character) for test in tests) is not negated
    raise UnsafePattern(str(kind).lower().replace("_", " "))


def _member(kind: Any, value: Any) -> Test:
    if kind is op.RANGE:
        low, high = map(chr, value)
        return lambda character: low <= character <= high
    if kind is op.CATEGORY:
        one = re.compile(CATEGORIES[value])
        return lambda character: one.match(character) is not None
    return _test(kind, value)


@functools.lru_cache(4096)
def _compiled(text: str) -> Pattern | re.Pattern[str]:
    """Python's own engine where nothing repeats and nothing branches: it cannot backtrack there."""
    pattern = Pattern(text)
    plain = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)
    if all(kind in plain for kind, _ in parser.parse(text)):
        return re.compile(text)
    return pattern


def is_safe(text: str) -> bool:
    """Whether an expression is valid and can be matched in bounded time."""
    try:
        _compiled(text)
        _compiled(_at_end(text))
    except UnsafePattern:
        return False
    return True


def fullmatch(pattern: str, name: str) -> bool:
    """`re.fullmatch`, in linear time; UnsafePattern where that cannot be."""
    return bool(_compiled(pattern).fullmatch(name))


def matches_end(pattern: str, name: str) -> bool:
    """PEFT's `re.match(rf"(.*\\.)?({pattern})$", name)`: the name, or its end after a dot."""
    compiled = _compiled(pattern)
    if isinstance(compiled, re.Pattern):
        tail = name[-_width(pattern) :]
        before = name[: len(name) - len(tail)]
        return (not before or before.endswith(".")) and compiled.fullmatch(tail) is not None
    return fullmatch(_at_end(pattern), name)


def _at_end(pattern: str) -> str:
    return rf"(?:.*\.)?(?:{pattern})"


@functools.lru_cache(4096)
def _width(pattern: str) -> int:
    return int(parser.parse(pattern).getwidth()[0])
