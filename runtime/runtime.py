"""A bundle opened for answers: classify, embed, generate, stream, score; adapters load and swap without touching the base."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.devices.host import release_free_memory
from edgetune.errors import BundleError, InputError, listed
from edgetune.runtime.adapters import PackedAdapter
from edgetune.runtime.answers import (
    Classification,
    Completion,
    TextStream,
    classification_of,
    completion_of,
    unit_length,
)
from edgetune.runtime.binding import AdapterRow
from edgetune.runtime.engine import DecoderEngine, DecodeState, EncoderEngine
from edgetune.runtime.generation import GenerationSettings, TokenSequence, settings_from
from edgetune.runtime.manifest import REWARD, TAGGING, Manifest, read_manifest, verify_files
from edgetune.runtime.prompts import Message, check_messages, with_system
from edgetune.runtime.registry import AdapterRegistry, InUse, Resident
from edgetune.runtime.scoring import Answered, answered_ids, read_scores, score_batches
from edgetune.runtime.tagging import Tagging, Words, read_words
from edgetune.runtime.tokenizer import BundleTokenizer
from edgetune.text_pairs import Text

Prompt = str | Sequence[Message]
"""A finished prompt (the user's turn of a chat model), or a conversation."""

Held = Mapping[str | None, Resident | None]
"""Adapters in use by name; None is the base model."""

GENERATE_ROWS, ENCODE_ROWS = 16, 32
"""Rows in one batch at most; more are answered in turn, so memory does not grow with a caller's list."""


class Runtime:
    """One base model and its adapters. Open it with `Runtime.open(folder)`; use it as a context manager.

    Every call prepares its own rows and cache, so several streams may be read in turn or from several threads.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        adapter_folder: Path | None = None,
        adapter_memory_mb: float | None = None,
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.tokenizer = BundleTokenizer(folder, manifest)
        release_free_memory()  # what parsing the vocabulary took
        self.registry = AdapterRegistry(
            folder, manifest, adapter_folder=adapter_folder, memory_mb=adapter_memory_mb
        )
        self.decoder = DecoderEngine(folder, manifest, threads=threads) if manifest.is_decoder else None
        self.encoder = None if manifest.is_decoder else EncoderEngine(folder, manifest, threads=threads)
        release_free_memory()  # what parsing the vocabulary and rearranging the weights took

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        threads: int | None = None,
        verify: bool = True,
        adapter_folder: str | Path | None = None,
        adapter_memory_mb: float | None = None,
    ) -> Runtime:
        """Open a bundle. `verify` compares every file's sha256 with the manifest first; BundleError lists what differs.

        `adapter_folder` and `adapter_memory_mb`: see AdapterRegistry.
        """
        path = Path(folder)
        manifest = read_manifest(path)
        if verify and (differing := verify_files(path, manifest)):
            problems = listed(differing, "files differ")
            fix = "Copy the bundle again, or export it again."
            raise BundleError(f"the bundle is not as exported: {problems}", where=str(path), fix=fix)
        many = None if adapter_folder is None else Path(adapter_folder)
        return cls(path, manifest, threads=threads, adapter_folder=many, adapter_memory_mb=adapter_memory_mb)

    def close(self) -> None:
        """Let go of the session's and the adapters' memory."""
        self.decoder = self.encoder = None
        self.registry = AdapterRegistry(self.folder, self.manifest)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that can be used: shipped in the bundle, or loaded."""
        return self.registry.names()

    def load_adapter(self, name: str, folder: str | Path, *, pin: bool = False) -> PackedAdapter:
        """Load a PEFT folder under a new name; its `.notes` say what could not be checked. See `pack_adapter`."""
        return self.registry.load(name, folder, pin=pin)

    def unload_adapter(self, name: str, *, in_use: InUse = "forget", timeout_s: float | None = None) -> None:
        """Forget an adapter; a text that is being generated with it goes on, or see AdapterRegistry.unload."""
        self.registry.unload(name, in_use=in_use, timeout_s=timeout_s)

    def adapter(self, name: str) -> PackedAdapter:
        """An adapter's labels, prompt format and tensors (read from the bundle at first use)."""
        return self.registry.get(name).packed

    def labels(self, name: str | None) -> tuple[str, ...] | None:
        """What an adapter classifies into; None for the base model and for adapters that generate or embed."""
        chosen = self.chosen(name)
        return None if chosen is None else self.adapter(chosen).labels

    def need_labels(self, name: str | None) -> None:
        """InputError when there is nothing to classify into."""
        if self.labels(name) is None:
            what = "no adapter is chosen" if name is None else f"the adapter {name!r} has no labels"
            choices = ", ".join(self.adapters) or "an adapter with labels; this bundle has none"
            raise InputError(f"{what}, so there is nothing to classify into", expected=choices)
        if self.task(name) == TAGGING:
            raise InputError("this adapter tags words, not texts", got=repr(name), fix="Use Runtime.tag.")

    def need_tags(self, name: str | None) -> None:
        """InputError for an adapter that tags no words."""
        if self.task(name) != TAGGING:
            what = "no adapter is chosen" if name is None else f"the adapter {name!r} tags no words"
            there = ", ".join(entry.name for entry in self.manifest.adapters if entry.task == TAGGING)
            raise InputError(what, expected=there or "an adapter for token-classification")

    def need_text(self, name: str | None) -> None:
        """InputError for an adapter that gives scores instead of text."""
        if self.task(name) == REWARD:
            what = f"the adapter {self.chosen(name)!r} gives scores, not text"
            raise InputError(what, expected="an adapter that generates, or none", fix="Use Runtime.score.")

    def need_scores(self, name: str | None) -> None:
        """InputError for an adapter that gives no scores."""
        if self.task(name) != REWARD:
            what = "no adapter is chosen" if name is None else f"the adapter {name!r} gives no scores"
            there = ", ".join(entry.name for entry in self.manifest.adapters if entry.task == REWARD)
            raise InputError(what, expected=there or "an adapter of method reward")

    def chosen(self, adapter: str | None) -> str | None:
        """The adapter that answers: the one in the weights of a merged bundle, whether it is named or not."""
        return self._names(1, adapter, None)[0]

    def classify(
        self,
        texts: Sequence[Text],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        truncate: bool = False,
    ) -> list[Classification]:
        """The label of each text, or of each pair of texts that belong together, with one adapter for all or one a text.

        `truncate` cuts a text to what the adapter was trained with; else a text longer than the model's positions
        is an InputError.
        """
        names = self._names(len(texts), adapter, adapters)
        for name in {*names}:
            self.need_labels(name)
        with self._held(names) as held:  # labels and tensors of one adapter, even where it is replaced meanwhile
            logits, _ = self._encode(texts, names, held, truncate=truncate)
            return [classification_of(row, found.packed) for row, found in zip(logits, _each(held, names), strict=True) if found]

    def tag(
        self,
        rows: Sequence[Words],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        truncate: bool = False,
    ) -> list[Tagging]:
        """The tag of every word, with one adapter for all rows or one a row.

        A row is a list of words, or a plain text, which is split at white space and at each punctuation mark or symbol
        (`edgetune.words.split_words`). `truncate` as for `classify`; words that are cut off are tagged O.
        """
        names = self._names(len(rows), adapter, adapters)
        for name in {*names}:
            self.need_tags(name)
        engine = self._need(self.encoder)
        with self._held(names) as held:
            return self._tag(engine, rows, names, held, truncate=truncate)

    def _tag(
        self, engine: EncoderEngine, rows: Sequence[Words], names: Sequence[str | None], held: Held, *, truncate: bool
    ) -> list[Tagging]:
        found = _each(held, names)
        readings = [read_words(self, row, name, truncate=truncate) for row, name in zip(rows, names, strict=True)]
        results = [Tagging(reading.text, ()) for reading in readings]
        full = [i for i, reading in enumerate(readings) if reading.ids]
        for places in _batches([len(readings[i].ids) for i in full], ENCODE_ROWS):
            chosen = [full[place] for place in places]
            logits, _ = engine.tokens(
                [readings[i].ids for i in chosen],
                [_bound(found[i]) for i in chosen],
                pad_token_id=self.tokenizer.pad_token_id,
            )
            for i, row in zip(chosen, logits, strict=True):
                one = found[i]
                results[i] = readings[i].tagging(row, (one.packed.labels if one else None) or ())
        return results

    def task(self, name: str | None) -> str | None:
        """What an adapter was trained for, as in its recipe's methods; None for a base that embeds."""
        chosen = self.chosen(name)
        if self.manifest.is_decoder:
            scores = chosen is not None and self.adapter(chosen).task == REWARD
            return REWARD if scores else self.manifest.task
        return None if chosen is None else self.adapter(chosen).task

    def score(
        self,
        answers: Sequence[Answered],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        truncate: bool = False,
    ) -> list[float]:
        """The reward of each answer, with one reward adapter for all or one an answer.

        An answer is a conversation that ends with it, a pair (prompt, answer), or a text that is read as it stands.
        `truncate` keeps the end of what is longer than the context; else that is an InputError.
        """
        names = self._names(len(answers), adapter, adapters)
        for name in {*names}:
            self.need_scores(name)
        engine = self._need(self.decoder)
        ids = [answered_ids(self, answered, name, truncate=truncate) for answered, name in zip(answers, names, strict=True)]
        scores = [0.0] * len(ids)
        with self._held(names) as held:
            for places in score_batches([len(row) for row in ids]):
                found, _ = read_scores(engine, [ids[i] for i in places], [_bound(held[names[i]]) for i in places])
                for i, value in zip(places, found, strict=True):
                    scores[i] = float(value)
        return scores

    def embed(
        self,
        texts: Sequence[Text],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        normalize: bool = True,
        truncate: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Pooled states (texts, hidden) float32, of length 1 unless `normalize` is False."""
        names = self._names(len(texts), adapter, adapters)
        with self._held(names) as held:
            _, pooled = self._encode(texts, names, held, truncate=truncate)
        return unit_length(pooled) if normalize else pooled

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        n: int = 1,
        **settings: Any,
    ) -> list[Completion]:
        """A completion of each prompt, with one adapter for all or one (or None) a prompt, mixed in a batch.

        `n` completions of each prompt stand one after the other; sampling makes them differ.
        `settings`: fields of GenerationSettings; what is not given comes from the row's adapter, then the defaults.
        """
        if n < 1:
            raise InputError("n is out of range", expected="1 or more", got=str(n))
        names = [name for name in self._names(len(prompts), adapter, adapters) for _ in range(n)]
        repeated = [prompt for prompt in prompts for _ in range(n)]
        ids = [self.prompt_ids(prompt, name) for prompt, name in zip(repeated, names, strict=True)]
        rows = [
            self._sequence(row, name, settings, index=i)
            for i, (row, name) in enumerate(zip(ids, names, strict=True))
        ]
        results: list[Completion | None] = [None] * len(rows)
        with self._held(names) as held:
            tensors = [_bound(found) for found in _each(held, names)]
            for places in _batches([len(row) for row in ids], GENERATE_ROWS):
                batch = [ids[i] for i in places], [tensors[i] for i in places], [rows[i] for i in places]
                for place, _piece, completion in self._decode(*batch):
                    if completion is not None:
                        results[places[place]] = completion
        return [completion for completion in results if completion is not None]

    def stream(self, prompt: Prompt, adapter: str | None = None, **settings: Any) -> TextStream:
        """The text of one prompt in pieces, as they become certain."""
        adapter = self.chosen(adapter)
        ids = self.prompt_ids(prompt, adapter)
        sequence = self._sequence(ids, adapter, settings, index=0)

        def pieces() -> Iterator[str | Completion]:
            with self.registry.lease(adapter) as held:
                yield ""  # begun at once: the adapter is held from now on, until the stream ends or is dropped
                for _row, piece, completion in self._decode([ids], [None if held is None else held.bound], [sequence]):
                    if piece:
                        yield piece
                    if completion is not None:
                        yield completion

        begun = pieces()
        next(begun)
        return TextStream(begun)

    def prompt_ids(
        self, prompt: Prompt, adapter: str | None = None, *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a prompt as the adapter was trained to see it. InputError when it does not fit the context.

        `tools` (OpenAI's objects) reach the chat template of a conversation.
        """
        self._need(self.decoder)
        self.need_text(adapter)
        form = None if adapter is None else self.adapter(adapter).prompt_format
        if isinstance(prompt, str):
            ids = self.tokenizer.encode_prompt(prompt, form)
        else:
            messages = with_system(check_messages(prompt), system=(form or {}).get("system"))
            ids = self.tokenizer.encode_chat(messages, tools=tools)
        limit = self.manifest.graph.max_length
        if not ids:
            raise InputError("an empty prompt", expected="one token at least")
        if len(ids) >= limit:
            expected = f"at most {limit - 1} tokens, so that one can follow"
            raise InputError(
                "the prompt is longer than the context", expected=expected, got=f"{len(ids)} tokens"
            )
        return ids

    def text_ids(self, text: Text, adapter: str | None = None, *, truncate: bool = False) -> list[int]:
        """Token ids of a text, or of two, for an encoder; `truncate` cuts to what the adapter was trained with."""
        limit = self.manifest.graph.max_length
        packed = None if adapter is None else self.adapter(adapter)
        if packed is not None and packed.prompt_format is not None:
            _check_count(text, pairs=packed.reads_pairs, name=packed.name)
        trained = None if packed is None else packed.metadata.get("max_length")
        ids = self.tokenizer.encode_text(text, max_tokens=min(limit, trained or limit) if truncate else None)
        if not ids:
            raise InputError("the text has no tokens", expected="one token at least", got=repr(text)[:40])
        if len(ids) > limit:
            fix = "Shorten it, or pass truncate=True (`--truncate`)."
            raise InputError(
                "the text is longer than the model's positions",
                expected=f"at most {limit} tokens",
                got=f"{len(ids)} tokens",
                fix=fix,
            )
        return ids

    def settings(self, adapter: str | None = None, **given: Any) -> GenerationSettings:
        """Generation settings: what is given (None: not given), else the adapter's own defaults, else edgetune's."""
        adapter = self.chosen(adapter)
        defaults = {} if adapter is None else self.adapter(adapter).generation
        return settings_from(defaults, given, base=GenerationSettings())

    def _sequence(
        self, ids: Sequence[int], name: str | None, settings: Mapping[str, Any], *, index: int
    ) -> TokenSequence:
        return self.sequence(ids, self.settings(name, **settings), choice=index)

    def sequence(
        self, ids: Sequence[int], settings: GenerationSettings, *, choice: int = 0, context: int | None = None
    ) -> TokenSequence:
        """One answer to be generated; `context`: tokens of prompt and answer, at most (None: the graph's)."""
        graph = self.manifest.graph
        return TokenSequence(
            self.tokenizer,
            settings,
            row=choice,
            limit=(context or graph.max_length) - len(ids),
            prompt_ids=ids,
            vocab_size=graph.vocab_size,
        )

    def _decode(
        self, ids: Sequence[Sequence[int]], adapters: Sequence[AdapterRow], rows: Sequence[TokenSequence]
    ) -> Iterator[tuple[int, str, Completion | None]]:
        """Generate a batch: (row, new text, the row's completion when it ended). Rows that end leave the batch."""
        if not ids:
            return
        engine = self._need(self.decoder)
        start = time.perf_counter()
        capacity = max(len(row) + sequence.limit for row, sequence in zip(ids, rows, strict=True))
        state, logits = engine.start(ids, adapters, capacity=capacity)
        live, first = list(range(len(rows))), [0.0] * len(rows)
        while True:
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
    def _keep_unfinished(state: DecodeState, live: list[int], rows: Sequence[TokenSequence]) -> list[int]:
        places = [place for place, i in enumerate(live) if rows[i].finish_reason is None]
        if places:
            state.keep(places)
        return [live[place] for place in places]

    def _encode(
        self, texts: Sequence[Text], names: Sequence[str | None], held: Held, *, truncate: bool
    ) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
        engine = self._need(self.encoder)
        if not texts:
            return [], np.zeros((0, self.manifest.graph.hidden_size), np.float32)
        ids = [self.text_ids(text, name, truncate=truncate) for text, name in zip(texts, names, strict=True)]
        logits: list[npt.NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(ids)
        pooled = np.zeros((len(ids), self.manifest.graph.hidden_size), np.float32)
        for places in _batches([len(row) for row in ids], ENCODE_ROWS):
            adapters = [_bound(held[names[i]]) for i in places]
            found, states = engine.run(
                [ids[i] for i in places], adapters, pad_token_id=self.tokenizer.pad_token_id
            )
            for i, row, state in zip(places, found, states, strict=True):
                logits[i], pooled[i] = row, state
        return logits, pooled

    @contextlib.contextmanager
    def _held(self, names: Sequence[str | None]) -> Iterator[Held]:
        """The adapters of these names, in use for the length of a with statement."""
        with contextlib.ExitStack() as stack:
            yield {name: stack.enter_context(self.registry.lease(name)) for name in {*names}}

    def bound(self, name: str | None) -> AdapterRow:
        """What the engine takes for an adapter's name; None is the base model."""
        return None if name is None else self.registry.get(name).bound

    def _names(
        self, count: int, adapter: str | None, adapters: Sequence[str | None] | None
    ) -> list[str | None]:
        if adapters is None and adapter is None and self.manifest.mode == "merged":
            adapter = self.manifest.adapters[0].name  # it is in the weights, whether it is named or not
        if adapters is None:
            return [adapter] * count
        if adapter is not None:
            raise InputError("give `adapter` for all rows or `adapters` for each, not both")
        if len(adapters) != count:
            raise InputError(
                "one adapter (or None) for each row", expected=str(count), got=str(len(adapters))
            )
        return list(adapters)

    def _need(self, engine: Any) -> Any:
        if engine is None:
            closed = self.decoder is None and self.encoder is None
            what = (
                "the runtime is closed" if closed else f"this bundle does {self.manifest.task}, nothing else"
            )
            raise InputError(what, where=str(self.folder))
        return engine


def _check_count(text: Text, *, pairs: bool, name: str) -> None:
    """InputError for one text where the adapter reads two, or the other way round."""
    if pairs is isinstance(text, str):
        wanted, got = ("two texts", "one text") if pairs else ("one text", "two texts")
        example = '("a text", "another")' if pairs else '"a text"'
        raise InputError(f"the adapter {name!r} reads {wanted} at once", expected=f"{wanted}, as {example}", got=got)


def _each(held: Held, names: Sequence[str | None]) -> list[Resident | None]:
    return [held[name] for name in names]


def _bound(found: Resident | None) -> AdapterRow:
    return None if found is None else found.bound


def _batches(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Row numbers in batches of at most `rows`, like lengths together, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[start : start + rows] for start in range(0, len(order), rows)]
