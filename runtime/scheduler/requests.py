"""A generation request from its submission to its last event: requests, events, tickets."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetune.core.errors import EdgetuneError
from edgetune.runtime.adapters.registry import Lease
from edgetune.runtime.engine.interface import BatchRow, BoundAdapter
from edgetune.runtime.generation.prompt_lookup import PromptLookup
from edgetune.runtime.generation.sampling import TokenLogprob, TokenSequence
from edgetune.runtime.generation.settings import GenerationSettings
from edgetune.runtime.tasks.answers import Completion, need_finite


# (as `queue.Full`: the request is fine, the moment is not)
class QueueFull(EdgetuneError):  # noqa: N818
    """The bounded queue has no room: try again in `retry_after_s` seconds."""

    def __init__(
        self, what: str, *, retry_after_s: float, expected: str = "", got: str = ""
    ) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(what, expected=expected, got=got, fix="Send it again later.")


class SchedulerClosed(EdgetuneError):  # noqa: N818
    """The scheduler drains or has stopped: it takes no request."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to be continued. `deadline` is a moment of `time.monotonic()`, in seconds.

    A deadline that passes, in the queue or while the row runs, is no error: the completion ends
    with finish reason "deadline" and the text so far. `choice` numbers the answers to one prompt,
    so that equal seeds give different ones.
    """

    prompt_ids: list[int]
    adapter: str | None
    settings: GenerationSettings
    deadline: float | None = None
    request_id: str = ""
    choice: int = 0


@dataclass(frozen=True)
class TokenEvent:
    """Text that became certain (it may be empty: half a character, the beginning of a stop text)
    and its tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class FinishedEvent:
    """The last event of a request that ended: "stop", "length", "cancelled" or "deadline"."""

    completion: Completion


@dataclass(frozen=True)
class FailedEvent:
    """The last event of a request that could not be answered: an EdgetuneError where it was the
    request's doing.
    """

    error: Exception


Event = TokenEvent | FinishedEvent | FailedEvent


class Ticket:
    """A request that is under way."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self._cancelled = threading.Event()
        self._done = threading.Event()

    def cancel(self) -> None:
        """Free the row before the next step; the last event then has finish reason "cancelled".
        Never blocks.
        """
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the last event; False when it has not come in time."""
        return self._done.wait(timeout_s)


log = logging.getLogger("edgetune.runtime")


class Running:
    """One request: its answer so far, its adapter (held until the end), its row once it has one."""

    def __init__(
        self,
        ticket: Ticket,
        on_event: Callable[[Event], None],
        sequence: TokenSequence,
        lease: Lease | None,
    ) -> None:
        self.ticket, self.request, self.sequence = ticket, ticket.request, sequence
        self._on_event, self._lease = on_event, lease
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.first: float | None = None
        self.row: BatchRow | None = None
        self.cached = 0
        self.token = 0
        """chosen, but not yet in the cache"""
        self._lookup: PromptLookup | None = None

    @property
    def tokens_needed(self) -> int:
        """Tokens of cache this request may come to."""
        return len(self.request.prompt_ids) + self.sequence.limit

    @property
    def name(self) -> str | None:
        """The adapter's name; None is the base model."""
        return None if self._lease is None else self._lease.resident.packed.name

    @property
    def adapter(self) -> BoundAdapter | None:
        """What the engine takes."""
        return None if self._lease is None else self._lease.resident.bound

    @property
    def adapter_key(self) -> Hashable:
        """Which adapter it is: equal for the same content under the same name."""
        return 0 if self._lease is None else self._lease.resident.serial

    def overdue(self, now: float) -> str | None:
        """Why this request ends now whatever its text is: "cancelled", "deadline" or None."""
        if self.ticket.cancelled:
            return "cancelled"
        deadline = self.request.deadline
        return "deadline" if deadline is not None and now >= deadline else None

    def take(self, logits: npt.NDArray[np.float32]) -> None:
        """Choose the next token from logits (vocab,) and tell of it. AdapterError where they are
        not finite.
        """
        need_finite(logits, self.name)
        self.token = self.sequence.choose(logits)
        piece = self.sequence.add(self.token)
        self.first = self.first or time.monotonic()
        if self._lookup is not None:
            self._lookup.add(self.token)
        asked = self.sequence.settings.logprobs is not None
        logprobs = (self.sequence.logprobs[-1],) if asked else None
        self._tell(TokenEvent(piece, (self.token,), logprobs))

    def guess(self, count: int, *, lookup: int) -> list[int]:
        """At most `count` tokens that may follow `token`: those that the answer's form leaves no
        choice about, or at most `lookup` by what followed the same words before. Right are those
        that would have been chosen one by one: each is chosen again from its own logits.
        """
        room = max(0, min(count, self.sequence.limit - len(self.sequence.tokens) - 1))
        if room and (forced := self.sequence.forced()[:room]):
            return forced
        room = min(room, lookup)
        if room <= 0 or not self.sequence.plain_greedy:
            return []
        if self._lookup is None:
            self._lookup = PromptLookup([*self.request.prompt_ids, *self.sequence.tokens])
        return self._lookup.guess(room)

    def tell(self, *, guessed: int, right: int) -> None:
        """How a guess turned out."""
        if self._lookup is not None:
            self._lookup.tell(guessed=guessed, right=right)

    def finish(self, reason: str) -> None:
        """The last event: the completion so far."""
        self._end(FinishedEvent(self._completion(reason)))

    def fail(self, error: Exception) -> None:
        """The last event: an error."""
        self._end(FailedEvent(error))

    def _completion(self, reason: str) -> Completion:
        now, tokens = time.monotonic(), self.sequence.tokens
        first = self.first or now
        asked = self.sequence.settings.logprobs is not None
        return Completion(
            text=self.sequence.text,
            finish_reason=reason,
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=len(tokens),
            ttft_ms=(first - self.submitted) * 1e3,
            tpot_ms=(now - first) * 1e3 / (len(tokens) - 1) if len(tokens) > 1 else None,
            token_ids=tuple(tokens),
            logprobs=tuple(self.sequence.logprobs) if asked else None,
            queue_ms=((self.started or now) - self.submitted) * 1e3,
            cached_tokens=self.cached,
            confidence=self.sequence.confidence,
        )

    def _end(self, event: Event) -> None:
        if self._lease is not None:
            self._lease.release()
        self._tell(event)
        self.ticket._done.set()

    def _tell(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception:  # a listener's trouble ends its own request, not the worker
            log.exception(
                "a listener of request %r failed; the request is cancelled", self.request.request_id
            )
            self.ticket.cancel()
