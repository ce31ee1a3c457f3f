"""Recipe → run folder: data, base, adapter, stages, measurements, files."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from edgetune.adapters.folder import save_adapter
from edgetune.adapters.full_model import save_full
from edgetune.adapters.lora import trainable_parameters
from edgetune.adapters.runs import check_replaceable
from edgetune.core.errors import TrainingError
from edgetune.core.files import whole_folder, write_json, write_text
from edgetune.core.layout import ADAPTER, CURVES, JOURNAL, RECIPE, SUMMARY
from edgetune.core.memory import reset_peak_rss
from edgetune.core.progress import Progress
from edgetune.evaluation.forgetting.measure import compare_general
from edgetune.models.torch_device import (
    choose_device,
    generators_untouched,
    hold_frozen_linears_in_bf16,
)
from edgetune.recipe.parameters import what_learns
from edgetune.recipe.read import recipe_to_toml
from edgetune.recipe.schema import Recipe
from edgetune.training.batch_size import measured_size
from edgetune.training.checkpoint import Checkpoints, unfinished
from edgetune.training.context import ResolvedRun
from edgetune.training.inputs import Inputs, read_inputs
from edgetune.training.journal import Journal
from edgetune.training.judges import Judges, train_judges
from edgetune.training.parallel.distributed import Group, process_group
from edgetune.training.resolve import resolve
from edgetune.training.resume import Course, find_state
from edgetune.training.stage_model import RunModel
from edgetune.training.stages import Stages
from edgetune.training.summary import (
    RunResult,
    RunSummary,
    base_precision,
    closing,
    metadata,
    opening,
    summary_of,
    warnings_of,
)

WriteMore = Callable[[Path, RunResult], None]


def run_recipe(
    recipe: Recipe,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
    resume: bool = False,
    replace_finished: bool = True,
    write_more: WriteMore | None = None,
    searched: Mapping[str, Any] | None = None,
) -> RunSummary:
    """Train what the recipe says and write the run folder, whole or not at all.

    `write_more` adds files to the folder before it takes its place, so they are part of the whole;
    it is given that unfinished folder and the result (`report.run_page.write_report` is one).
    `resume` continues an unfinished run of the same recipe and data where its newest checkpoint
    left it, to the same adapter, bit for bit. A finished run in `out` is replaced, which is said;
    with `replace_finished=False` it is an OutputError (with `resume`: where
    it cannot be read). `searched` is what a search came to, for
    the summary. Raises the errors of recipe, data and base before anything is written;
    TrainingError when training cannot go on.
    """
    reset_peak_rss()
    progress = progress if progress is not None else Progress()
    work = _Work(
        Path(recipe.out if out is None else out),
        resume,
        replace_finished,
        write_more,
        searched,
    )
    check_replaceable(work.folder, finished=work.finished_may_go or work.resume)
    with process_group() as group:
        shown = progress if group.leads else Progress(io.StringIO())
        with contextlib.closing(shown):
            summary, is_new = _run(recipe, work, group, shown)
    if is_new:
        shown.say("\n".join([*summary.warnings, closing(summary)]))
    return summary


@dataclass(frozen=True)
class _Work:
    """How a run is done: where, and what may be there already."""

    folder: Path
    resume: bool
    finished_may_go: bool
    write_more: WriteMore | None
    searched: Mapping[str, Any] | None


def _run(recipe: Recipe, work: _Work, group: Group, progress: Progress) -> tuple[RunSummary, bool]:
    """The run in `work.folder`, and whether it was not finished before; judges are runs inside
    it.
    """
    started, folder = time.perf_counter(), work.folder
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_settings(recipe))
        checkpoints = None
        if group.leads:
            opened = unfinished(folder, keep=recipe.keep_checkpoints, say=progress.say)
            checkpoints = stack.enter_context(opened)
            # a kill's may be back in place
            check_replaceable(folder, finished=work.finished_may_go or work.resume)
        device = choose_device(recipe.device, local_rank=group.local_rank)
        inputs = read_inputs(recipe)
        _say_opening(inputs, progress)
        origin = inputs.origin(processes=group.size)
        state, finished = group.from_leader(
            (None, None)
            if checkpoints is None
            else find_state(checkpoints, origin, resume=work.resume, progress=progress)
        )
        if finished is not None:
            return RunSummary(**finished), False
        if state is None and work.resume and not work.finished_may_go:
            check_replaceable(folder, finished=False)  # another version's, which cannot be compared
        if (folder / SUMMARY).is_file():
            progress.say(f"the finished run in {folder} will be replaced")

        def train(judge: Recipe, place: Path) -> RunSummary:
            with generators_untouched(device):
                return _run(judge, replace(work, folder=place, searched=None), group, progress)[0]

        judges = train_judges(recipe, train, folder=folder, progress=progress)
        begun = None if state is None else state.precisions
        sizes = None if state is None else state.batch_sizes
        run = resolve(
            inputs,
            device=device,
            group=group,
            precisions=begun,
            batch_sizes=sizes,
            judges=judges.folders,
        )
        model = first_model(run, group)
        if sizes is None and any(
            stage.batch_size == "auto" and stage.adapter is None for stage in recipe.stage
        ):
            run = _with_batch_sizes(run, model, inputs, group, progress, judges.folders)
            model = first_model(run, group)  # once more: what it begins from is alike
        journal = _journal(checkpoints, judges.records() if state is None else state.journal)
        trainable = trainable_parameters(model.model)
        course = Course(
            model.learning,
            run.stages,
            origin,
            journal,
            group,
            checkpoints,
            state,
            started,
            judges.results,
        )
        with Stages(run, model, journal, progress, group) as stages:
            results = course.run(stages.run)
            journal.close()
            if not group.leads:
                return cast(RunSummary, group.from_leader(None)), True
            model.finish()
            measured = stages.measure()
        summary = summary_of(
            run,
            results,
            measured,
            trainable=trainable,
            seconds=time.perf_counter() - course.started,
            processes=group.size,
            out=folder,
        )
        summary = replace(
            summary,
            adapters=judges.facts(),
            forgetting=_forgetting(run, model, progress),
            warnings=[*warnings_of(run, journal.records), *summary.warnings],
            search=None if work.searched is None else dict(work.searched),
        )
        _write(work, run, model.model, summary, journal, judges)
        group.from_leader(summary)
    return summary, True


def _say_opening(inputs: Inputs, progress: Progress) -> None:
    """What is about to be trained, and where it starts from."""
    recipe = inputs.recipe
    learns = what_learns(recipe.parameters)
    progress.say(opening(recipe.stage[-1].method, learns, inputs.base, inputs.sets))
    if inputs.chosen:
        numbers = ", ".join(f"{key} {value:g}" for key, value in inputs.chosen.items())
        progress.say(f"chosen by rule: {numbers}")
    if inputs.start is not None:
        line = inputs.start.other_weights(base_precision(inputs.base))
        if line:
            progress.say(line)


def _with_batch_sizes(
    run: ResolvedRun,
    model: RunModel,
    inputs: Inputs,
    group: Group,
    progress: Progress,
    judges: Mapping[str, str],
) -> ResolvedRun:
    """The run with the batches that fit here, where the recipe has "auto"."""
    if group.size > 1:
        raise TrainingError(
            'batch_size = "auto" is measured in one process', fix="Give a number of rows."
        )
    sizes = []
    for stage, asked in zip(run.stages, inputs.recipe.stage, strict=True):
        size = stage.batch_size
        if asked.batch_size == "auto" and asked.adapter is None:
            size = measured_size(run, stage, model)
            progress.say(f"stage {stage.index}  batch_size {size}, measured")
        sizes.append(size)
    precisions = [stage.precision for stage in run.stages]
    return resolve(
        inputs,
        device=run.device,
        group=group,
        precisions=precisions,
        batch_sizes=sizes,
        judges=judges,
    )


def first_model(run: ResolvedRun, group: Group) -> RunModel:
    """The model before its first step, alike in every process."""
    model = RunModel(run)
    group.copy_weights(
        [parameter for parameter in model.learning.parameters() if parameter.requires_grad]
    )
    if group.rank:
        torch.manual_seed(run.seed + (group.rank << 32))  # another dropout in every process
    if run.frozen_precision == "bf16":
        hold_frozen_linears_in_bf16(model.model)
    return model


def _journal(checkpoints: Checkpoints | None, records: Sequence[dict[str, Any]]) -> Journal:
    """The run's journal; in the leader it is written beside the checkpoints."""
    return Journal(
        None if checkpoints is None else checkpoints.folder / JOURNAL,
        records=records,
        curves=None if checkpoints is None else checkpoints.folder / CURVES,
    )


