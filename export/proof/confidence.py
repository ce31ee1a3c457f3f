"""How sure a bundle is of its answers: temperature and threshold fitted again where rounding moved
the scores that training fitted them on.

The rows are those of the training, token for token; what answers them is the bundle's own engine. A
bundle in fp32 has the trained model's scores, so it ships what training fitted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.adapters.folder import write_metadata
from edgetune.core.answer_confidence import AnswerConfidence, answer_confidence_of
from edgetune.core.confidence import Confidence, confidence_of
from edgetune.core.errors import EdgetuneError
from edgetune.core.files import read_json
from edgetune.core.layout import ADAPTER_METADATA, ADAPTERS, RECIPE, SUMMARY
from edgetune.core.progress import Say
from edgetune.core.tag_sequences import likeliest_tags
from edgetune.core.tasks import TAGGING
from edgetune.data.batching import IGNORE, VALIDATION_TOKENS, last_answer, rows_within
from edgetune.data.examples import ExampleSet
from edgetune.export.inputs.calibration_text import run_examples
from edgetune.export.inputs.sources import AdapterSource
from edgetune.metrics.confidence import FEWEST_ROWS, LabelledLogits, WrittenAnswers
from edgetune.models.base import Base
from edgetune.models.load import load_tokenizer
from edgetune.quantisation.precision import coarsest
from edgetune.recipe.read import load_run_recipe
from edgetune.runtime import Runtime
from edgetune.runtime.bundle.manifest import AdapterEntry, Manifest
from edgetune.runtime.tasks.answers import need_finite
from edgetune.runtime.tasks.encoder import ENCODE_ROWS, EncoderAnswers
from edgetune.runtime.tasks.open_bundle import OpenBundle, batches
from edgetune.runtime.tasks.scoring import score_batches


@dataclass(frozen=True)
class ShippedConfidence:
    """Of one adapter: what training fitted, and what ships; each with what it gives on the answers
    to the validation rows as they ship (`metrics.confidence`), where these were taken.
    """

    trained: Mapping[str, Any]
    shipped: Mapping[str, Any]
    kept: str = ""
    """why the trained one ships; "": it was fitted again"""
    warnings: tuple[str, ...] = ()
    confidence: Mapping[str, Any] = field(default_factory=dict)
    """for the adapter"""

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"trained": self.trained, "shipped": self.shipped, "kept": self.kept}

    def line(self) -> str:
        """For a person."""
        if self.kept:
            return f"as fitted on {self.trained['fitted_on']}, not again: {self.kept}"
        parts = [
            f"{words} {shown_figure(self.trained[name], form)} to {shown_figure(after, form)}"
            for name, words, form in FIT_FIGURES
            if (after := self.shipped.get(name)) is not None
        ]
        rows, on = self.shipped["rows"], self.shipped["fitted_on"]
        return "; ".join(
            [f"fitted again on {on} ({rows:,} answers): {', '.join(parts)}", *self.warnings]
        )


FIT_FIGURES = (
    ("temperature", "temperature", ".3f"),
    ("threshold", "no answer below", ".3f"),
    ("share_answered", "answered", ".1%"),
    ("expected_calibration_error", "calibration error", ".3f"),
)
"""key, words for it, form"""


def shown_figure(value: float | None, form: str) -> str:
    """For people; None: there is none, or it was not measured."""
    return "-" if value is None else format(value, form)


def fit_again(
    folder: Path,
    manifest: Manifest,
    base: Base,
    sources: Sequence[AdapterSource],
    *,
    keep: str = "",
    threads: int | None = None,
    say: Say = lambda line: None,
) -> dict[str, ShippedConfidence]:
    """Every adapter that knows how sure it is. `keep`: why none is fitted again."""
    sure = [source for source in sources if source.metadata.get("confidence") is not None]
    if not sure:
        return {}
    if not rounds(manifest):
        return {source.name: as_trained(source, "no weight is rounded") for source in sure}
    if keep:
        found = {source.name: as_trained(source, keep) for source in sure}
    else:
        with Runtime(OpenBundle(folder, manifest, threads=threads)) as runtime:
            found = {source.name: _fitted(runtime, base, source) for source in sure}
    for name, one in found.items():
        say(f"confidence {name}: {one.line()}")
    return found


def rounds(manifest: Manifest) -> bool:
    """Whether any weight of a bundle, or of its adapters, is another one than torch has."""
    stored = [manifest.precision.weights, *manifest.precision.overrides.values()]
    return coarsest(stored) != "fp32" or "adapter_precision" in manifest.quality


def ship(folder: Path, manifest: Manifest, found: Mapping[str, ShippedConfidence]) -> Manifest:
    """Write what was fitted into the bundle's adapters; the manifest with it."""

    def shipped(entry: AdapterEntry) -> AdapterEntry:
        one = found.get(entry.name)
        if one is None or one.kept:
            return entry
        own = dict(one.confidence)
        path = folder / ADAPTERS / entry.name / ADAPTER_METADATA
        if path.is_file():
            metadata = json.loads(path.read_text(encoding="utf-8"))
            write_metadata(path.parent, {**metadata, "confidence": own})
        return entry if entry.confidence is None else replace(entry, confidence=own)

    return replace(manifest, adapters=tuple(map(shipped, manifest.adapters)))


