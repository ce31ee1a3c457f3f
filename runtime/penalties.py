"""What shifts logits before a token is chosen: bias and penalties, as OpenAI and CTRL define them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgetune.errors import InputError

if TYPE_CHECKING:
    from edgetune.runtime.generation import GenerationSettings

Float32 = npt.NDArray[np.float32]


class Penalties:
    """One row's bias and penalties; knows which tokens were there. Order: bias, repetition, frequency and presence."""

    def __init__(
        self, settings: GenerationSettings, prompt_ids: Sequence[int], *, vocab_size: int | None
    ) -> None:
        """InputError when a bias is for a token id outside the vocabulary."""
        self._settings = settings
        self._bias_ids = np.array([token for token, _ in settings.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in settings.logit_bias], np.float32)
        if vocab_size is not None and any(not 0 <= token < vocab_size for token in self._bias_ids):
            expected = f"token ids below {vocab_size}"
            raise InputError("logit_bias names an unknown token", expected=expected, got=str(int(self._bias_ids.max())))
        self._repeats = settings.repetition_penalty != 1
        self._counts_matter = bool(settings.frequency_penalty or settings.presence_penalty)
        self._seen = set(prompt_ids) if self._repeats else set()
        self._counts: Counter[int] = Counter()

    @property
    def active(self) -> bool:
        """Whether `apply` changes anything."""
        return bool(len(self._bias)) or self._repeats or self._counts_matter

    def add(self, token: int) -> None:
        """A token of the answer."""
        if self._repeats:
            self._seen.add(token)
        if self._counts_matter:
            self._counts[token] += 1

    def apply(self, logits: Float32) -> Float32:
        """Shifted logits (vocab,), a copy."""
        shifted = logits.copy()
        shifted[self._bias_ids] += self._bias
        if self._repeats:
            ids = np.fromiter(self._seen, np.int64, len(self._seen))
            there, factor = shifted[ids], np.float32(self._settings.repetition_penalty)
            shifted[ids] = np.where(there > 0, there / factor, there * factor)
        if self._counts_matter and self._counts:
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            times = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            taken = times * self._settings.frequency_penalty + self._settings.presence_penalty
            shifted[ids] -= taken.astype(np.float32)
        return shifted
