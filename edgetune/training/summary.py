"""What a run says about itself: summary.json, the adapter's metadata, and its first and last
words.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from edgetune import __version__
from edgetune.adapters.folder import AdapterMetadata
from edgetune.core.answer_confidence import GENERATION_KIND, answer_confidence_of
from edgetune.core.confidence import confidence_of
from edgetune.core.memory import peak_rss_mb
from edgetune.core.progress import duration
from edgetune.core.text import outside_tag
from edgetune.data.examples import ExampleSet, rows_behind
from edgetune.metrics.statistics import headline
from edgetune.models.base import Base
from edgetune.models.torch_device import peak_device_mb
from edgetune.quantisation.blocks import ROUNDING
from edgetune.recipe.schema import Recipe
from edgetune.training.context import ResolvedRun, ResolvedStage
from edgetune.training.loop import StageResult

TENTH, FEW = 0.1, 3  # of a stage's steps, that many at least where there are
RISE = 1.1  # times as much loss at the end as at the beginning is no chance of its rows
PACKAGES = ("torch", "transformers", "peft", "numpy", "sklearn")


@dataclass(frozen=True)
class RunSummary:
    """summary.json: what came out and what it came from."""

    task: str
    base: dict[str, str]  # {"name", "digest"}
    metrics: dict[
        str, float
    ]  # on the validation rows, of the weights that are kept; none without such rows
    base_metrics: (
        dict[str, float] | None
    )  # the same with the adapter off; None where the base has no trained head
    effect: dict[
        str, float
    ]  # adapter on against off: mean_kl (nats), mean_logit_change, top1_changed (share)
    effect_rows: str  # "validation" or "train"
    train_loss: float
    stages: list[
        dict[str, Any]
    ]  # steps, tokens, padded_tokens, seconds, tokens_per_second, precision
    trainable_parameters: int
    tokens_per_second: float  # real tokens, padding not counted, validation not timed
    training_seconds: float
    seconds: float  # everything, loading included
    peak_rss_mb: float  # of this run; where that cannot be told (macOS), of its process so far
    peak_device_mb: float | None  # of tensors on the GPU; None on the CPU
    data: list[
        dict[str, Any]
    ]  # a stage each: digests, rows, skipped, truncated, validation_rows_measured
    seed: int
    threads: int
    device: str
    processes: int
    versions: dict[str, str]
    out: str
    # how the base's weights were rounded; None: not at all
    base_precision: dict[str, Any] | None = None
    # numbers for what the recipe left open ("auto"), by dotted key
    chosen: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] | None = None  # what a search of the settings came to
    # general ability before and after, where the recipe asks for it
    forgetting: list[dict[str, Any]] | None = None
    # of each judge, by name: see `judge_facts`
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    # of labels: what was fitted on the validation rows, see `core.confidence`, and what it gives
    # there
    confidence: dict[str, Any] | None = None
    # of labels: figures a class, confusions, worst validation rows, see `metrics.error_analysis`
    analysis: dict[str, Any] | None = None
    # what the figures above do not show by themselves, a line each; said at the end of the run
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunResult:
    """What a run came to."""

    recipe: Recipe  # as trained, every "auto" settled
    summary: RunSummary
    records: Sequence[Mapping[str, Any]]  # of metrics.jsonl


def summary_of(
    run: ResolvedRun,
    results: Sequence[StageResult],
    measured: Mapping[str, Any],
    *,
    trainable: int,
    seconds: float,
    processes: int,
    out: Path,
) -> RunSummary:
    """What came of a run; `measured` are the metrics and the effect."""
    training_seconds = sum(result.seconds for result in results)
    return RunSummary(
        task=run.task,
        base={"name": run.base.name, "digest": run.base.digest},
        **measured,
        train_loss=results[-1].final_loss,
        stages=[
            stage_facts(stage, result) for stage, result in zip(run.stages, results, strict=True)
        ],
        trainable_parameters=trainable,
        tokens_per_second=sum(result.tokens for result in results) / max(1e-9, training_seconds),
        training_seconds=training_seconds,
        seconds=seconds,
        peak_rss_mb=peak_rss_mb(),
        peak_device_mb=peak_device_mb(run.device),
        data=[data_facts(stage) for stage in run.stages],
        seed=run.seed,
        threads=run.threads,
        device=run.device.type,
        processes=processes,
        versions=versions(),
        out=str(out),
        base_precision=base_precision(run.base),
        chosen=dict(run.chosen),
    )


def base_precision(base: Base) -> dict[str, Any] | None:
    """How the weights that training saw were rounded, for metadata; None where they were not."""
    return None if base.precision is None else base.precision.to_dict() | {"rounding": ROUNDING}


def stage_facts(stage: ResolvedStage, result: StageResult) -> dict[str, Any]:
    """What a stage did, for summary.json."""
    facts = {**asdict(result), "tokens_per_second": result.tokens_per_second}
    return {"method": stage.method, "precision": stage.precision, **facts}


def data_facts(stage: ResolvedStage) -> dict[str, Any]:
    """A stage's rows, for summary.json; `rows` of packed text are sequences. `examples`, where they
    are more or less: pairs of rows with labels, names of labels.
    """
    examples = stage.examples
    rows, made = rows_behind(examples.train), len(examples.train)
    replayed = {} if stage.replay is None else {"replay": len(stage.replay.examples)}
    return {
        "digests": dict(stage.digests),
        "rows": {"train": rows, "validation": rows_behind(examples.validation), **replayed},
        **({"examples": made} if made != rows else {}),
        "skipped": examples.skipped,
        "truncated": examples.truncated,
        "held_out": examples.held_out or 0,
        "taken_for": examples.notes,
        "findings": [finding.to_dict() for finding in examples.findings],
        **({"unseen_words": examples.unseen_words} if examples.unseen_words else {}),
    }


def metadata(run: ResolvedRun, summary: RunSummary) -> AdapterMetadata:
    """What a device needs to know to use the adapter."""
    stage, examples = run.stages[-1], run.stages[-1].examples
    return AdapterMetadata(
        base=summary.base,
        task=run.task,
        labels=examples.labels,
        pooling=run.base.pooling,
        problem=stage.problem if run.task == "sequence-classification" else None,
        head=run.head,
        prompt_format=examples.prompt_format.to_dict(),
        generation=None if run.generation is None else dict(run.generation),
        max_length=examples.max_length,
        metrics=summary.metrics,
        base_precision=summary.base_precision,
        confidence=_confidence(summary),
    )


def _confidence(summary: RunSummary) -> dict[str, Any] | None:
    """What the adapter takes along of the calibration."""
    if summary.confidence is None:
        return None
    facts = {"confidence": summary.confidence}
    return (answer_confidence_of(facts) or confidence_of(facts)).to_dict()


def versions() -> dict[str, str]:
    """Of this package, Python and what training uses."""
    found = {name: str(sys.modules[name].__version__) for name in PACKAGES if name in sys.modules}
    return {"edgetune": __version__, "python": platform.python_version(), **found}


def opening(method: str, learns: str, base: Base, sets: Sequence[ExampleSet]) -> str:
    """What is about to be trained, in a line or two; `learns` says which weights."""
    rows = " + ".join(str(rows_behind(examples.train)) for examples in sets)
    held_out = rows_behind(sets[-1].validation)
    lines = [f"{method} of {base.name}: {rows} rows, {held_out} held out, {learns}"]
    for examples in sets:
        for name, notes in examples.notes.items():
            lines.append(f"{name}: {'; '.join(notes)}")
    for examples in sets:
        mere = [one.line for one in examples.findings if not one.matters]
        lines += [f"rows: {'; '.join(mere)}"] if mere else []
        lines += [f"warning: {one.line}" for one in examples.findings if one.matters]
    for examples in sets:
        for name, counts in examples.unseen_words.items():
            if any(counts.values()):
                lines.append(
                    f"{counts['cut']} {name} words cut off, {counts['no_sub_word']} without a"
                    f" sub-word: they count as {outside_tag(examples.labels or ())}"
                )
    return "\n".join(lines)


def judge_facts(stage: int, summary: RunSummary) -> dict[str, Any]:
    """What came of a judge, for the summary of the run that it is a part of."""
    keys = ("metrics", "base_metrics", "effect", "effect_rows", "train_loss", "seconds")
    return {"stage": stage} | {key: getattr(summary, key) for key in keys}


def results_line(summary: RunSummary) -> str:
    """The metrics, those of the base beside them."""
    base = summary.base_metrics or {}
    metrics = "  ".join(
        f"{name} {value:.4f}" + (f" (base {base[name]:.4f})" if name in base else "")
        for name, value in headline(summary.metrics).items()
    )
    result = metrics or f"train loss {summary.train_loss:.4f}"
    if summary.confidence is not None:
        result += f"\n{_confidence_line(summary.confidence)}"
    return result


def closing(summary: RunSummary) -> str:
    """The result, the speed and the place, a line each."""
    speed = (
        f"{summary.tokens_per_second:,.0f} tokens/s, {duration(summary.seconds)}, peak"
        f" {summary.peak_rss_mb:,.0f} MB"
    )
    return f"{results_line(summary)}\n{speed}\nwritten to {summary.out}"


def _confidence_line(found: Mapping[str, Any]) -> str:
    if found.get("kind") == GENERATION_KIND:
        return (
            f"confidence of answers, by {found['rows']:,} rows: calibration error"
            f" {found['expected_calibration_error_before']:.3f} to"
            f" {found['expected_calibration_error']:.3f}"
        )
    line = (
        f"confidence: temperature {found['temperature']:.2f}, calibration error"
        f" {found['expected_calibration_error_before']:.3f} to"
        f" {found['expected_calibration_error']:.3f}"
    )
    if found["threshold"] is None:
        return line
    return (
        f"{line}; below a score of {found['threshold']:.2f} no answer:"
        f" {found['share_answered']:.1%} of the validation rows answered,"
        f" {found['accuracy_answered']:.1%} of them right"
    )


def warnings_of(run: ResolvedRun, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each stage whose training loss ended higher than it began (grpo's says nothing
    about that), by the means of some steps, for single ones differ by their rows; and for each
    finding in its rows that matters.
    """
    lines = []
    for stage in run.stages:
        name = f"stage {stage.index} ({stage.method})"
        losses = [r["loss"] for r in records if r["kind"] == "train" and r["stage"] == stage.index]
        count = max(1, min(FEW, len(losses) // 2), int(TENTH * len(losses)))
        began, ended = fmean(losses[:count] or [0.0]), fmean(losses[-count:] or [0.0])
        if stage.method != "grpo" and ended > RISE * began:
            lines.append(
                f"the loss of {name} ended higher than it began: {began:.4f} to {ended:.4f}, the"
                f" means of its first and its last {count} steps; a lower learning_rate may help"
            )
        lines += [f"{name}: {one.line}" for one in stage.examples.findings if one.matters]
    return lines
