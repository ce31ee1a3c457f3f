"""A grid of settings becomes runs of their own, compared in a table and on a page."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_helpers import sft_recipe

from edgetune.cli import main
from edgetune.core.errors import RecipeError
from edgetune.recipe.grid import combinations
from edgetune.recipe.read import recipe_to_toml
from edgetune.recipe.schema import Recipe
from edgetune.training.many import TrainedRun
from edgetune.training.sweep import best_first, compared_by, sweep_table

RATE = "stage.0.learning_rate"


def written(recipe: Recipe, folder: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text(recipe_to_toml(recipe))
    return path


def swept(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main(["sweep", *map(str, arguments)])
    return int(done.value.code or 0)


def test_every_combination_is_a_run_and_the_best_stands_first(
    tiny_decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(sft_recipe(tiny_decoder, tmp_path, max_steps=2, warmup_ratio=0.0), tmp_path)
    grid = ("--grid", f"{RATE}=1e-6,1e-2", "--seeds", "0,1", "--out", tmp_path / "all")
    assert swept(path, *grid) == 0
    names = [f"learning_rate={rate}_seed={seed}" for rate in ("1e-6", "1e-2") for seed in (0, 1)]
    assert all((tmp_path / "all" / name / "summary.json").is_file() for name in names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["learning_rate", "loss", "runs", "steps"]
    assert [line.split()[0] for line in lines[1:3]] == ["1e-2", "1e-6"]
    assert " ± " in lines[1] and lines[1].split()[-2:] == ["2", "2"]
    assert names[0] in (tmp_path / "all" / "comparison.html").read_text()
    facts = json.loads((tmp_path / "all" / "sweep.json").read_text())
    assert [one["run"] for one in facts] == names
    assert facts[0]["settings"] == {RATE: "1e-6", "seed": "0"} and facts[0]["value"] > 0
    before = {name: (tmp_path / "all" / name / "summary.json").stat().st_mtime_ns for name in names}
    assert swept(path, *grid) == 0  # all of them are there
    assert before == {
        name: (tmp_path / "all" / name / "summary.json").stat().st_mtime_ns for name in names
    }
    assert swept(path, *grid, "--set", "stage.0.max_length=100") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "of another recipe or of other data" in line and "Name another --out" in line


def outcome(kept_by: str, settings: dict[str, str], **metrics: float) -> TrainedRun:
    stages = [{"kept": {"metric": kept_by}, "steps": 1}]
    summary: Any = SimpleNamespace(metrics=metrics, stages=stages, train_loss=9.0)
    run: Any = SimpleNamespace(settings=settings)
    return TrainedRun(run, summary)


def test_runs_that_were_kept_by_several_metrics_are_compared_by_one() -> None:
    plain = outcome("accuracy", {"weights": "none"}, accuracy=0.9, macro_f1=0.4)
    weighed = outcome("macro_f1", {"weights": "balanced"}, accuracy=0.8, macro_f1=0.7)
    lines = [line.split() for line in sweep_table([plain, weighed]).splitlines()]
    assert lines[0][:2] == ["weights", "macro_f1"]
    assert [line[:2] for line in lines[1:]] == [["balanced", "0.7000"], ["none", "0.4000"]]
    assert compared_by([plain]) == "accuracy" and best_first([plain]) == [[plain]]


def test_a_run_that_cannot_go_on_is_said_and_the_others_finish(
    tiny_decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = sft_recipe(tiny_decoder, tmp_path, max_steps=3, warmup_ratio=0.0, max_grad_norm=1e30)
    path = written(made, tmp_path)
    assert swept(path, "--grid", f"{RATE}=1e30,1e-3", "--out", tmp_path / "all") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["1e-3", "1e30"] and "failed" in lines[2]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([f"{RATE}s=1,2"], 'unknown key "stage.0.learning_rates"'),
        ([f"{RATE}=1e-3,fast"], "learning_rate has a wrong value"),
        ([f"{RATE}=1e-3,0"], "learning_rate is out of range"),
        ([RATE], "not a setting with its values (expected KEY=A,B,C"),
        ([f"{RATE}=1,,2"], "not a setting with its values"),
        ([f"{RATE}=1,2", f"{RATE}=3"], "is varied twice"),
        ([], "nothing to vary"),
        (["seed=" + ",".join(map(str, range(1001)))], "a sweep of 1,001 runs"),
    ],
)
def test_a_bad_grid_is_one_line_before_anything_trains(
    options: list[str], line: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    path = written(sft_recipe(tiny_decoder, tmp_path), tmp_path)
    with pytest.raises(RecipeError) as refused:
        combinations(path, options, None, overrides=())
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_values_with_commas_and_signs_are_values(tiny_decoder: Path, tmp_path: Path) -> None:
    path = written(sft_recipe(tiny_decoder, tmp_path), tmp_path)
    made = combinations(
        path, ['parameters.target_modules=["q_proj","v_proj"],all-linear'], "3", overrides=()
    )
    assert [one.recipe.parameters.target_modules for one in made] == [
        ("q_proj", "v_proj"),
        "all-linear",
    ]
    assert all(one.recipe.seed == 3 and "/" not in one.name for one in made)
    layers = combinations(path, ["parameters.layers=[0,1],[1,1]"], None, overrides=())
    assert [one.recipe.parameters.layers for one in layers] == [(0, 1), (1, 1)]