def as_trained(source: AdapterSource, why: str) -> ShippedConfidence:
    """Nothing is fitted again."""
    return ShippedConfidence(_known(source).to_dict(), _known(source).to_dict(), why)


def _known(source: AdapterSource) -> Confidence | AnswerConfidence:
    return answer_confidence_of(source.metadata) or confidence_of(source.metadata)


def refit(
    source: AdapterSource, answers: LabelledLogits | WrittenAnswers, *, fitted_on: str
) -> ShippedConfidence:
    """What these answers to the validation rows ask for. What training fitted stays where they are
    too few, and where a threshold that it found would be lost.
    """
    if isinstance(answers, WrittenAnswers):
        fitted = answers.fit(fitted_on=fitted_on)
    else:
        asked = load_run_recipe(source.folder.parent / RECIPE).confidence
        fitted = answers.fit(asked, fitted_on=fitted_on)
    few = f"its recipe's validation has less than {FEWEST_ROWS} rows"
    if fitted.confidence is None:
        return as_trained(source, "; ".join(fitted.warnings) or few)
    own, before = fitted.confidence.to_dict(), _known(source).to_dict()
    if before.get("threshold") is not None and own["threshold"] is None:
        return as_trained(source, "; ".join(fitted.warnings))
    before |= _figures(source, answers)
    return ShippedConfidence(before, {**own, **(fitted.figures or {})}, "", fitted.warnings, own)


def _figures(source: AdapterSource, answers: LabelledLogits | WrittenAnswers) -> dict[str, Any]:
    """What training's numbers give on these answers."""
    if isinstance(answers, LabelledLogits):
        return answers.figures(confidence_of(source.metadata))
    known = answer_confidence_of(source.metadata)
    return {} if known is None else answers.figures(known)


def _fitted(runtime: Runtime, base: Base, source: AdapterSource) -> ShippedConfidence:
    """Rows that cannot be read any more are no reason to fail an export."""
    try:
        examples = run_examples(source.folder, load_tokenizer(base), base)
        if examples is None:
            return as_trained(source, f"no {RECIPE} beside the adapter names its validation rows")
        if why := moved(source, examples):
            return as_trained(source, why)
        take = _written if answer_confidence_of(source.metadata) else _labelled
        answers = take(runtime, source, examples)
        return refit(source, answers, fitted_on=_fitted_on(runtime.manifest))
    except EdgetuneError as error:
        return as_trained(source, str(error))


def moved(source: AdapterSource, examples: ExampleSet) -> str:
    """Why these are not the rows that the run was measured on; "" where nothing says so."""
    if not examples.validation:
        return "its recipe has no validation rows any more"
    path = source.folder.parent / SUMMARY
    if not path.is_file():
        return ""
    stages = read_json(path, error=EdgetuneError).get("data") or [{}]
    recorded = (stages[-1].get("digests") or {}).get("validation")
    if recorded is None or recorded == examples.digests.get("validation"):
        return ""
    return "its validation rows are others than those of the training"


def _fitted_on(manifest: Manifest) -> str:
    adapters = manifest.quality.get("adapter_precision")
    return manifest.precision.weights + (f", adapters in {adapters}" if adapters else "")


