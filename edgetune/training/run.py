"""Recipe → run folder: data, base, adapter, stages, measurements, files."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from edgetune.adapters.folder import save_adapter
from edgetune.adapters.full_model import save_full
from edgetune.adapters.lora import trainable_parameters
from edgetune.adapters.runs import check_replaceable
from edgetune.core.files import whole_folder, write_json, write_text
from edgetune.core.layout import ADAPTER, CURVES, JOURNAL, RECIPE, REPORT, SUMMARY
from edgetune.core.progress import Progress
from edgetune.evaluation.forgetting.measure import compare_general
from edgetune.models.torch_device import (
    choose_device,
    choose_precision,
    hold_frozen_linears_in_bf16,
)
from edgetune.recipe.read import recipe_to_toml
from edgetune.recipe.schema import DeviceChoice, Recipe
from edgetune.report.run_page import write_report
from edgetune.training.checkpoint import State, unfinished
from edgetune.training.inputs import Inputs, read_inputs
from edgetune.training.journal import Journal
from edgetune.training.parallel.distributed import Group, process_group
from edgetune.training.resume import Course, find_state
from edgetune.training.stage_model import Succession
from edgetune.training.stages import Stages, precision_of
from edgetune.training.summary import (
    RunSummary,
    base_precision,
    closing,
    metadata,
    opening,
    summary_of,
)


def run_recipe(
    recipe: Recipe,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> RunSummary:
    """Train what the recipe says and write the run folder, whole or not at all.

    `resume` continues an unfinished run of the same recipe and data where its newest checkpoint
    left it, to the same adapter, bit for bit. Raises the errors of recipe, data and base before
    anything is written; TrainingError when training cannot go on.
    """
    started = time.perf_counter()
    folder = Path(recipe.out if out is None else out)
    progress = progress if progress is not None else Progress()
    check_replaceable(folder)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(process_group())
        progress = stack.enter_context(
            contextlib.closing(progress if group.leads else Progress(io.StringIO()))
        )
        stack.enter_context(_settings(recipe))
        work = (
            unfinished(folder, keep=recipe.keep_checkpoints, say=progress.say)
            if group.leads
            else None
        )
        checkpoints = stack.enter_context(work) if work is not None else None
        device = choose_device(recipe.device, local_rank=group.local_rank)
        inputs = read_inputs(recipe)
        progress.say(opening(recipe, inputs.base, inputs.sets))
        if inputs.start is not None and (
            line := inputs.start.other_weights(base_precision(inputs.base))
        ):
            progress.say(line)
        origin = inputs.origin(processes=group.size)
        state, finished = group.from_leader(
            (None, None)
            if checkpoints is None
            else find_state(checkpoints, origin, resume=resume, progress=progress)
        )
        if finished is not None:
            return RunSummary(**finished)
        succession, inputs = _first_model(inputs, state, device, group)
        trainable = trainable_parameters(succession.model)
        journal = Journal(
            None if checkpoints is None else checkpoints.folder / JOURNAL,
            records=[] if state is None else state.journal,
            curves=None if checkpoints is None else checkpoints.folder / CURVES,
        )
        course = Course(
            succession.learning, inputs.recipe, origin, journal, group, checkpoints, state, started
        )
        with Stages(succession, inputs, journal, progress, group) as stages:
            results = course.run(stages.run)
            journal.close()
            if not group.leads:
                return cast(RunSummary, group.from_leader(None))
            succession.finish()
            measured = stages.measure()
        summary = summary_of(
            inputs,
            results,
            measured,
            trainable=trainable,
            seconds=time.perf_counter() - course.started,
            device=device,
            processes=group.size,
            out=folder,
        )
        summary = replace(summary, forgetting=_forgetting(succession, inputs, progress))
        _write(folder, succession.model, inputs, summary, journal)
        group.from_leader(summary)
    progress.say(closing(summary))
    return summary


def _first_model(
    inputs: Inputs, state: State | None, device: torch.device, group: Group
) -> tuple[Succession, Inputs]:
    """The model before its first step, alike in every process; and the inputs with what was chosen,
    as it is trained on them.
    """
    recipe = inputs.recipe
    succession = Succession(
        recipe, inputs.base, inputs.sets, pad_id=inputs.pad_id, device=device, start=inputs.start
    )
    group.copy_weights(
        [parameter for parameter in succession.learning.parameters() if parameter.requires_grad]
    )
    if group.rank:
        torch.manual_seed(recipe.seed + (group.rank << 32))  # another dropout in every process
    recipe = group.from_leader(
        _resolve(recipe, state, hidden=succession.model.config.hidden_size, device=device)
    )
    if all(stage.precision == "bf16" for stage in recipe.stage):
        hold_frozen_linears_in_bf16(succession.model)
    return succession, replace(inputs, recipe=recipe, sets=succession.sets)


def _write(folder: Path, model: Any, inputs: Inputs, summary: RunSummary, journal: Journal) -> None:
    """The run folder, whole or not at all."""
    recipe = inputs.recipe
    with whole_folder(folder) as partial:
        about = metadata(recipe, inputs.base, inputs.sets[-1], summary)
        if recipe.parameters.train == "full":
            save_full(model, partial, final=folder, base=inputs.base, metadata=about)
        else:
            save_adapter(model, partial / ADAPTER, about)
        write_text(
            partial / RECIPE, recipe_to_toml(replace(recipe, threads=torch.get_num_threads()))
        )
        write_json(partial / SUMMARY, asdict(summary))
        write_report(
            partial / REPORT, recipe=recipe, summary=asdict(summary), records=journal.records
        )
        journal.copy_to(partial)


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


def _forgetting(
    succession: Succession, inputs: Inputs, progress: Progress
) -> list[dict[str, Any]] | None:
    """The `[forgetting]` table's tasks, on the model without and with what it learned."""
    base, wanted = inputs.base, inputs.recipe.forgetting
    if wanted is None:
        return None
    from edgetune.evaluation.forgetting.torch_subject import TorchSubject

    subject = TorchSubject(
        inputs.tokenizer,
        kind=base.kind,
        limit=base.max_length,
        pooling=base.pooling,
        before=succession.before,
        after=lambda: contextlib.nullcontext(succession.model),
        precision=precision_of(inputs.recipe.stage[-1]),
    )
    found = compare_general(
        subject, Path(wanted.general), limit=wanted.limit, tasks=wanted.tasks, say=progress.say
    )
    return [asdict(general) for general in found]


def _resolve(recipe: Recipe, state: State | None, *, hidden: int, device: torch.device) -> Recipe:
    """The recipe with every "auto" replaced by what was chosen, so that the run's recipe.toml
    repeats the run exactly.

    A resumed run keeps the precision it began with: to measure again might choose another.
    """
    settings = [stage.precision for stage in recipe.stage] if state is None else state.precisions
    chosen = {
        setting: choose_precision(setting, hidden=hidden, device=device)
        for setting in set(settings)
    }
    stages = [
        replace(stage, precision=chosen[s]) for stage, s in zip(recipe.stage, settings, strict=True)
    ]
    return replace(recipe, stage=tuple(stages), device=cast(DeviceChoice, device.type))
