"""Recipe → run folder: data, base, adapter, stages, measurements, files."""

from __future__ import annotations

import contextlib
import functools
import io
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from edgetune import __version__
from edgetune.adapters import AdapterMetadata, adapt, save_adapter, trainable_parameters
from edgetune.bases import Base, load_body, load_tokenizer, resolve_base
from edgetune.batching import Batch
from edgetune.errors import TrainingError
from edgetune.examples import ExampleSet, load_examples
from edgetune.files import whole_folder, write_json, write_text
from edgetune.heads import SequenceClassifier
from edgetune.layout import ADAPTER, CURVES, JOURNAL, RECIPE, REPORT, SUMMARY
from edgetune.progress import Progress, duration
from edgetune.recipe import Device, Recipe, Stage, to_toml
from edgetune.report import write_report
from edgetune.runs import check_replaceable
from edgetune.training.checkpoint import State, origin_of, steps_between, unfinished
from edgetune.training.device import choose_device, peak_device_mb
from edgetune.training.distributed import Group, process_group
from edgetune.training.journal import Journal
from edgetune.training.loop import StageResult, total_steps, train_stage
from edgetune.training.measure import (
    EFFECT_TOKENS,
    VALIDATION_TOKENS,
    adapter_effect,
    adapter_off,
    batches_for_measuring,
)
from edgetune.training.methods import METHODS
from edgetune.training.precision import Precision, choose_precision, hold_frozen_linears_in_bf16
from edgetune.training.probe import fit_probe
from edgetune.training.resume import Course, find_state

PACKAGES = ("torch", "transformers", "peft", "numpy", "sklearn")


@dataclass(frozen=True)
class RunSummary:
    """summary.json: what came out and what it came from."""

    task: str
    base: dict[str, str]  # {"name", "digest"}
    metrics: dict[str, float]  # on the validation rows after the last step; training loss when there are none
    base_metrics: dict[str, float] | None  # the same with the adapter off; None where the base has no trained head
    effect: dict[str, float]  # adapter on against off: mean_kl (nats), mean_logit_change, top1_changed (share)
    effect_rows: str  # "validation" or "train"
    train_loss: float
    stages: list[dict[str, Any]]  # steps, tokens, padded_tokens, seconds, tokens_per_second, precision
    trainable_parameters: int
    tokens_per_second: float  # real tokens, padding not counted, validation not timed
    training_seconds: float
    seconds: float  # everything, loading included
    peak_rss_mb: float  # of this process since it started
    peak_device_mb: float | None  # of tensors on the GPU; None on the CPU
    data: list[dict[str, Any]]  # a stage each: digests, rows, skipped, truncated, validation_rows_measured
    seed: int
    threads: int
    device: str
    processes: int
    versions: dict[str, str]
    out: str


