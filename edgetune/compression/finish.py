"""A short training of a cut adapter against its own codes, on the rows of its run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edgetune.compression.straight_through import rounded_weights
from edgetune.core.arrays import Array
from edgetune.core.layout import PEFT_PREFIX, RECIPE
from edgetune.core.progress import Progress
from edgetune.core.settings import settled
from edgetune.export.inputs.small_adapter import Factors, rank_settings, write_plain
from edgetune.models.torch_device import choose_device, hold_frozen_linears_in_bf16
from edgetune.recipe.read import load_run_recipe
from edgetune.recipe.schema import Recipe
from edgetune.runtime.adapters.lora import LoraFolder
from edgetune.training.inputs import read_inputs
from edgetune.training.journal import Journal
from edgetune.training.parallel.distributed import Group
from edgetune.training.resolve import resolve
from edgetune.training.stage_model import RunModel
from edgetune.training.stages import Stages

RATE = 0.5
"""of the stage's own learning rate"""
LEARNS_FROM_ANSWERS = "grpo"  # whose steps take minutes


@dataclass(frozen=True)
class Finished:
    """What the training left, not yet rounded: factors, and the head that learned with them."""

    factors: Mapping[str, Factors]
    head: Mapping[str, Array]


def can_finish(adapter: Path) -> str:
    """Why there is nothing to train on; "" where there is."""
    if not (adapter.parent / RECIPE).is_file():
        return f"no {RECIPE} beside it says what it learned from"
    recipe = load_run_recipe(adapter.parent / RECIPE)
    if recipe.stage[-1].method == LEARNS_FROM_ANSWERS:
        return f"its last stage is {LEARNS_FROM_ANSWERS}"
    return ""


def finish(
    read: LoraFolder, factors: Mapping[str, Factors], bits: int, *, steps: int, progress: Progress
) -> Finished:
    """Train `factors` for so many steps of the last stage of the run that `read` lies in.

    The errors of recipe, data and base, as of any training.
    """
    deltas = {module: (own.a.numpy(), own.b.numpy()) for module, own in factors.items()}
    with tempfile.TemporaryDirectory(prefix="edgetune-finish-") as folder:
        start = Path(folder) / "start"
        write_plain(replace(read, deltas=deltas), start)
        recipe = _recipe(load_run_recipe(read.path.parent / RECIPE), start, factors, steps)
        torch.manual_seed(recipe.seed)
        inputs, group = read_inputs(recipe), Group()
        run = resolve(inputs, device=choose_device(recipe.device), group=group)
        model = RunModel(run)
    if run.frozen_precision == "bf16":
        hold_frozen_linears_in_bf16(model.model)
    with (
        Stages(run, model, Journal(None), progress, group) as stages,
        rounded_weights(model.model, bits) as masters,
    ):
        stages.run(0, resumed=None, save=lambda *_: None)
    model.finish()
    found = {
        module: Factors(a.float().cpu(), b.float().cpu().contiguous())
        for module, (a, b) in masters.values.items()
    }
    return Finished(found, _head_of(model.model, read))


def _recipe(recipe: Recipe, start: Path, factors: Mapping[str, Factors], steps: int) -> Recipe:
    """The run's last stage once more, from `start`, on the same rows, with nothing measured."""
    rank, pattern = rank_settings({module: own.rank for module, own in factors.items()})
    last = recipe.stage[-1]
    parameters = replace(
        recipe.parameters,
        rank=rank,
        alpha=float(rank),
        rank_pattern=pattern,
        alpha_pattern={module: float(own) for module, own in pattern.items()},
        rslora=False,
        dropout=0.0,
        init="default",
        start=str(start),
    )
    stage = replace(
        last,
        data=replace(
            last.data,
            validation=None,
            # rows that were held out stay out
            hold_out=0 if last.data.validation is not None else last.data.hold_out,
        ),
        learning_rate=RATE * settled(last.learning_rate),
        head_learning_rate=(
            None if last.head_learning_rate is None else RATE * last.head_learning_rate
        ),
        max_steps=steps,
        epochs=max(settled(last.epochs), float(steps)),
        validate_every=2 * steps,
        keep="last",
        patience=None,
    )
    return replace(recipe, parameters=parameters, stage=(stage,), forgetting=None)


def _head_of(model: torch.nn.Module, read: LoraFolder) -> dict[str, Array]:
    """The head's tensors as they are now, by the names of `LoraFolder.head`."""
    now = {
        name.removeprefix(PEFT_PREFIX).replace(".modules_to_save.default", ""): tensor
        for name, tensor in model.state_dict().items()
        if ".original_module." not in name
    }
    return {name: now[name].float().cpu().numpy() for name in read.head}