def _labelled(runtime: Runtime, source: AdapterSource, examples: ExampleSet) -> LabelledLogits:
    if source.task == TAGGING:
        return _words(runtime, source, _measured(examples.validation))
    rows = _measured(examples.validation)
    logits = _class_logits(runtime, source, rows)
    if source.problem == "multi-label":  # each label is a choice between no (logit 0) and yes
        yes = logits.reshape(-1)
        pairs = np.stack([np.zeros_like(yes), yes], axis=-1)
        targets = np.array([row.target for row in rows]).reshape(-1).astype(int)
        return LabelledLogits(pairs, targets, pairs[:0])
    outside = _class_logits(runtime, source, _measured(examples.out_of_scope))
    return LabelledLogits(
        logits,
        np.array([row.labels for row in rows], int),
        outside if len(outside) else logits[:0],
    )


def _measured(examples: Sequence[Any]) -> list[Any]:
    """The rows that training measured."""
    lengths = [len(example.input_ids) for example in examples]
    return [examples[at] for at in rows_within(lengths, VALIDATION_TOKENS)] if examples else []


def _class_logits(runtime: Runtime, source: AdapterSource, rows: Sequence[Any]) -> Any:
    """(rows, labels)"""
    opened, ids = runtime.opened, [row.input_ids for row in rows]
    answers, names = EncoderAnswers(opened), [source.name] * len(ids)
    with opened.held(names) as held:
        if opened.decoder is not None:
            logits = answers.read_ids(opened.decoder, ids, names, held)
        else:
            logits, _ = answers.encode_ids(opened.need_encoder(), ids, names, held)
    found = np.array(logits)
    need_finite(found, source.name)
    return found


def _words(runtime: Runtime, source: AdapterSource, rows: Sequence[Any]) -> LabelledLogits:
    """Every word that is seen, and the tags that its sentence chooses."""
    engine, found = runtime.opened.need_encoder(), list[tuple[Any, Any]]()
    scheme = (source.metadata.get("prompt_format") or {}).get("tag_scheme")
    chosen: list[int] = []
    for places in batches([len(row.input_ids) for row in rows], ENCODE_ROWS):
        part = [rows[at] for at in places]
        states, _ = engine.tokens(
            [row.input_ids for row in part],
            [runtime.bound(source.name)] * len(part),
            pad_token_id=runtime.tokenizer.pad_token_id or 0,
        )
        for row, own in zip(part, states, strict=True):
            need_finite(own, source.name)
            seen = np.array(row.labels) != IGNORE
            found.append((own[seen], np.array(row.labels)[seen]))
            words = [None if token is None else own[token] for token in row.first]
            tags = likeliest_tags(words, source.labels or (), scheme=scheme)
            chosen += [tag for tag in tags if tag is not None]
    logits, targets = (np.concatenate(column) for column in zip(*found, strict=True))
    return LabelledLogits(logits, targets, logits[:0], np.array(chosen))


def _written(runtime: Runtime, source: AdapterSource, examples: ExampleSet) -> WrittenAnswers:
    """The last answer of every row, read along the right one in one prefill: see
    `training.answer_confidence`.
    """
    found = list(_scored(runtime, source, _measured(examples.validation)))
    return WrittenAnswers(
        np.array([score for score, _ in found]), np.array([hit for _, hit in found], bool)
    )


def _scored(
    runtime: Runtime, source: AdapterSource, rows: Sequence[Any]
) -> Iterator[tuple[float, bool]]:
    engine, bound = runtime.opened.need_decoder(), runtime.bound(source.name)
    answered = [(row, last) for row in rows if (last := last_answer(row.labels[1:])[1])]
    for places in score_batches([len(row.input_ids) for row, _ in answered]):
        part = [answered[at] for at in places]
        logits = engine.logits(
            [row.input_ids[: last[-1] + 1] for row, last in part],
            [bound] * len(part),
            positions=[last for _, last in part],
        )
        for (row, last), own in zip(part, logits, strict=True):
            need_finite(own, source.name)
            values = own.astype(np.float64)
            sure = -np.log(np.exp(values - values.max(-1, keepdims=True)).sum(-1))
            right = values.argmax(-1) == np.array(row.labels[1:])[last]
            yield float(sure.sum()), bool(right.all())