def run_recipe(
    recipe: Recipe, *, out: Path | None = None, progress: Progress | None = None, resume: bool = False
) -> RunSummary:
    """Train what the recipe says and write the run folder, whole or not at all.

    `resume` continues an unfinished run of the same recipe and data where its newest checkpoint left it, to the same
    adapter, bit for bit. Raises the errors of recipe, data and base before anything is written; TrainingError when
    training cannot go on.
    """
    started = time.perf_counter()
    folder = Path(recipe.out if out is None else out)
    progress = progress if progress is not None else Progress()
    check_replaceable(folder)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(process_group())
        progress = stack.enter_context(contextlib.closing(progress if group.leads else Progress(io.StringIO())))
        stack.enter_context(_settings(recipe))
        work = unfinished(folder, keep=recipe.keep_checkpoints, say=progress.say) if group.leads else None
        checkpoints = stack.enter_context(work) if work is not None else None
        device = choose_device(recipe.device, local_rank=group.local_rank)
        base = resolve_base(recipe.base)
        tokenizer = load_tokenizer(base)
        sets = _load_data(recipe, tokenizer, base)
        progress.say(_opening(recipe, base, sets))
        origin = origin_of(recipe, base=base.digest, data=[s.digests for s in sets], processes=group.size)
        state, finished = group.from_leader(
            (None, None) if checkpoints is None else find_state(checkpoints, origin, resume=resume, progress=progress)
        )
        if finished is not None:
            return RunSummary(**finished)
        model, pad_id = _build_model(recipe, base, tokenizer, sets[0], device=device)
        group.copy_weights([parameter for parameter in model.parameters() if parameter.requires_grad])
        if group.rank:
            torch.manual_seed(recipe.seed + (group.rank << 32))  # another dropout in every process
        trainable = trainable_parameters(model)
        recipe = group.from_leader(_resolve(recipe, state, hidden=model.config.hidden_size, device=device))
        if all(stage.precision == "bf16" for stage in recipe.stage):
            hold_frozen_linears_in_bf16(model)
        journal = Journal(
            None if checkpoints is None else checkpoints.folder / JOURNAL,
            records=[] if state is None else state.journal,
            curves=None if checkpoints is None else checkpoints.folder / CURVES,
        )
        course = Course(model, recipe, origin, journal, group, checkpoints, state, started)
        results = course.run(
            functools.partial(
                _run_stage, model, recipe, sets=sets, pad_id=pad_id, journal=journal, progress=progress, group=group
            )
        )
        journal.close()
        if not group.leads:
            return cast(RunSummary, group.from_leader(None))
        measured = _measure(model, recipe, sets[-1], journal, pad_id=pad_id)
        summary = RunSummary(
            task=recipe.task,
            base={"name": base.name, "digest": base.digest},
            **measured,
            train_loss=results[-1].final_loss,
            stages=[_stage_facts(stage, result) for stage, result in zip(recipe.stage, results, strict=True)],
            trainable_parameters=trainable,
            tokens_per_second=sum(r.tokens for r in results) / max(1e-9, sum(r.seconds for r in results)),
            training_seconds=sum(result.seconds for result in results),
            seconds=time.perf_counter() - course.started,
            peak_rss_mb=peak_rss_mb(),
            peak_device_mb=peak_device_mb(device),
            data=[_data_facts(examples) for examples in sets],
            seed=recipe.seed,
            threads=torch.get_num_threads(),
            device=device.type,
            processes=group.size,
            versions=_versions(),
            out=str(folder),
        )
        metadata = _metadata(recipe, base, sets[-1], summary)
        with whole_folder(folder) as partial:
            save_adapter(model, partial / ADAPTER, metadata)
            write_text(partial / RECIPE, to_toml(replace(recipe, threads=torch.get_num_threads())))
            write_json(partial / SUMMARY, asdict(summary))
            write_report(partial / REPORT, recipe=recipe, summary=asdict(summary), records=journal.records)
            journal.copy_to(partial)
        group.from_leader(summary)
    progress.say(_closing(summary))
    return summary


@contextlib.contextmanager
def _settings(recipe: Recipe) -> Iterator[None]:
    """Seed and threads of this run; the number of threads is put back afterwards."""
    threads = torch.get_num_threads()
    torch.manual_seed(recipe.seed)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _load_data(recipe: Recipe, tokenizer: Any, base: Base) -> list[ExampleSet]:
    """Every stage's examples, so that a bad row of the last stage is found before the first one trains."""
    sets: list[ExampleSet] = []
    for stage in recipe.stage:
        labels = sets[0].labels if sets else None
        sets.append(load_examples(stage, tokenizer, base, labels, seed=recipe.seed))
    return sets


def _build_model(
    recipe: Recipe, base: Base, tokenizer: Any, examples: ExampleSet, *, device: torch.device
) -> tuple[Any, int]:
    """The base with a fresh adapter (and a head), and the id to pad with."""
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    model = load_body(base)
    if examples.labels is not None:
        model = SequenceClassifier(model, labels=len(examples.labels), pooling=base.pooling or "mean")
        if recipe.stage[0].head_init == "probe":
            fit_probe(model.to(device), examples.train, pad_id=pad_id)
    # Seeded again: what was drawn before (a random head) must not move the adapter's first weights.
    torch.manual_seed(recipe.seed)
    return adapt(model, recipe.parameters, task=recipe.task).to(device), pad_id


def _resolve(recipe: Recipe, state: State | None, *, hidden: int, device: torch.device) -> Recipe:
    """The recipe with every "auto" replaced by what was chosen, so that the run's recipe.toml repeats the run exactly.

    A resumed run keeps the precision it began with: to measure again might choose another.
    """
    settings = [stage.precision for stage in recipe.stage] if state is None else state.precisions
    chosen = {setting: choose_precision(setting, hidden=hidden, device=device) for setting in set(settings)}
    stages = [replace(stage, precision=chosen[s]) for stage, s in zip(recipe.stage, settings, strict=True)]
    return replace(recipe, stage=tuple(stages), device=cast(Device, device.type))


