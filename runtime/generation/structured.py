"""Answers of a given form: a JSON schema, a regular expression or a Lark grammar says which token
may come next.

The grammar work is llguidance's (extra `edgetune[structured]`). A mask for the next token is
computed in a thread of its own as soon as the token before is known, so that it is ready when the
engine's step ends.
"""

from __future__ import annotations

import functools
import string
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgetune.core.errors import EdgetuneError, InputError
from edgetune.runtime.generation.settings import form_of

if TYPE_CHECKING:
    from edgetune.runtime.bundle.tokenizer import BundleTokenizer
    from edgetune.runtime.generation.settings import GenerationSettings


TokenMask = npt.NDArray[np.bool_]
JSON_DEFAULTS: Any = {"whitespace_pattern": r"[ \n\r\t]{0,16}"}
"""Room for an indentation, and an end to it: a small model can write blanks until its tokens run
out.
"""
COMPILED = 64
"""Grammars that are kept compiled for a tokenizer."""


class PackageMissing(EdgetuneError):  # noqa: N818
    """A request needs an optional package that this machine lacks."""


class Constraint:
    """Which tokens keep one answer in its form. `start` it, then by turns `mask` and `add`;
    `forced` looks ahead.
    """

    def __init__(self, matcher: Any, vocab_size: int, eos: frozenset[int]) -> None:
        self._matcher, self._vocab_size, self._eos = matcher, vocab_size, eos
        self._next: Future[tuple[TokenMask, list[int]]] | None = None
        self.complete = False
        """Whether nothing more can follow."""

    def start(self) -> None:
        """Begin to compute the mask of the next token."""
        self._next = _mask_thread().submit(self._compute)

    def mask(self) -> TokenMask:
        """True for each token (vocab,) that may come next; waits for it where it is not ready
        yet.
        """
        if self._next is None:
            self.start()
        assert self._next is not None
        return self._next.result()[0]

    def forced(self) -> list[int]:
        """Tokens that spell what must come next, where the form leaves one continuation only; empty
        where it leaves more. Others may spell it too: `mask` has the last word.
        """
        if self.complete:
            return []
        if self._next is None:
            self.start()
        assert self._next is not None
        return self._next.result()[1]

    def add(self, token: int) -> None:
        """Take the chosen token and begin with the next mask. InputError when the grammar became
        too complex.
        """
        pending, self._next = self._next, None
        if pending is not None:
            wait([pending])  # the matcher is one thread's at a time
        if token not in self._eos:
            self._matcher.consume_token(token)
            self._check()
            self.complete = bool(self._matcher.is_stopped())
            if not self.complete:
                self.start()

    def _compute(self) -> tuple[TokenMask, list[int]]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask: TokenMask = np.unpackbits(bits, bitorder="little")[: self._vocab_size].view(np.bool_)
        if mask.size < self._vocab_size:
            mask = np.concatenate([mask, np.zeros(self._vocab_size - mask.size, np.bool_)])
        return mask, list(self._matcher.compute_ff_tokens())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(
                f"the answer's form cannot be followed: {_first_line(self._matcher.get_error())}"
            )


def constraint_of(
    settings: GenerationSettings, tokenizer: BundleTokenizer, *, vocab_size: int
) -> Constraint | None:
    """What keeps an answer in the form its settings ask for; None for free text.

    Compiles the grammar at its first use (milliseconds; seconds for a huge one). InputError when it
    is not valid, PackageMissing without llguidance.
    """
    form = form_of(settings)
    if form is None:
        return None
    matcher = _compilers(tokenizer, vocab_size).matcher(*form)
    constraint = Constraint(matcher, vocab_size, tokenizer.eos_token_ids)
    constraint.start()
    return constraint


@dataclass(frozen=True)
class Departure:
    """Where a text leaves a form."""

    fits: str  # the text before
    expected: str  # the characters that may follow there, for a person


