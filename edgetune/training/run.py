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
from edgetune.adapters import AdapterMetadata, save_adapter, trainable_parameters
from edgetune.bases import Base, load_tokenizer, resolve_base
from edgetune.batching import Batch
from edgetune.errors import TrainingError
from edgetune.examples import ExampleSet, load_examples
from edgetune.files import whole_folder, write_json, write_text
from edgetune.forgetting import compare
from edgetune.full_model import save_full
from edgetune.layout import ADAPTER, CURVES, JOURNAL, RECIPE, REPORT, SUMMARY
from edgetune.progress import Progress, duration
from edgetune.recipe import Device, Recipe, Stage, to_toml
from edgetune.report import what_learns, write_report
from edgetune.runs import check_replaceable
from edgetune.training.checkpoint import Position, State, origin_of, steps_between, unfinished
from edgetune.training.device import choose_device, peak_device_mb
from edgetune.training.distributed import Group, process_group
from edgetune.training.journal import Journal
from edgetune.training.loop import StageResult, total_steps, train_stage
from edgetune.training.measure import (
    EFFECT_TOKENS,
    VALIDATION_TOKENS,
    adapter_effect,
    batches_for_measuring,
)
from edgetune.training.methods import METHODS
from edgetune.training.precision import Precision, choose_precision, hold_frozen_linears_in_bf16
from edgetune.training.replay import ReplayText, load_replay
from edgetune.training.resume import Course, find_state
from edgetune.training.succession import Succession

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
    forgetting: list[dict[str, Any]] | None = None  # general ability before and after, where the recipe asks for it


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
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        replays = [
            load_replay(stage, examples.train, tokenizer, limit=examples.max_length, pad_id=pad_id, seed=recipe.seed + index)
            for index, (stage, examples) in enumerate(zip(recipe.stage, sets, strict=True))
        ]
        digests = [_digests(examples, replay) for examples, replay in zip(sets, replays, strict=True)]
        origin = origin_of(recipe, base=base.digest, data=digests, processes=group.size)
        state, finished = group.from_leader(
            (None, None) if checkpoints is None else find_state(checkpoints, origin, resume=resume, progress=progress)
        )
        if finished is not None:
            return RunSummary(**finished)
        succession = Succession(recipe, base, sets, pad_id=pad_id, device=device)
        model, sets = succession.model, succession.sets
        group.copy_weights([parameter for parameter in succession.learning.parameters() if parameter.requires_grad])
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
        course = Course(succession.learning, recipe, origin, journal, group, checkpoints, state, started)
        results = course.run(
            functools.partial(
                _run_stage, succession, recipe, replays=replays, pad_id=pad_id, journal=journal, progress=progress, group=group
            )
        )
        journal.close()
        if not group.leads:
            return cast(RunSummary, group.from_leader(None))
        succession.finish()
        measured = _measure(succession, recipe, sets[-1], journal, pad_id=pad_id)
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
            data=[_data_facts(examples, replay) for examples, replay in zip(sets, replays, strict=True)],
            seed=recipe.seed,
            threads=torch.get_num_threads(),
            device=device.type,
            processes=group.size,
            versions=_versions(),
            out=str(folder),
            forgetting=_forgetting(succession, recipe, base, tokenizer, progress),
        )
        metadata = _metadata(recipe, base, sets[-1], summary)
        with whole_folder(folder) as partial:
            if recipe.parameters.train == "full":
                save_full(model, partial, final=folder, base=base, metadata=metadata)
            else:
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
        labels = next((examples.labels for examples in sets if examples.labels is not None), None)
        sets.append(load_examples(stage, tokenizer, base, labels, seed=recipe.seed))
    return sets


def _resolve(recipe: Recipe, state: State | None, *, hidden: int, device: torch.device) -> Recipe:
    """The recipe with every "auto" replaced by what was chosen, so that the run's recipe.toml repeats the run exactly.

    A resumed run keeps the precision it began with: to measure again might choose another.
    """
    settings = [stage.precision for stage in recipe.stage] if state is None else state.precisions
    chosen = {setting: choose_precision(setting, hidden=hidden, device=device) for setting in set(settings)}
    stages = [replace(stage, precision=chosen[s]) for stage, s in zip(recipe.stage, settings, strict=True)]
    return replace(recipe, stage=tuple(stages), device=cast(Device, device.type))


def _run_stage(
    succession: Succession,
    recipe: Recipe,
    index: int,
    *,
    replays: Sequence[ReplayText | None],
    pad_id: int,
    journal: Journal,
    progress: Progress,
    group: Group,
    **resumed: Any,
) -> StageResult:
    stage, examples = recipe.stage[index], succession.sets[index]
    method, precision = METHODS[stage.method], _precision(stage)
    held_out = _validation_batches(examples, pad_id=pad_id) if group.leads else []
    position: Position | None = resumed.get("position")
    return train_stage(
        succession.for_stage(index, begins=position is None or position.step == 0),
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
        prepare=examples.prepare,
        replay=replays[index],
        save_every=steps_between(recipe, total_steps(stage, len(examples.train))),
        **resumed,
    )


