"""What the worker does with generation requests: one turn admits, runs `chunk` tokens of prompts,
and one step of all rows.

A long prompt goes through in pieces of `chunk` tokens with a decode step after each, so the streams
that run wait for one piece at most; prompts that fit into it whole share it, so that of many that
come at once the last waits for fewer steps. Who waits is let in by the fair queue's order and never
overtaken by a smaller request, so a large one is not starved while memory is short.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from edgetune.core.arrays import Float32
from edgetune.core.errors import InputError
from edgetune.runtime.engine.interface import BatchRow, DecoderBatch
from edgetune.runtime.scheduler.counters import Counters
from edgetune.runtime.scheduler.requests import Running
from edgetune.runtime.tasks.answers import need_finite

MOST_AT_ONCE = 16
"""Tokens of a step with guesses, those of all rows together."""


class DecodeLoop:
    """Rows under way. Only the worker thread calls it; `next_waiting` hands over a request for
    which there is room.
    """

    def __init__(
        self, batch: DecoderBatch, counters: Counters, *, chunk: int, lookup: int = 0
    ) -> None:
        """`lookup`: tokens of a greedy row that are guessed by prompt lookup; 0 guesses none.

        InputError for a batch that cannot check guesses.
        """
        if lookup and not batch.checks_guesses:
            raise InputError(
                "an encoder-decoder guesses no tokens", expected="lookup 0", got=str(lookup)
            )
        self.batch, self.counters, self.chunk, self.lookup = batch, counters, chunk, lookup
        self.filling: Running | None = None
        self._rows: dict[BatchRow, Running] = {}

    @property
    def running(self) -> list[Running]:
        """Requests that have a row."""
        return [*self._rows.values(), *([] if self.filling is None else [self.filling])]

    def turn(self, next_waiting: Callable[[Callable[[Running], bool]], Running | None]) -> None:
        """One round: let in, prefill `chunk` tokens, decode a step; what was called off meanwhile
        is in none of them.
        """
        self.sweep()
        left = self.chunk
        while left > 0:
            if self.filling is None:
                self._admit(next_waiting, at_most=None if left == self.chunk else left)
                self.sweep()  # who waited may be past its deadline
            if (running := self.filling) is None:
                break
            assert running.row is not None
            before = running.row.length
            self._guarded([running], partial(self._prefill, left))
            left -= max(running.row.length - before, 1)
            self.sweep()
        if self._rows:
            self._guarded(list(self._rows.values()), self._step)

    def sweep(self, *, cancel_all: bool = False) -> None:
        """End what was cancelled or is past its deadline, before anything more is computed
        for it.
        """
        now = time.monotonic()
        for running in self.running:
            reason = "cancelled" if cancel_all else running.overdue(now)
            if reason is not None:
                self._end(running, reason)

    def _admit(
        self,
        next_waiting: Callable[[Callable[[Running], bool]], Running | None],
        *,
        at_most: int | None,
    ) -> None:
        """Let the next one in when there is room; with `at_most` only one whose prompt has no more
        tokens.
        """

        def fits(waiting: Running) -> bool:
            short = at_most is None or len(waiting.request.prompt_ids) <= at_most
            return short and self.batch.has_room(waiting.tokens_needed)

        running = next_waiting(fits)
        if running is None:
            return
        running.started = time.monotonic()
        try:
            running.row = self.batch.begin(running.adapter, tokens=running.tokens_needed)
        except Exception as error:  # it got no row, so nobody else is touched
            self.counters.ended("failed")
            running.fail(error)
            return
        self.filling = running
        self._guarded([running], partial(self._begin, running))

    def _begin(self, running: Running) -> None:
        """Copy what is known of a prompt into its row."""
        prompt = running.request.prompt_ids
        running.cached = self.batch.restore(running.adapter_key, prompt)
        self.counters.started(running)

    def _prefill(self, tokens: int) -> None:
        running = self.filling
        assert running is not None and running.row is not None
        prompt, start = running.request.prompt_ids, time.monotonic()
        if not self.batch.prefills_in_pieces:
            tokens = max(tokens, len(prompt))
        logits = self.batch.prefill(prompt[running.row.length : running.row.length + tokens])
        if running.row.length == len(prompt):
            need_finite(logits, running.name)  # before anything of it is remembered
            self.filling = None
            self.batch.join()
            self._rows[running.row] = running
            self.batch.remember(running.row, running.adapter_key, prompt)
            self._take(running, logits)
        self.counters.prefilled(time.monotonic() - start)

    def _step(self) -> None:
        start, rows = time.monotonic(), list(self.batch.decoding)
        guesses = self._guesses(rows)
        if any(guesses) and self._check([self._rows[row] for row in rows], guesses):
            return
        try:
            logits = self.batch.step([self._rows[row].token for row in rows])
        except Exception:
            if len(rows) == 1:
                raise
            for row in rows:  # the error belongs to the row that brings it about
                self._guarded([self._rows[row]], partial(self._step_alone, self._rows[row]))
            return
        self.counters.stepped(len(rows), time.monotonic() - start)
        for row, own in zip(rows, logits, strict=True):
            self._take(self._rows[row], own)

    def _step_alone(self, running: Running) -> None:
        start, row = time.monotonic(), running.row
        assert row is not None
        logits = self.batch.step_alone(row, running.token)
        self.counters.stepped(1, time.monotonic() - start)
        self._take(running, logits)

    def _guesses(self, rows: list[BatchRow]) -> list[list[int]]:
        """Tokens that may follow each row's next one, as many as one step takes without becoming
        dear; none where the engine checks one row at a time and there are more.
        """
        free = MOST_AT_ONCE - len(rows)
        together = self.batch.checks_guesses and (len(rows) == 1 or self.batch.checks_together)
        if not together or self.filling is not None:
            return [[] for _ in rows]
        guesses = []
        for row in rows:
            guesses.append(self._rows[row].guess(free, lookup=self.lookup))
            free -= len(guesses[-1])
        return guesses

    def _check(self, rows: list[Running], guesses: list[list[int]]) -> bool:
        """Run every row's next token and what may follow it in one step; keep of each what it would
        have chosen by itself. False where it fails, and the rows are as they were.
        """
        start = time.monotonic()
        tokens = [[running.token, *guess] for running, guess in zip(rows, guesses, strict=True)]
        before = [running.row.length for running in rows if running.row is not None]
        try:
            logits = self.batch.check(tokens)
        except Exception:  # which row it is of shows without guesses
            return False
        self.counters.stepped(len(rows), time.monotonic() - start)
        at = 0
        for running, guess, length in zip(rows, guesses, before, strict=True):
            self._keep(running, guess, length, logits[at : at + len(guess) + 1])
            at += len(guess) + 1
        return True

    def _keep(self, running: Running, guess: list[int], before: int, logits: Float32) -> None:
        """Choose a row's tokens from the logits after each, as long as the guess is right."""
        row, right = running.row, 0
        assert row is not None
        for right, own in enumerate(logits):
            row.length = before + right + 1
            self._take(running, own)
            if row not in self._rows or right == len(guess) or running.token != guess[right]:
                break
        if guess:
            self.counters.guessed(len(guess), right)
            running.tell(guessed=len(guess), right=right)

    def _take(self, running: Running, logits: Float32) -> None:
        """Choose a row's token; a row whose own settings fail it (a form that cannot be followed)
        ends alone.
        """
        try:
            running.take(logits)
        except Exception as error:
            self._end(running, "failed", error)
            return
        self.counters.generated(running)
        if running.sequence.finish_reason is not None:
            self._end(running, running.sequence.finish_reason)

    def _end(self, running: Running, reason: str, error: Exception | None = None) -> None:
        row = running.row
        assert row is not None
        if running is self.filling:
            self.filling = None
        elif (
            self._rows.pop(row, None) is not None and error is None
        ):  # a conversation may go on from here
            written = [*running.request.prompt_ids, *running.sequence.tokens][: row.length]
            self.batch.remember(row, running.adapter_key, written)
        self.batch.leave(row)
        self.counters.ended(reason)
        if error is None:
            running.finish(reason)
        else:
            running.fail(error)

    def _guarded(self, affected: list[Running], work: Callable[[], None]) -> None:
        """Do one piece of engine work; when it fails, those it was for fail, and the worker goes
        on.
        """
        try:
            work()
        except Exception as error:
            for running in affected:
                if running in self.running:
                    self._end(running, "failed", error)