class FormCheck:
    """Tells which texts could be answers of a form. InputError when the form is not valid,
    PackageMissing without llguidance.
    """

    def __init__(self, kind: str, text: str) -> None:
        guidance = _llguidance()
        self._bytes = guidance.LLTokenizer("byte")
        self._start = _compiled(guidance, self._bytes, kind, text)

    def departure(self, text: str) -> Departure | None:
        """None where the whole text is of the form."""
        matcher, tokens = self._start.deep_copy(), self._bytes.tokenize_str(text)
        fit = matcher.try_consume_tokens(tokens)
        if fit == len(tokens) and matcher.is_accepting():
            return None
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        follow = [self._bytes.decode_str([int(token)]) for token in np.flatnonzero(bits[:128])]
        before = text.encode()[:fit].decode(errors="ignore")
        return Departure(before, _characters([c for c in follow if c.isprintable()]))


def _characters(allowed: Sequence[str]) -> str:
    """Characters for a person: digits and letters as a range, the first few of many."""
    shown = [c for c in allowed if not c.isspace()]
    for name, group in (("0-9", string.digits), ("a-z", string.ascii_lowercase)):
        if set(group) <= set(shown):
            shown = [c for c in shown if c not in group] + [name]
    some = " ".join(shown[:12]) + (" …" if len(shown) > 12 else "")
    return some or "the end of the text"


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        fix = "Install edgetune[structured] (pip install llguidance)."
        raise PackageMissing("structured output needs the package llguidance", fix=fix) from error
    return llguidance


def _compiled(guidance: Any, tokenizer: Any, kind: str, text: str) -> Any:
    """llguidance's matcher of a form, at the beginning of an answer."""
    where = f"the {kind} of the answer"
    try:
        if kind == "schema":
            grammar = guidance.LLMatcher.grammar_from_json_schema(text, defaults=JSON_DEFAULTS)
        elif kind == "regex":
            grammar = guidance.LLMatcher.grammar_from_regex(text)
        else:
            grammar = guidance.LLMatcher.grammar_from_lark(text)
        matcher = guidance.LLMatcher(tokenizer, grammar, log_level=0)
    except (ValueError, TypeError) as error:
        raise InputError(f"cannot be used: {_first_line(str(error))}", where=where) from error
    if matcher.is_error():
        raise InputError(f"cannot be used: {_first_line(matcher.get_error())}", where=where)
    return matcher


class _Compiler:
    """llguidance's view of one tokenizer, and the grammars compiled for it."""

    def __init__(self, tokenizer: BundleTokenizer, vocab_size: int) -> None:
        llguidance = _llguidance()
        size = max(vocab_size, tokenizer.tokenizer.get_vocab_size(with_added_tokens=True))
        eos = sorted(tokenizer.eos_token_ids)
        try:
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer.tokenizer.to_str(), n_vocab=size, eos_token=eos or None
            )
        except ValueError as error:  # T5's Metaspace, in llguidance 1.9
            raise InputError(
                f"answers of this tokenizer cannot be held to a form: {_first_line(str(error))}",
                fix="Ask for free text.",
            ) from error
        self._compiled = functools.lru_cache(COMPILED)(
            functools.partial(_compiled, llguidance, self._tokenizer)
        )
        self._copying = threading.Lock()

    def matcher(self, kind: str, text: str) -> Any:
        """A matcher at the beginning of an answer."""
        compiled = self._compiled(kind, text)
        with self._copying:
            return compiled.deep_copy()


_known: weakref.WeakKeyDictionary[BundleTokenizer, _Compiler] = weakref.WeakKeyDictionary()
_known_lock = threading.Lock()


def _compilers(tokenizer: BundleTokenizer, vocab_size: int) -> _Compiler:
    """One compiler a tokenizer: making it takes up to a second."""
    with _known_lock:
        if tokenizer not in _known:
            _known[tokenizer] = _Compiler(tokenizer, vocab_size)
        return _known[tokenizer]


@functools.lru_cache(1)
def _mask_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="edgetune-masks")


def _first_line(text: str) -> str:
    """The first line of a message, and the one with the error where the first only announces it."""
    first, *others = text.strip().splitlines() or ["no reason given"]
    error = next((line.strip() for line in others if "error: " in line), "")
    return (f"{first} {error}" if error and first.endswith(":") else first)[:200]
