"""What an open encoder bundle answers: labels, tags and embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgetune.core.errors import InputError
from edgetune.core.tasks import TAGGING
from edgetune.core.text import Text
from edgetune.runtime.engine.engine import EncoderEngine
from edgetune.runtime.tasks.answers import Classification, classification_of, unit_length
from edgetune.runtime.tasks.open_bundle import Held, OpenBundle, batches, bound, each
from edgetune.runtime.tasks.tagging import Tagging, Words, read_words

ENCODE_ROWS = 32
"""Rows in one batch at most; more are answered in turn, so memory does not grow with a caller's
list.
"""


class EncoderAnswers(OpenBundle):
    """Classify, tag, embed; one adapter for all rows or one a row."""

    def classify(
        self,
        texts: Sequence[Text],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        truncate: bool = False,
    ) -> list[Classification]:
        """The label of each text, or of each pair of texts that belong together, with one adapter
        for all or one a text.

        `truncate` cuts a text to what the adapter was trained with; else a text longer than the
        model's positions is an InputError.
        """
        names = self._names(len(texts), adapter, adapters)
        for name in {*names}:
            self.need_labels(name)
        with self._held(
            names
        ) as held:  # labels and tensors of one adapter, even where it is replaced meanwhile
            logits, _ = self._encode(texts, names, held, truncate=truncate)
            return [
                classification_of(row, found.packed)
                for row, found in zip(logits, each(held, names), strict=True)
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
        """The tag of every word, with one adapter for all rows or one a row.

        A row is a list of words, or a plain text, which is split at white space and at each
        punctuation mark or symbol (`edgetune.core.text.split_words`). `truncate` as for `classify`;
        words that are cut off are tagged O.
        """
        names = self._names(len(rows), adapter, adapters)
        for name in {*names}:
            self.need_tags(name)
        engine = self._need(self.encoder)
        with self._held(names) as held:
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
        """Pooled states (texts, hidden) float32, of length 1 unless `normalize` is False."""
        names = self._names(len(texts), adapter, adapters)
        with self._held(names) as held:
            _, pooled = self._encode(texts, names, held, truncate=truncate)
        return unit_length(pooled) if normalize else pooled

    def need_labels(self, name: str | None) -> None:
        """InputError when there is nothing to classify into."""
        if self.labels(name) is None:
            what = "no adapter is chosen" if name is None else f"the adapter {name!r} has no labels"
            choices = ", ".join(self.adapters) or "an adapter with labels; this bundle has none"
            raise InputError(f"{what}, so there is nothing to classify into", expected=choices)
        if self.task(name) == TAGGING:
            raise InputError(
                "this adapter tags words, not texts", got=repr(name), fix="Use Runtime.tag."
            )

    def need_tags(self, name: str | None) -> None:
        """InputError for an adapter that tags no words."""
        if self.task(name) != TAGGING:
            what = "no adapter is chosen" if name is None else f"the adapter {name!r} tags no words"
            there = ", ".join(
                entry.name for entry in self.manifest.adapters if entry.task == TAGGING
            )
            raise InputError(what, expected=there or "an adapter for token-classification")

    def text_ids(
        self, text: Text, adapter: str | None = None, *, truncate: bool = False
    ) -> list[int]:
        """Token ids of a text, or of two, for an encoder; `truncate` cuts to what the adapter was
        trained with.
        """
        limit, adapter = self.manifest.graph.max_length, self.chosen(adapter)
        packed = None if adapter is None else self.adapter(adapter)
        if packed is not None and packed.prompt_format is not None:
            _check_count(text, pairs=packed.reads_pairs, name=packed.name)
        trained = None if packed is None else packed.metadata.get("max_length")
        ids = self.tokenizer.encode_text(
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
        engine = self._need(self.encoder)
        if not texts:
            return [], np.zeros((0, self.manifest.graph.hidden_size), np.float32)
        ids = [
            self.text_ids(text, name, truncate=truncate)
            for text, name in zip(texts, names, strict=True)
        ]
        logits: list[npt.NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(ids)
        pooled = np.zeros((len(ids), self.manifest.graph.hidden_size), np.float32)
        for places in batches([len(row) for row in ids], ENCODE_ROWS):
            adapters = [bound(held[names[i]]) for i in places]
            found, states = engine.run(
                [ids[i] for i in places], adapters, pad_token_id=self.tokenizer.pad_token_id
            )
            for i, row, state in zip(places, found, states, strict=True):
                logits[i], pooled[i] = row, state
        return logits, pooled

    def _tag(
        self,
        engine: EncoderEngine,
        rows: Sequence[Words],
        names: Sequence[str | None],
        held: Held,
        *,
        truncate: bool,
    ) -> list[Tagging]:
        found = each(held, names)
        readings = [
            read_words(self, row, name, truncate=truncate)
            for row, name in zip(rows, names, strict=True)
        ]
        results = [Tagging(reading.text, ()) for reading in readings]
        full = [i for i, reading in enumerate(readings) if reading.ids]
        for places in batches([len(readings[i].ids) for i in full], ENCODE_ROWS):
            chosen = [full[place] for place in places]
            logits, _ = engine.tokens(
                [readings[i].ids for i in chosen],
                [bound(found[i]) for i in chosen],
                pad_token_id=self.tokenizer.pad_token_id,
            )
            for i, row in zip(chosen, logits, strict=True):
                one = found[i]
                results[i] = readings[i].tagging(row, (one.packed.labels if one else None) or ())
        return results


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
