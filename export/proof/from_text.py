"""The proof's last step: a few rows from text to final answer, through transformers and PEFT as
somebody without edgetune calls them, and through the runtime's own calls.

Logits of the same ids say nothing of what stands around them: the template, the tokens that end an
answer, how ids become text again, the order of labels. Here both sides begin with the text and end
with what a user reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune.core.arrays import Float32
from edgetune.core.errors import EdgetuneError, ProofError
from edgetune.core.tasks import REWARD, TAGGING
from edgetune.core.templates import chat_messages, with_system
from edgetune.data.labels import labelled_rows
from edgetune.data.preferences import preference_rows
from edgetune.data.prompts import PromptFormat
from edgetune.data.tagging import tagged_rows
from edgetune.data.targets import multi_label_rows, value_rows
from edgetune.evaluation.measures import grouped_questions
from edgetune.evaluation.torch_answers import TorchAnswers, first_part
from edgetune.export.inputs.sources import AdapterSource
from edgetune.export.proof.greedy import generate_ids, greedy_alone, next_logits, until_end
from edgetune.export.proof.probe import TEXTS
from edgetune.export.proof.task_metric import ALONE, FREE
from edgetune.export.proof.task_rows import rows_of
from edgetune.export.proof.torch_model import judged_by, reference_base, torch_model
from edgetune.metrics.error_analysis import set_of
from edgetune.models.base import Base
from edgetune.models.heads import pool
from edgetune.models.load import load_body, plain_tokenizer, quiet
from edgetune.runtime import Runtime
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.tasks.open_bundle import OpenBundle

ROWS, NEW_TOKENS = 3, 24
TIES = {"fp32": 0.01, "fp16": 0.1}
"""Nats between two tokens that rounding may turn around. At 8 and 4 bits whether answers keep is
for the task metric."""
PROBABILITY = {"fp32": 1e-3, "fp16": 2e-2}
"""What a probability, a score or a cosine may differ by."""


@dataclass(frozen=True)
class FromText:
    """Of one adapter: the rows that went all the way on both sides."""

    kind: str
    """completions, labels, tags, scores or embeddings"""
    rows: int
    same: int
    """rows with the same answer"""
    largest: float | None = None
    """difference of a probability, a score, or of a cosine from 1; None of text and tags"""
    ties: int = 0
    """other answers of which torch itself cannot tell which is likelier"""
    others: tuple[tuple[str, str, str], ...] = ()
    """text, transformers' answer and the bundle's, of the rows that differ"""
    not_applied: Mapping[str, Any] = field(default_factory=dict)
    """what generation_config.json asks of greedy answers, and a bundle does not apply"""
    failures: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)

    def line(self) -> str:
        """For a person."""
        how = f"{self.same} of {self.rows} {self.kind} from text as transformers gives them"
        how += f", {self.ties} of the others a tie" if self.ties else ""
        how += "" if self.largest is None else f", largest difference {self.largest:.1e}"
        left = ", ".join(f"{name} {value}" for name, value in self.not_applied.items())
        return how + (
            f"; not applied on the device, as generation_config.json says: {left}" if left else ""
        )


def prove_from_text(
    folder: Path,
    manifest: Manifest,
    base: Base,
    sources: Sequence[AdapterSource],
    *,
    threads: int | None = None,
) -> dict[str, FromText]:
    """Every adapter, and the base where it answers by itself. ProofError names the first row that
    differs by more than rounding.
    """
    found: dict[str, FromText] = {}
    tokenizer = plain_tokenizer(base)
    with Runtime(OpenBundle(folder, manifest, threads=threads)) as runtime:
        for source in sources:
            reference = reference_base(base, source.metadata, manifest)
            walk = _Walk(runtime, tokenizer, reference, source, judged_by(manifest, reference))
            if (one := walk.taken()) is not None:
                found[source.name] = one
        if not sources or (base.kind == "encoder" and manifest.mode == "separate"):
            walk = _Walk(runtime, tokenizer, base, None, judged_by(manifest, base))
            if (one := walk.taken()) is not None:
                found[ALONE] = one
    failed = {name: one.failures[0] for name, one in found.items() if one.failures}
    if failed:
        reasons = "; ".join(f"{name}: {failure}" for name, failure in failed.items())
        raise ProofError(
            f"from text to answer the bundle is not what transformers is: {reasons}",
            where=str(folder),
            fix="Nothing was written. Please report the base and this line.",
        )
    return found


@dataclass(frozen=True)
class _Walk:
    """One adapter (or the base) from text to answer on both sides."""

    runtime: Runtime
    tokenizer: Any
    base: Base
    source: AdapterSource | None
    judged: str  # name of the precision whose rounding is in the answers

    @property
    def name(self) -> str | None:
        return None if self.source is None else self.source.name

    @property
    def _ends(self) -> set[int]:
        return set(self.runtime.manifest.tokenizer.eos_token_ids)

    @property
    def form(self) -> PromptFormat:
        recorded = {} if self.source is None else self.source.metadata.get("prompt_format")
        return PromptFormat(**(recorded or {}))

    def taken(self) -> FromText | None:
        """None where there is nothing to answer."""
        source = self.source
        if self.base.kind == "encoder" and (source is None or source.labels is None):
            return self._embeddings() if source is None else None
        if source is not None and source.task == REWARD:
            return self._scores()
        if source is not None and source.task == TAGGING:
            return self._tags()
        if source is not None and source.labels is not None:
            return self._labels()
        return self._completions()

    def _asked(
        self, read: Callable[..., Any], of: Callable[[Any], Any], plain: Sequence[Any]
    ) -> Any:
        """Questions of the recipe's rows as `read` reads them, else `plain` ones. A row that spells
        a control token is left out: to transformers alone it would be one.
        """
        try:
            rows = {} if self.source is None else rows_of([self.source], limit=ROWS)
            found = [
                of(row)
                for one in rows.values()
                for row in read(one.rows, self.form, skip_invalid=True)[0]
            ]
        except EdgetuneError:
            found = []
        control = tuple(self.tokenizer.get_added_vocab())
        usable = [
            one
            for one in [*found, *plain]
            if not getattr(one, "tools", None) and not any(token in str(one) for token in control)
        ]
        return usable[:ROWS]

    def _torch(self) -> TorchAnswers:
        assert self.source is not None
        # an adapter of another tool says none of this itself; the bundle then reads as its template
        chat = {"template": "chat"} if self.tokenizer.chat_template else None
        told = {
            "task": self.source.task,
            "problem": self.source.problem,
            "labels": self.source.labels,
            "prompt_format": chat,
            "generation": None,
            "max_length": self.base.max_length,
        }
        model = torch_model(self.base, self.source)
        recorded = {key: value for key, value in self.source.metadata.items() if value is not None}
        # what is compared is logits: both sides make them scores as the bundle does
        shipped = self.runtime.adapter(self.source.name).metadata.get("confidence")
        return TorchAnswers(model, self.tokenizer, {**told, **recorded, "confidence": shipped})

    def _judge(
        self,
        kind: str,
        theirs: Sequence[Any],
        ours: Sequence[Any],
        asked: Sequence[Any],
        largest: float | None = None,
    ) -> FromText:
        """Answers that can be compared as they are."""
        others = [
            (str(text), str(one), str(other))
            for text, one, other in zip(asked, theirs, ours, strict=True)
            if one != other
        ]
        failures = []
        bound = PROBABILITY.get(self.judged)
        if bound is not None and (others if largest is None else not largest <= bound):
            what = (
                f"{others[0][0]!r}: {others[0][1]} and {others[0][2]}" if others else repr(asked[0])
            )
            failures.append(
                f"{kind} of {what:.200}"
                + ("" if largest is None else f" differ by {largest:.2g}, bound {bound:g}")
            )
        return FromText(
            kind,
            len(asked),
            len(asked) - len(others),
            largest,
            0,
            tuple(others),
            {},
            tuple(failures),
        )

    def _labels(self) -> FromText:
        assert self.source is not None
        read = {"multi-label": multi_label_rows, "regression": value_rows}.get(
            self.source.problem or "", labelled_rows
        )
        pairs = list(itertools.pairwise(TEXTS))
        asked = self._asked(read, lambda row: row.text, pairs if self.form.text_pair else TEXTS)
        torch_side = self._torch()
        with torch.no_grad():
            logits = torch_side.class_logits(asked)
        if self.source.problem == "regression":
            expected = logits.numpy()
        else:
            several = self.source.problem == "multi-label"
            logits = logits / torch_side.confidence.temperature
            expected = (logits.sigmoid() if several else logits.softmax(-1)).numpy()
        answers = self.runtime.classify(asked, self.name, truncate=True)
        names = self.source.labels or ()  # in the order of the head's rows
        if self.source.problem == "regression":
            names = tuple(answers[0].scores)
        got = np.array([[one.scores[label] for label in names] for one in answers])
        scale = max(1.0, float(np.abs(expected).max()))
        theirs: Sequence[Any]
        ours: Sequence[Any]
        if self.source.problem == "regression":
            theirs = ours = [None] * len(asked)
        elif self.source.problem == "multi-label":
            theirs = [set_of(scores) for scores in torch_side.scored_sets(asked)]
            ours = [one.labels for one in answers]
        else:
            theirs = [names[at] for at in expected.argmax(-1)]
            ours = [one.likeliest for one in answers]
        return self._judge(
            "labels", theirs, ours, asked, float(np.abs(expected - got).max()) / scale
        )

    def _tags(self) -> FromText:
        words = self._asked(tagged_rows, lambda row: row.words, [text.split() for text in TEXTS])
        ours = [list(one.tags) for one in self.runtime.tag(words, self.name, truncate=True)]
        theirs = [[one.label for one in tags] for tags in self._torch().scored_tags(words)]
        return self._judge("tags", theirs, ours, words)

    def _scores(self) -> FromText:
        plain = list(itertools.pairwise(TEXTS))
        asked = self._asked(preference_rows, lambda row: (row.prompt, row.chosen), plain)
        theirs = self._torch().rewards(*map(list, zip(*asked, strict=True)))  # type: ignore[arg-type]
        ours = self.runtime.score(asked, self.name, truncate=True)
        scale = max(1.0, max(map(abs, theirs)))
        largest = max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) / scale
        return self._judge("scores", [None] * len(asked), [None] * len(asked), asked, largest)

    def _embeddings(self) -> FromText:
        """The base's own, as a sentence encoder's folder says they are pooled."""
        encoded = self.tokenizer(
            list(TEXTS),
            padding=True,
            truncation=True,
            max_length=self.base.max_length,
            return_tensors="pt",
            verbose=False,
        )
        with torch.no_grad():
            states = load_body(self.base)(**encoded).last_hidden_state
            pooled = pool(states, encoded["attention_mask"], self.base.pooling or "mean")
        theirs: Float32 = torch.nn.functional.normalize(pooled, dim=-1).numpy()
        ours = self.runtime.embed(TEXTS, truncate=True)
        largest = float(np.abs(1 - (theirs * ours).sum(-1)).max())
        nothing = [None] * len(TEXTS)
        return self._judge("embeddings", nothing, nothing, TEXTS, largest)

    def _completions(self) -> FromText | None:
        asked = self._asked(grouped_questions, lambda row: row.prompt, TEXTS)
        asked = [one for one in asked if self._fits(one)]
        if not asked:
            return None
        model, left = greedy_alone(self._strangers_model())
        same, ties, others, failures = 0, 0, [], []
        ours = self.runtime.generate(asked, self.name, **{**FREE, "max_new_tokens": NEW_TOKENS})
        for prompt, answer in zip(asked, ours, strict=True):
            ids = self._ids(prompt)
            if ids != (got := self.runtime.prompt_ids(prompt, self.name)):
                failures.append(
                    f"the prompt {str(prompt)[:80]!r} is read as {got}, by transformers as {ids}"
                )
                continue
            theirs = until_end(generate_ids(model, ids, most=NEW_TOKENS), self._ends)
            text = first_part(
                self.tokenizer.decode(theirs, skip_special_tokens=True), self._stops()
            )
            if text == answer.text:
                same += 1
                continue
            others.append((str(prompt), text, answer.text))
            tie = self._is_tie(model, ids, theirs, list(answer.token_ids))
            ties += tie is True
            if tie is None or (tie is False and self.judged in TIES):
                failures.append(
                    f"{str(prompt)[:80]!r} is answered {answer.text!r}, by transformers {text!r}"
                )
        return FromText(
            "completions", len(asked), same, None, ties, tuple(others), left, tuple(failures)
        )

    def _fits(self, prompt: Any) -> bool:
        try:
            return (
                len(self.runtime.prompt_ids(prompt, self.name)) + NEW_TOKENS < self.base.max_length
            )
        except EdgetuneError:
            return False

    def _stops(self) -> Sequence[str]:
        generation = None if self.source is None else self.source.metadata.get("generation")
        stops: Sequence[str] = (generation or {}).get("stop") or ()
        return stops

    def _ids(self, prompt: Any) -> list[int]:
        """As somebody without edgetune turns a prompt into ids."""
        recorded = self.source is not None and bool(self.source.metadata.get("prompt_format"))
        plain = self.form.template == "plain" if recorded else not self.tokenizer.chat_template
        if isinstance(prompt, str) and plain:
            ids: list[int] = self.tokenizer(prompt, verbose=False)["input_ids"]
            return ids
        messages = (
            chat_messages(prompt, system=self.form.system)
            if isinstance(prompt, str)
            else with_system(prompt, system=self.form.system)
        )
        encoded = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])

    def _strangers_model(self) -> Any:
        """The base by its Auto class and the adapter by PEFT; other tools' folders and codes, which
        PEFT may not read, as edgetune reads them.
        """
        source = self.source
        if source is None or source.is_model or not source.metadata or source.coded:
            return torch_model(self.base, source)
        from peft import PeftModel

        with quiet():
            return PeftModel.from_pretrained(load_body(self.base), str(source.folder)).eval()

    def _is_tie(
        self, model: Any, ids: list[int], theirs: list[int], ours: list[int]
    ) -> bool | None:
        """Whether torch itself can hardly tell the first tokens that differ apart; None where the
        tokens are the same, and only the text is not.
        """
        ends, ours = self._ends, until_end(ours, self._ends)
        if theirs == ours:
            return None
        at = next(
            (at for at, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b),
            min(len(theirs), len(ours)),
        )
        logits = next_logits(model, ids, theirs[:at])
        first, second = (
            logits[side[at]]
            if at < len(side)
            else logits[sorted(ends)].max()
            if ends
            else logits.max()
            for side in (theirs, ours)
        )
        return float(first - second) <= TIES.get(self.judged, 0.1)
