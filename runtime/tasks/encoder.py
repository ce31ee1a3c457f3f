"""What an open encoder bundle answers: labels, tags and embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgetune.core.errors import InputError
from edgetune.core.tasks import TAGGING
from edgetune.core.text import Text
from edgetune.runtime.adapters.packing import PackedAdapter
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.engine.interface import Decoder, Encoder
from edgetune.runtime.tasks.answers import (
    Classification,
    check_threshold,
    classification_of,
    need_finite,
    unit_length,
)
from edgetune.runtime.tasks.open_bundle import Held, OpenBundle, batches, bound
from edgetune.runtime.tasks.scoring import read_scores, score_batches
from edgetune.runtime.tasks.tagging import Tagging, Words, read_words

ENCODE_ROWS = 32
"""Rows in one batch at most; more are answered in turn, so memory does not grow with a caller's
list.
"""


class EncoderAnswers:
    """Classify, also with a decoder, tag and embed; see the methods of `Runtime` with the same
    names.
    """

    def __init__(self, opened: OpenBundle) -> None:
        self._opened = opened

    def classify(
        self,
        texts: Sequence[Text],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        truncate: bool = False,
        threshold: float | None = None,
    ) -> list[Classification]:
        """See `Runtime.classify`."""
        check_threshold(threshold)
        names = self._opened.chosen_for(len(texts), adapter, adapters)
        for name in {*names}:
            self.need_labels(name)
        # labels and tensors of one adapter, even where it is replaced meanwhile
        with self._opened.held(names) as held:
            if self._opened.decoder is not None:
                logits = self._read(self._opened.decoder, texts, names, held, truncate=truncate)
            else:
                logits, _ = self._encode(texts, names, held, truncate=truncate)
            return [
                classification_of(row, found.packed, threshold)
                for row, found in zip(logits, [held[name] for name in names], strict=True)
                if found
            ]

    def tag(
        self,
        rows: Sequence[Words],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        truncate: bool = False,
    ) -> list[Tagging]:
        """See `Runtime.tag`."""
        names = self._opened.chosen_for(len(rows), adapter, adapters)
        for name in {*names}:
            self.need_tags(name)
        engine = self._opened.need_encoder()
        with self._opened.held(names) as held:
            return self._tag(engine, rows, names, held, truncate=truncate)

    def embed(
        self,
        texts: Sequence[Text],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        normalize: bool = True,
        truncate: bool = False,
    ) -> npt.NDArray[np.float32]:
        """See `Runtime.embed`."""
        names = self._opened.chosen_for(len(texts), adapter, adapters)
        with self._opened.held(names) as held:
            _, pooled = self._encode(texts, names, held, truncate=truncate)
        for row, name in zip(pooled, names, strict=True):
            need_finite(row, name)
        return unit_length(pooled) if normalize else pooled

    def need_labels(self, name: str | None) -> None:
        """InputError when there is nothing to classify into."""
        if self._opened.labels(name) is None:
            what = "no adapter is chosen" if name is None else f"the adapter {name!r} has no labels"
            choices = (
                ", ".join(self._opened.registry.names())
                or "an adapter with labels; this bundle has none"
            )
            raise InputError(f"{what}, so there is nothing to classify into", expected=choices)
        if self._opened.task(name) == TAGGING:
            raise InputError(
                "this adapter tags words, not texts", got=repr(name), fix="Use Runtime.tag."
            )

    def need_tags(self, name: str | None) -> None:
        """InputError for an adapter that tags no words."""
        if self._opened.task(name) != TAGGING:
            what = "no adapter is chosen" if name is None else f"the adapter {name!r} tags no words"
            there = ", ".join(
                entry.name for entry in self._opened.manifest.adapters if entry.task == TAGGING
            )
            raise InputError(what, expected=there or "an adapter for token-classification")

    def text_ids(
        self,
        text: Text,
        adapter: str | None = None,
        *,
        truncate: bool = False,
        control_tokens: str | None = None,
    ) -> list[int]:
        """See `Runtime.text_ids`."""
        limit, adapter = self._opened.manifest.graph.max_length, self._opened.chosen(adapter)
        packed = None if adapter is None else self._opened.adapter(adapter)
        if packed is not None and packed.prompt_format is not None:
            _check_count(text, pairs=packed.reads_pairs, name=packed.name)
        trained = None if packed is None else packed.metadata.get("max_length")
        tokenizer = self._opened.tokenizer_of(adapter, control_tokens)
        ids = tokenizer.encode_text(
            text, max_tokens=min(limit, trained or limit) if truncate else None
        )
        if not ids:
            raise InputError(
                "the text has no tokens", expected="one token at least", got=repr(text)[:40]
            )
        if len(ids) > limit:
            fix = "Shorten it, or pass truncate=True (`--truncate`)."
            raise InputError(
                "the text is longer than the model's positions",
                expected=f"at most {limit} tokens",
                got=f"{len(ids)} tokens",
                fix=fix,
            )
        return ids

    def _encode(
        self, texts: Sequence[Text], names: Sequence[str | None], held: Held, *, truncate: bool
    ) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
        engine = self._opened.need_encoder()
        if not texts:
            return [], np.zeros((0, self._opened.manifest.graph.hidden_size), np.float32)
        ids = [
            self.text_ids(text, name, truncate=truncate)
            for text, name in zip(texts, names, strict=True)
        ]
        logits: list[npt.NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(ids)
        pooled = np.zeros((len(ids), self._opened.manifest.graph.hidden_size), np.float32)
        for places in batches([len(row) for row in ids], ENCODE_ROWS):
            adapters = [bound(held[names[i]]) for i in places]
            found, states = engine.run(
                [ids[i] for i in places], adapters, pad_token_id=self._opened.tokenizer.pad_token_id
            )
            for i, row, state in zip(places, found, states, strict=True):
                logits[i], pooled[i] = row, state
        return logits, pooled

    def _read(
        self,
        decoder: Decoder,
        texts: Sequence[Text],
        names: Sequence[str | None],
        held: Held,
        *,
        truncate: bool,
    ) -> list[npt.NDArray[np.float32]]:
        """The logits (labels,) of each text by a decoder: its head on the last token's state."""
        ids = [
            self.text_ids(text, name, truncate=truncate)
            for text, name in zip(texts, names, strict=True)
        ]
        logits: list[npt.NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(ids)
        for places in score_batches([len(row) for row in ids]):
            adapters = [bound(held[names[i]]) for i in places]
            _, states = read_scores(decoder, [ids[i] for i in places], adapters)
            for i, state in zip(places, states, strict=True):
                found = held[names[i]]
                assert found is not None
                logits[i] = head_logits(self._opened.manifest, found.packed, state)
        return logits

    def _tag(
        self,
        engine: Encoder,
        rows: Sequence[Words],
        names: Sequence[str | None],
        held: Held,
        *,
        truncate: bool,
    ) -> list[Tagging]:
        found = [held[name] for name in names]
        readings = [
            read_words(self._opened, row, name, truncate=truncate)
            for row, name in zip(rows, names, strict=True)
        ]
        results = [Tagging(reading.text, ()) for reading in readings]
        full = [i for i, reading in enumerate(readings) if reading.ids]
        for places in batches([len(readings[i].ids) for i in full], ENCODE_ROWS):
            chosen = [full[place] for place in places]
            logits, _ = engine.tokens(
                [readings[i].ids for i in chosen],
                [bound(found[i]) for i in chosen],
                pad_token_id=self._opened.tokenizer.pad_token_id,
            )
            for i, row in zip(chosen, logits, strict=True):
                one = found[i]
                need_finite(row, names[i])
                if one is not None:
                    results[i] = readings[i].tagging(row, one.packed)
        return results


def head_logits(
    manifest: Manifest, packed: PackedAdapter, state: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The logits (labels,) of a decoder's classifier on its last token's state (hidden,)."""
    head = manifest.head
    if head is None or head.weight not in packed.tensors:
        raise InputError(f"the adapter {packed.name!r} has no classifier")
    logits: npt.NDArray[np.float32] = (
        state @ packed.tensors[head.weight][0] + packed.tensors[head.bias][0]
    )
    return logits


def _check_count(text: Text, *, pairs: bool, name: str) -> None:
    """InputError for one text where the adapter reads two, or the other way round."""
    if pairs is isinstance(text, str):
        wanted, got = ("two texts", "one text") if pairs else ("one text", "two texts")
        example = '("a text", "another")' if pairs else '"a text"'
        raise InputError(
            f"the adapter {name!r} reads {wanted} at once",
            expected=f"{wanted}, as {example}",
            got=got,
        )
