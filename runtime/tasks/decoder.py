"""What an open decoder bundle answers: texts, whole or in pieces."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgetune.core.answer_confidence import answer_confidence_of
from edgetune.core.errors import InputError
from edgetune.core.messages import tools_of
from edgetune.core.tasks import CLASSIFICATION, REWARD
from edgetune.core.templates import Message, check_messages, with_system
from edgetune.runtime.engine.interface import AdapterRow, DecoderState
from edgetune.runtime.generation.sampling import TokenSequence
from edgetune.runtime.generation.settings import GenerationSettings, settings_from
from edgetune.runtime.tasks.answers import Completion, TextStream, completion_of, need_finite
from edgetune.runtime.tasks.open_bundle import OpenBundle, batches, bound
from edgetune.runtime.tasks.scoring import Answered, AnswerReader, read_scores, score_batches

Prompt = str | Sequence[Message]
"""A finished prompt (the user's turn of a chat model), or a conversation."""
GENERATE_ROWS = 16
"""Rows in one batch at most; more are answered in turn, so memory does not grow with a caller's
list.
"""


class DecoderAnswers:
    """Generate, stream and score; see the methods of `Runtime` with the same names."""

    def __init__(self, opened: OpenBundle) -> None:
        self._opened = opened

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        n: int = 1,
        **settings: Any,
    ) -> list[Completion]:
        """See `Runtime.generate`."""
        if n < 1:
            raise InputError("n is out of range", expected="1 or more", got=str(n))
        names = [
            name
            for name in self._opened.chosen_for(len(prompts), adapter, adapters)
            for _ in range(n)
        ]
        repeated = [prompt for prompt in prompts for _ in range(n)]
        ids = [self.prompt_ids(prompt, name) for prompt, name in zip(repeated, names, strict=True)]
        rows = [
            self._sequence(row, name, settings, index=i)
            for i, (row, name) in enumerate(zip(ids, names, strict=True))
        ]
        results: list[Completion | None] = [None] * len(rows)
        with self._opened.held(names) as held:
            tensors = [bound(held[name]) for name in names]
            for places in batches([len(row) for row in ids], GENERATE_ROWS):
                batch = (
                    [ids[i] for i in places],
                    [tensors[i] for i in places],
                    [rows[i] for i in places],
                    [names[i] for i in places],
                )
                for place, _piece, completion in self._decode(*batch):
                    if completion is not None:
                        results[places[place]] = completion
        return [completion for completion in results if completion is not None]

    def stream(self, prompt: Prompt, adapter: str | None = None, **settings: Any) -> TextStream:
        """See `Runtime.stream`."""
        adapter = self._opened.chosen(adapter)
        ids = self.prompt_ids(prompt, adapter)
        sequence = self._sequence(ids, adapter, settings, index=0)

        def pieces() -> Generator[str | Completion, None, None]:
            with self._opened.registry.lease(adapter) as held:
                # begun at once: the adapter is held from now on, until the stream ends or is
                # dropped
                yield ("")
                for _row, piece, completion in self._decode(
                    [ids], [None if held is None else held.bound], [sequence], [adapter]
                ):
                    if piece:
                        yield piece
                    if completion is not None:
                        yield completion

        begun = pieces()
        next(begun)
        return TextStream(begun)

    def score(
        self,
        answers: Sequence[Answered],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        truncate: bool = False,
    ) -> list[float]:
        """See `Runtime.score`."""
        names = self._opened.chosen_for(len(answers), adapter, adapters)
        for name in {*names}:
            self.need_scores(name)
        engine = self._opened.need_decoder()
        readers = {name: AnswerReader(self._opened, name, truncate=truncate) for name in {*names}}
        ids = [readers[name].ids(answered) for answered, name in zip(answers, names, strict=True)]
        scores = [0.0] * len(ids)
        with self._opened.held(names) as held:
            for places in score_batches([len(row) for row in ids]):
                found, _ = read_scores(
                    engine, [ids[i] for i in places], [bound(held[names[i]]) for i in places]
                )
                for i, value in zip(places, found, strict=True):
                    need_finite(value, names[i])
                    scores[i] = float(value)
        return scores

    def need_text(self, name: str | None) -> None:
        """InputError for an adapter that gives scores or labels instead of text."""
        if self._opened.task(name) == CLASSIFICATION:
            what = f"the adapter {self._opened.chosen(name)!r} gives labels, not text"
            raise InputError(
                what, expected="an adapter that generates, or none", fix="Use Runtime.classify."
            )
        if self._opened.task(name) == REWARD:
            what = f"the adapter {self._opened.chosen(name)!r} gives scores, not text"
            raise InputError(
                what, expected="an adapter that generates, or none", fix="Use Runtime.score."
            )

    def need_scores(self, name: str | None) -> None:
        """InputError for an adapter that gives no scores."""
        if self._opened.task(name) != REWARD:
            what = (
                "no adapter is chosen" if name is None else f"the adapter {name!r} gives no scores"
            )
            there = ", ".join(
                entry.name for entry in self._opened.manifest.adapters if entry.task == REWARD
            )
            raise InputError(what, expected=there or "an adapter of method reward")

    def prompt_ids(
        self,
        prompt: Prompt,
        adapter: str | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        control_tokens: str | None = None,
    ) -> list[int]:
        """See `Runtime.prompt_ids`."""
        self._opened.need_decoder()
        adapter = self._opened.chosen(adapter)
        self.need_text(adapter)
        form = None if adapter is None else self._opened.adapter(adapter).prompt_format
        tokenizer = self._opened.tokenizer_of(adapter, control_tokens)
        if isinstance(prompt, str):
            ids = tokenizer.encode_prompt(prompt, form)
        else:
            messages = with_system(check_messages(prompt), system=(form or {}).get("system"))
            ids = tokenizer.encode_chat(messages, tools=tools or tools_of(prompt))
        limit = self._opened.manifest.graph.max_length
        if not ids:
            raise InputError("an empty prompt", expected="one token at least")
        if len(ids) >= limit:
            expected = f"at most {limit - 1} tokens, so that one can follow"
            raise InputError(
                "the prompt is longer than the context", expected=expected, got=f"{len(ids)} tokens"
            )
        return ids

    def settings(self, adapter: str | None = None, **given: Any) -> GenerationSettings:
        """Generation settings: what is given (None: not given), else the adapter's own defaults,
        else edgetune's.
        """
        adapter = self._opened.chosen(adapter)
        defaults = {} if adapter is None else self._opened.adapter(adapter).generation
        settings = settings_from(defaults, given, base=GenerationSettings())
        if adapter is None or not settings.confidence or settings.calibration is not None:
            return settings
        found = answer_confidence_of(self._opened.adapter(adapter).metadata)
        calibration = None if found is None else (found.slope, found.intercept)
        return replace(settings, calibration=calibration)

    def sequence(
        self,
        ids: Sequence[int],
        settings: GenerationSettings,
        *,
        choice: int = 0,
        context: int | None = None,
    ) -> TokenSequence:
        """One answer to be generated; `context`: tokens of prompt and answer, at most (None: the
        graph's).
        """
        graph = self._opened.manifest.graph
        before = (
            ids if graph.start_token_id is None else [graph.start_token_id]
        )  # the prompt is another text than the answer
        return TokenSequence(
            self._opened.tokenizer,
            settings,
            row=choice,
            limit=(context or graph.max_length) - len(before),
            prompt_ids=before,
            vocab_size=graph.vocab_size,
        )

    def _sequence(
        self, ids: Sequence[int], name: str | None, settings: Mapping[str, Any], *, index: int
    ) -> TokenSequence:
        return self.sequence(ids, self.settings(name, **settings), choice=index)

    def _decode(
        self,
        ids: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow],
        rows: Sequence[TokenSequence],
        names: Sequence[str | None],
    ) -> Iterator[tuple[int, str, Completion | None]]:
        """Generate a batch: (row, new text, the row's completion when it ended). Rows that end
        leave the batch.
        """
        if not ids:
            return
        engine = self._opened.need_decoder()
        start = time.perf_counter()
        capacity = max(len(row) + sequence.limit for row, sequence in zip(ids, rows, strict=True))
        state, logits = engine.start(ids, adapters, capacity=capacity)
        live, first = list(range(len(rows))), [0.0] * len(rows)
        while True:
            for place, i in enumerate(live):
                need_finite(logits[place], names[i])
            tokens = {i: rows[i].choose(logits[place]) for place, i in enumerate(live)}
            now = time.perf_counter()
            for i in live:
                first[i] = first[i] or now - start
                piece = rows[i].add(tokens[i])
                done = (
                    completion_of(rows[i], len(ids[i]), first[i], now - start)
                    if rows[i].finish_reason
                    else None
                )
                yield i, piece, done
            live = self._keep_unfinished(state, live, rows)
            if not live:
                return
            logits = state.step([tokens[i] for i in live])

    @staticmethod
    def _keep_unfinished(
        state: DecoderState, live: list[int], rows: Sequence[TokenSequence]
    ) -> list[int]:
        places = [place for place, i in enumerate(live) if rows[i].finish_reason is None]
        if places:
            state.keep(places)
        return [live[place] for place in places]
