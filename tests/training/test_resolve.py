"""What a recipe leaves open is settled before the model is built, and not asked again."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import intent_recipe, masked_recipe, resolved, sft_recipe, silent

import edgetune.training
from edgetune.models.load import hidden_size, load_body
from edgetune.models.resolve import resolve_base
from edgetune.models.torch_device import CPU_DEVICE
from edgetune.recipe.schema import Recipe
from edgetune.training import run_recipe
from edgetune.training.inputs import read_inputs
from edgetune.training.parallel.distributed import Group
from edgetune.training.resolve import resolve

TRAINING = Path(edgetune.training.__file__).parent


def open_recipe(base: Path, folder: Path, **stage: Any) -> Recipe:
    made = sft_recipe(base, folder, **stage)
    return replace(made, stage=tuple(replace(each, precision="auto") for each in made.stage))


def test_nothing_is_left_open(tiny_decoder: Path, tmp_path: Path) -> None:
    run = resolved(open_recipe(tiny_decoder, tmp_path, batch_size=4, epochs=3))
    (stage,) = run.stages
    assert stage.precision in ("fp32", "bf16") and run.recipe.stage[0].precision == stage.precision
    assert (run.device, run.recipe.device) == (CPU_DEVICE, "cpu")
    assert run.threads == run.recipe.threads == torch.get_num_threads()
    assert (stage.total_steps, stage.validate_every, stage.save_every) == (9, 2, 50)
    assert stage.examples.prompt_format.template == "chat"
    assert run.generation is not None and run.generation["max_new_tokens"] > 16


def test_what_the_recipe_says_is_taken(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = sft_recipe(tiny_decoder, tmp_path, validate_every=2, max_steps=5)
    (stage,) = resolved(replace(recipe, checkpoint_every=7)).stages
    assert (stage.total_steps, stage.validate_every, stage.save_every) == (5, 2, 7)


def test_a_resumed_run_keeps_the_precision_it_began_with(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    inputs = read_inputs(open_recipe(tiny_decoder, tmp_path))
    for began in ("fp32", "bf16"):
        run = resolve(inputs, device=CPU_DEVICE, group=Group(), precisions=[began])
        assert run.stages[0].precision == run.recipe.stage[0].precision == began


def test_the_width_is_known_before_the_model_is(tiny_decoder: Path, tiny_encoder: Path) -> None:
    for folder in (tiny_decoder, tiny_encoder):
        base = resolve_base(str(folder))
        assert hidden_size(base) == load_body(base).config.hidden_size


def named(path: Path) -> Iterator[str]:
    """What a file takes from the recipe's schema."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "edgetune.recipe.schema":
            yield from (alias.name for alias in node.names)


def test_what_trains_a_stage_is_not_given_the_recipe() -> None:
    readers = {path.stem for path in TRAINING.rglob("*.py") if {"Stage", "Data"} & set(named(path))}
    assert readers == {"answer_form", "automatic", "inputs", "methods", "resolve"}


@pytest.mark.parametrize("stages", [1, 2])
def test_a_head_is_fitted_in_bf16_too(tiny_encoder: Path, tmp_path: Path, stages: int) -> None:
    recipe = intent_recipe(tiny_encoder, tmp_path, epochs=2)
    text = masked_recipe(tiny_encoder, tmp_path).stage
    both = [replace(each, precision="bf16") for each in (*text, *recipe.stage)][-stages:]
    summary = run_recipe(
        replace(recipe, stage=tuple(both)), out=tmp_path / "run", progress=silent()
    )
    assert summary.metrics["accuracy"] == 1.0
