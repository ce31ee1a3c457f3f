"""How sure a small adapter is of its answers: fitted again in torch, on what its codes stand
for.
"""

from __future__ import annotations

from dataclasses import replace

from edgetune.compression.measure import TaskMetric
from edgetune.core.answer_confidence import answer_confidence_of
from edgetune.core.errors import EdgetuneError
from edgetune.core.layout import RECIPE
from edgetune.export.inputs.small_adapter import SmallAdapter
from edgetune.export.inputs.sources import AdapterSource
from edgetune.export.proof.confidence import ShippedConfidence, as_trained, moved, refit
from edgetune.models.torch_device import CPU_DEVICE
from edgetune.recipe.read import load_run_recipe
from edgetune.training.answer_confidence import measure_answers
from edgetune.training.confidence import measure_labels
from edgetune.training.context import ResolvedStage
from edgetune.training.inputs import read_inputs
from edgetune.training.parallel.distributed import Group
from edgetune.training.resolve import resolve
from edgetune.training.stages import held_out_batches


def refit_small(
    source: AdapterSource, task: TaskMetric | None, small: SmallAdapter
) -> ShippedConfidence | None:
    """None for an adapter that does not know how sure it is."""
    if source.metadata.get("confidence") is None:
        return None
    if task is None:
        return as_trained(source, "--task-rows 0")
    if not (source.folder.parent / RECIPE).is_file():
        return as_trained(source, f"no {RECIPE} beside the adapter names its validation rows")
    try:
        stage = _stage(source)
        if stage.examples.labels != source.labels:
            return as_trained(source, "the rows of its last stage have other labels")
        if why := moved(source, stage.examples):
            return as_trained(source, why)
    except EdgetuneError as error:
        return as_trained(source, str(error))
    task.put(small)
    take = measure_answers if answer_confidence_of(source.metadata) else measure_labels
    answers = take(task.model, stage, held_out_batches(stage))
    return refit(source, answers, fitted_on=f"torch, {small.bits}-bit adapter")


def _stage(source: AdapterSource) -> ResolvedStage:
    """The last stage of the run, measured in fp32."""
    recipe = load_run_recipe(source.folder.parent / RECIPE)
    recipe = replace(
        recipe,
        stage=(replace(recipe.stage[-1], precision="fp32"),),
        parameters=replace(recipe.parameters, start=None),
        forgetting=None,
    )
    run = resolve(read_inputs(recipe), device=CPU_DEVICE, group=Group())
    return run.stages[0]