def _run_stage(
    model: Any,
    recipe: Recipe,
    index: int,
    *,
    sets: Sequence[ExampleSet],
    pad_id: int,
    journal: Journal,
    progress: Progress,
    group: Group,
    **resumed: Any,
) -> StageResult:
    stage, examples = recipe.stage[index], sets[index]
    method, precision = METHODS[stage.method], _precision(stage)
    held_out = _validation_batches(examples, pad_id=pad_id) if group.leads else []
    return train_stage(
        model,
        stage,
        examples.train,
        objective=method.objective(stage),
        validate=(lambda trained: method.measure(trained, held_out, precision=precision)) if held_out else None,
        precision=precision,
        pad_id=pad_id,
        seed=recipe.seed + index,
        stage_index=index,
        journal=journal,
        progress=progress,
        group=group,
        save_every=steps_between(recipe, total_steps(stage, len(examples.train))),
        **resumed,
    )


def _measure(
    model: Any, recipe: Recipe, examples: ExampleSet, journal: Journal, *, pad_id: int
) -> dict[str, Any]:
    """Final metrics, the base's, and the adapter's effect; on training rows when there are no others."""
    stage = recipe.stage[-1]
    method, precision = METHODS[stage.method], _precision(stage)
    held_out = _validation_batches(examples, pad_id=pad_id)
    last = journal.last("validation")
    metrics = {k: v for k, v in (last or {}).items() if k not in {"kind", "stage", "step"}}
    base_metrics = None
    if held_out and (examples.labels is None or recipe.stage[0].head_init == "probe"):
        with adapter_off(model):
            base_metrics = method.measure(model, held_out, precision=precision)
    rows = examples.validation or examples.train
    sample = batches_for_measuring(rows, pad_id=pad_id, tokens=EFFECT_TOKENS, batch_size=64)
    effect = adapter_effect(model, sample, method.outputs, precision=precision)
    if effect["mean_logit_change"] == 0.0:
        raise TrainingError(
            "the trained adapter changes nothing", got="mean logit change 0", fix="Raise learning_rate or epochs."
        )
    return {
        "metrics": metrics,
        "base_metrics": base_metrics,
        "effect": effect,
        "effect_rows": "validation" if examples.validation else "train",
    }


def _validation_batches(examples: ExampleSet, *, pad_id: int) -> Sequence[Batch]:
    if not examples.validation:
        return []
    return batches_for_measuring(examples.validation, pad_id=pad_id, tokens=VALIDATION_TOKENS, batch_size=64)


def _precision(stage: Stage) -> Precision:
    return "bf16" if stage.precision == "bf16" else "fp32"


def _stage_facts(stage: Stage, result: StageResult) -> dict[str, Any]:
    facts = {**asdict(result), "tokens_per_second": result.tokens_per_second}
    return {"method": stage.method, "precision": stage.precision, **facts}


def _data_facts(examples: ExampleSet) -> dict[str, Any]:
    return {
        "digests": examples.digests,
        "rows": {"train": len(examples.train), "validation": len(examples.validation)},
        "skipped": examples.skipped,
        "truncated": examples.truncated,
    }


def _metadata(recipe: Recipe, base: Base, examples: ExampleSet, summary: RunSummary) -> AdapterMetadata:
    """What a device needs to know to use the adapter."""
    longest = max((_completion_length(e.labels) for e in examples.train + examples.validation), default=0)
    return AdapterMetadata(
        base=summary.base,
        task=recipe.task,
        labels=examples.labels,
        pooling=base.pooling,
        prompt_format=examples.prompt_format.to_dict(),
        generation={"max_new_tokens": longest + 16} if examples.labels is None else None,
        max_length=examples.max_length,
        metrics=summary.metrics,
    )


def _completion_length(labels: list[int] | int) -> int:
    return sum(label >= 0 for label in labels) if isinstance(labels, list) else 0


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _versions() -> dict[str, str]:
    found = {name: str(sys.modules[name].__version__) for name in PACKAGES if name in sys.modules}
    return {"edgetune": __version__, "python": platform.python_version(), **found}


def _opening(recipe: Recipe, base: Base, sets: Sequence[ExampleSet]) -> str:
    rows = " + ".join(str(len(examples.train)) for examples in sets)
    held_out = len(sets[-1].validation)
    p = recipe.parameters
    lines = [f"{recipe.stage[-1].method} of {base.name}: {rows} rows, {held_out} held out, LoRA r={p.rank} alpha={p.alpha:g}"]
    for what in ("skipped", "truncated"):
        counts = {name: count for examples in sets for name, count in getattr(examples, what).items() if count}
        lines += [f"{count} {name} rows {what}" for name, count in counts.items()]
    return "\n".join(lines)


def _closing(summary: RunSummary) -> str:
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in summary.metrics.items())
    result = metrics or f"train loss {summary.train_loss:.4f}"
    speed = f"{summary.tokens_per_second:,.0f} tokens/s, {duration(summary.seconds)}, peak {summary.peak_rss_mb:,.0f} MB"
    return f"{result}\n{speed}\nwritten to {summary.out}"
