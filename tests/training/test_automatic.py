"""What a recipe leaves open gets a number by a rule; a number in the recipe always wins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomllib
from resume_helpers import stopped_at
from training_helpers import intent_recipe, sft_recipe, silent

from edgetune.core.settings import settled
from edgetune.recipe.schema import Parameters, Recipe
from edgetune.training import run_recipe
from edgetune.training.automatic import by_rule, chosen

OPEN: dict[str, Any] = {"learning_rate": "auto", "epochs": "auto"}


def open_recipe(base: Path, folder: Path, **stage: Any) -> Recipe:
    return sft_recipe(base, folder, **{**OPEN, **stage})


@pytest.mark.parametrize(
    ("train", "width", "rate"),
    [
        ("lora", 384, 5e-4),
        ("lora", 576, 5e-4),
        ("lora", 2048, 1.4e-4),
        ("full", 576, 5e-5),
        ("full", 2048, 1.4e-5),
    ],
)
def test_the_rate_falls_with_the_width_and_is_a_tenth_where_all_weights_learn(
    train: Any, width: int, rate: float, tiny_decoder: Path, tmp_path: Path
) -> None:
    made = replace(open_recipe(tiny_decoder, tmp_path), parameters=Parameters(train=train))
    assert by_rule(made, width=width, rows=[100]).stage[0].learning_rate == rate


def test_fewer_rows_are_seen_more_often(tiny_encoder: Path, tmp_path: Path) -> None:
    made = intent_recipe(tiny_encoder, tmp_path, **OPEN)
    epochs = [by_rule(made, width=384, rows=[n]).stage[0].epochs for n in (300, 5_000, 50_000)]
    assert epochs == [10.0, 5.0, 3.0]


def test_a_number_in_the_recipe_wins(tiny_decoder: Path, tmp_path: Path) -> None:
    made = sft_recipe(tiny_decoder, tmp_path, parameters={"rank": 4})
    after = by_rule(made, width=576, rows=[100])
    assert (after.stage[0].learning_rate, after.stage[0].epochs) == (1e-2, 2.0)
    assert (after.parameters.rank, after.parameters.alpha) == (4, 16.0)
    assert chosen(made, after) == {"parameters.alpha": 16.0}
    with pytest.raises(ValueError, match="not settled"):
        settled(open_recipe(tiny_decoder, tmp_path).stage[0].epochs)


@pytest.mark.parametrize(
    ("given", "alpha"),
    [
        ({"rank": 1}, 16.0),
        ({"rank": 8}, 16.0),
        ({"rank": 32}, 64.0),
        ({"rank": 32, "rslora": True}, 16.0),
        ({"rank": 32, "alpha": 8.0}, 8.0),
    ],
)
def test_a_larger_rank_has_a_larger_alpha(given: dict[str, Any], alpha: float) -> None:
    assert Parameters(**given).lora_alpha == alpha


def test_the_run_says_what_was_chosen_and_writes_it_down(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    made = replace(open_recipe(tiny_decoder, tmp_path, max_steps=3), checkpoint_every=1)
    stopped_at(3, made, tmp_path / "run")
    summary = run_recipe(made, out=tmp_path / "run", progress=silent(), resume=True)
    numbers = {
        "parameters.rank": 8,
        "parameters.alpha": 16.0,
        "stage.0.epochs": 3.0,
        "stage.0.learning_rate": 5e-4,
    }
    assert summary.chosen == numbers
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["chosen"] == numbers
    written = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    assert written["stage"][0]["learning_rate"] == 5e-4 and written["parameters"]["rank"] == 8
    before = (tmp_path / "run" / "summary.json").stat().st_mtime_ns
    run_recipe(made, out=tmp_path / "run", progress=silent(), resume=True)
    assert (tmp_path / "run" / "summary.json").stat().st_mtime_ns == before


def test_a_head_alone_has_no_rank_to_choose(tiny_encoder: Path, tmp_path: Path) -> None:
    made = intent_recipe(tiny_encoder, tmp_path, **OPEN, parameters={"train": "head"})
    after = by_rule(made, width=384, rows=[12])
    assert chosen(made, after) == {"stage.0.epochs": 10.0, "stage.0.learning_rate": 1e-3}