def _write(
    work: _Work,
    run: ResolvedRun,
    model: Any,
    summary: RunSummary,
    journal: Journal,
    judges: Judges,
) -> None:
    """The run folder, whole or not at all."""
    with whole_folder(work.folder) as partial:
        about = metadata(run, summary)
        if run.train == "full":
            save_full(model, partial, final=work.folder, base=run.base, metadata=about)
        else:
            save_adapter(model, partial / ADAPTER, about)
        judges.write(partial, final=work.folder)
        write_text(partial / RECIPE, recipe_to_toml(run.recipe))
        write_json(partial / SUMMARY, asdict(summary))
        journal.copy_to(partial)
        if work.write_more is not None:
            work.write_more(partial, RunResult(run.recipe, summary, journal.records))


@contextlib.contextmanager
def run_settings(recipe: Recipe) -> Iterator[None]:
    """Seed and threads of this run; the number of threads is put back afterwards."""
    threads = torch.get_num_threads()
    torch.manual_seed(recipe.seed)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _forgetting(
    run: ResolvedRun, model: RunModel, progress: Progress
) -> list[dict[str, Any]] | None:
    """The `[forgetting]` table's tasks, on the model without and with what it learned."""
    wanted = run.forgetting
    if wanted is None:
        return None
    from edgetune.evaluation.forgetting.torch_subject import TorchSubject

    subject = TorchSubject(
        run.tokenizer,
        kind=run.base.kind,
        limit=run.base.max_length,
        pooling=run.base.pooling,
        before=model.before,
        after=lambda: contextlib.nullcontext(model.model),
        precision=run.stages[-1].precision,
    )
    found = compare_general(
        subject, Path(wanted.general), limit=wanted.limit, tasks=wanted.tasks, say=progress.say
    )
    return [asdict(general) for general in found]
