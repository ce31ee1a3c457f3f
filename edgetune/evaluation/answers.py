"""What answers an evaluation's questions: a bundle (here), a run in torch (`torch_answers`), or a
bare base (`base_answers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgetune.core.answer_confidence import answer_confidence_of
from edgetune.core.confidence import NONE, Confidence, ScoredLabel
from edgetune.core.errors import InputError
from edgetune.core.settings import some_of
from edgetune.core.text import Text
from edgetune.data.conversations import Prompt
from edgetune.data.prompts import PromptFormat
from edgetune.recipe.generation import shaping

Advance = Callable[[int, int], None]  # (rows done, rows in all)


@dataclass(frozen=True)
class Prompting:
    """How a base is asked. `shots` examples come from `train`; `choose` takes the likeliest of the
    known answers.
    """

    prompt: str | None = None
    completion: str | None = None
    shots: int = 0
    train: Path | None = None
    choose: bool = False
    plain: bool = False
    seed: int = 0


class Answers(Protocol):
    """Something that answers: a bundle, a run or a base."""

    adapter: str | None = None  # its name, where there are several
    task: str
    problem: str = "single-label"  # of a classifier; or multi-label, regression
    labels: tuple[str, ...] | None
    prompt_format: PromptFormat
    notes: tuple[str, ...] = ()  # what else shapes the answers

    confidence: Confidence = NONE  # how its logits become scores

    def scored(self, texts: Sequence[Any]) -> list[ScoredLabel]:
        """The label of each text, or of each pair of them, with its score."""

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """The completion of each prompt, greedily."""

    def generate_surely(self, prompts: Sequence[Prompt]) -> list[tuple[str, float | None]]:
        """The same, and how sure each is: None where no adapter was calibrated for that."""
        return [(text, None) for text in self.generate(prompts)]


class HeadAnswers(Answers, Protocol):
    """What answers through a trained head besides: a bundle or a run, but no bare base."""

    def scored_sets(self, texts: Sequence[Text]) -> list[dict[str, float]]:
        """The probability of each label of each text (multi-label)."""

    def values(self, texts: Sequence[Text]) -> list[float]:
        """The number of each text (regression)."""

    def scored_tags(self, rows: Sequence[Sequence[str]]) -> list[list[ScoredLabel]]:
        """The tag of every word of each row with its score; 0 of a word that is not seen."""

    def rewards(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """A reward adapter's score of each answer."""

    def embed(self, texts: Sequence[str]) -> Any:
        """Embeddings (texts, hidden) of length 1, a float32 array."""


class BundleAnswers(HeadAnswers):
    """A bundle's answers with one of its adapters."""

    def __init__(self, runtime: Any, adapter: str | None) -> None:
        names = tuple(runtime.adapters)
        if adapter is None and len(names) != 1:
            raise InputError(
                "which adapter?",
                where=str(runtime.folder),
                expected=f"--adapter with {some_of(names)}",
            )
        self.runtime = runtime
        self.adapter = adapter if adapter is not None else names[0]
        packed = runtime.adapter(self.adapter)
        self.labels = tuple(packed.labels) if packed.labels is not None else None
        self.task: str = packed.task or "text-generation"
        self.problem = packed.problem
        self.prompt_format = PromptFormat(**(packed.prompt_format or {}))
        self.confidence: Confidence = packed.confidence
        self._calibrated = answer_confidence_of(packed.metadata) is not None
        own = shaping(packed.generation)
        self.notes = (
            (
                (
                    f"every answer is shaped by the adapter's own {', '.join(own)}, which a run in"
                    " torch is not"
                ),
            )
            if own
            else ()
        )

    def scored(self, texts: Sequence[Text]) -> list[ScoredLabel]:
        """The label of each text with its score."""
        return [
            ScoredLabel(answer.likeliest, answer.score, answer.rejected is not None)
            for answer in self.runtime.classify(texts, adapter=self.adapter, truncate=True)
        ]

    def scored_sets(self, texts: Sequence[Text]) -> list[dict[str, float]]:
        """The probability of each label of each text (multi-label)."""
        return [
            answer.scores
            for answer in self.runtime.classify(texts, adapter=self.adapter, truncate=True)
        ]

    def values(self, texts: Sequence[Text]) -> list[float]:
        """The number of each text (regression)."""
        return [
            answer.value
            for answer in self.runtime.classify(texts, adapter=self.adapter, truncate=True)
        ]

    def scored_tags(self, rows: Sequence[Sequence[str]]) -> list[list[ScoredLabel]]:
        """The tag of every word of each row with its score."""
        return [
            [ScoredLabel(word.tag, word.score) for word in answer.words]
            for answer in self.runtime.tag(rows, adapter=self.adapter, truncate=True)
        ]

    def rewards(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """A reward adapter's score of each answer."""
        scores: list[float] = self.runtime.score(
            list(zip(prompts, completions, strict=True)), adapter=self.adapter, truncate=True
        )
        return scores

    def embed(self, texts: Sequence[str]) -> Any:
        """Embeddings (texts, hidden) of length 1, a float32 array."""
        return self.runtime.embed(texts, adapter=self.adapter, truncate=True)

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """The completion of each prompt, greedily, as long as the adapter's own limit allows."""
        return [text for text, _ in self._generated(prompts, confidence=False)]

    def generate_surely(self, prompts: Sequence[Prompt]) -> list[tuple[str, float | None]]:
        """The same, and how sure each is where the adapter was calibrated for that."""
        return self._generated(prompts, confidence=self._calibrated)

    def _generated(
        self, prompts: Sequence[Prompt], *, confidence: bool
    ) -> list[tuple[str, float | None]]:
        return [
            (answer.text, answer.confidence)
            for answer in self.runtime.generate(
                prompts, adapter=self.adapter, temperature=0.0, confidence=confidence
            )
        ]