def _measure(
    succession: Succession, recipe: Recipe, examples: ExampleSet, journal: Journal, *, pad_id: int
) -> dict[str, Any]:
    """Final metrics, the base's, and the adapter's effect; on training rows when there are no others."""
    stage, model = recipe.stage[-1], succession.model
    method, precision = METHODS[stage.method], _precision(stage)
    held_out = _validation_batches(examples, pad_id=pad_id)
    last = (journal.last("validation") if held_out else None) or {}
    metrics = {k: v for k, v in last.items() if k not in {"kind", "stage", "step"}}
    base_metrics = None
    without_answer = succession.fresh_head or recipe.stage[succession.first].head_init == "random"
    if held_out and not (without_answer and recipe.task != "text-generation"):
        with succession.before() as base_model:
            base_metrics = method.measure(base_model, held_out, precision=precision)
    rows = examples.validation or examples.train
    sample = _prepared(batches_for_measuring(rows, pad_id=pad_id, tokens=EFFECT_TOKENS, batch_size=64), examples)
    effect = adapter_effect(model, sample, method.outputs, precision=precision, before=succession.before)
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


def _forgetting(
    succession: Succession, recipe: Recipe, base: Base, tokenizer: Any, progress: Progress
) -> list[dict[str, Any]] | None:
    """The `[forgetting]` table's tasks, on the model without and with what it learned."""
    wanted = recipe.forgetting
    if wanted is None:
        return None
    from edgetune.forgetting.torch_subject import TorchSubject  # which needs this package whole

    subject = TorchSubject(
        tokenizer, kind=base.kind, limit=base.max_length, pooling=base.pooling, before=succession.before,
        after=lambda: contextlib.nullcontext(succession.model), precision=_precision(recipe.stage[-1]),
    )  # fmt: skip
    found = compare(subject, Path(wanted.general), limit=wanted.limit, tasks=wanted.tasks, say=progress.say)
    return [asdict(general) for general in found]


def _validation_batches(examples: ExampleSet, *, pad_id: int) -> Sequence[Batch]:
    if not examples.validation:
        return []
    batches = batches_for_measuring(examples.validation, pad_id=pad_id, tokens=VALIDATION_TOKENS, batch_size=64)
    return _prepared(batches, examples)


def _prepared(batches: Sequence[Batch], examples: ExampleSet) -> Sequence[Batch]:
    """Batches for measuring, the same every time."""
    return batches if examples.prepare is None else [examples.prepare(batch, 0) for batch in batches]


def _precision(stage: Stage) -> Precision:
    return "bf16" if stage.precision == "bf16" else "fp32"


def _stage_facts(stage: Stage, result: StageResult) -> dict[str, Any]:
    facts = {**asdict(result), "tokens_per_second": result.tokens_per_second}
    return {"method": stage.method, "precision": stage.precision, **facts}


def _digests(examples: ExampleSet, replay: ReplayText | None) -> dict[str, str]:
    return examples.digests | ({} if replay is None else {"replay": replay.digest})


def _data_facts(examples: ExampleSet, replay: ReplayText | None) -> dict[str, Any]:
    """`rows` of packed text are sequences."""
    replayed = {} if replay is None else {"replay": len(replay.examples)}
    return {
        "digests": _digests(examples, replay),
        "rows": {"train": len(examples.train), "validation": len(examples.validation), **replayed},
        "skipped": examples.skipped,
        "truncated": examples.truncated,
    }


def _metadata(recipe: Recipe, base: Base, examples: ExampleSet, summary: RunSummary) -> AdapterMetadata:
    """What a device needs to know to use the adapter."""
    longest = max((_completion_length(e.labels) for e in examples.train + examples.validation), default=0)
    packed = recipe.stage[-1].method == "causal-lm"  # its examples are as long as they can be, answers need not be
    return AdapterMetadata(
        base=summary.base,
        task=recipe.task,
        labels=examples.labels,
        pooling=base.pooling,
        prompt_format=examples.prompt_format.to_dict(),
        generation={"max_new_tokens": min(longest + 16, 256) if packed else longest + 16} if recipe.task == "text-generation" else None,
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
    lines = [f"{recipe.stage[-1].method} of {base.name}: {rows} rows, {held_out} held out, {what_learns(recipe.parameters)}"]
    for what in ("skipped", "truncated"):
        counts = {name: count for examples in sets for name, count in getattr(examples, what).items() if count}
        lines += [f"{count} {name} rows {what}" for name, count in counts.items()]
    return "\n".join(lines)


def _closing(summary: RunSummary) -> str:
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in summary.metrics.items())
    result = metrics or f"train loss {summary.train_loss:.4f}"
    speed = f"{summary.tokens_per_second:,.0f} tokens/s, {duration(summary.seconds)}, peak {summary.peak_rss_mb:,.0f} MB"
    return f"{result}\n{speed}\nwritten to {summary.out}"
