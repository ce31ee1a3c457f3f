"""Several recipes become runs of their own, compared; one that fails stops no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine
from resume_helpers import WEIGHTS, stopped_at
from training_helpers import action_rows, sft_recipe, silent, write_rows

from edgetune.core.errors import RecipeError
from edgetune.recipe.read import load_recipe, recipe_to_toml
from edgetune.recipe.runs import check_independent, common_folder, plan_runs
from edgetune.training import run_recipe


@pytest.fixture
def recipes(tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two recipes of two steps, in two folders but under one name, and the current folder."""
    monkeypatch.chdir(tmp_path)
    paths = []
    for seed, name in enumerate(("ann", "bob")):
        made = sft_recipe(tiny_decoder, tmp_path, max_steps=2)
        path = tmp_path / name / "recipe.toml"
        path.parent.mkdir()
        text = recipe_to_toml(made).replace("seed = 0", f"seed = {seed}")
        path.write_text(text.replace('out = "runs/run"', f'out = "runs/{name}"'))
        paths.append(path)
    return paths


def times(folder: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted(folder.glob("*/summary.json"))]


def test_each_becomes_the_run_that_it_is_alone_and_stays_when_asked_again(
    recipes: list[Path], command_line: CommandLine, tmp_path: Path
) -> None:
    code, out, err = command_line("train", *recipes)
    assert code == 0 and "run 2 of 2: bob" in err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["run", "ann", "bob"] and "loss" in lines[1]
    assert lines[3] == f"compared in {tmp_path / 'runs' / 'comparison.html'}"
    assert "2 runs compared" in (tmp_path / "runs" / "comparison.html").read_text()
    facts = json.loads((tmp_path / "runs" / "runs.json").read_text())
    assert [(one["run"], one["out"], one["error"]) for one in facts] == [
        ("ann", "runs/ann", ""),
        ("bob", "runs/bob", ""),
    ]
    for path in recipes:
        run_recipe(load_recipe(path), out=tmp_path / "alone", progress=silent())
        together = tmp_path / "runs" / path.parent.name
        assert (together / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()
    before = times(tmp_path / "runs")
    assert command_line("train", *recipes)[:2] == (0, out)
    assert times(tmp_path / "runs") == before


def test_one_that_fails_is_a_line_and_the_rest_goes_on_where_it_was_stopped(
    recipes: list[Path], command_line: CommandLine, tmp_path: Path
) -> None:
    broken = write_rows(tmp_path / "broken.jsonl", [{"prompt": "no answer"}])
    text = recipes[0].read_text()
    recipes[0].write_text(text.replace(str(tmp_path / "actions.jsonl"), str(broken)))
    whole = run_recipe(load_recipe(recipes[1]), out=tmp_path / "whole", progress=silent())
    every_step = load_recipe(recipes[1], ["checkpoint_every=1"])
    stopped_at(2, every_step, tmp_path / "all" / "bob" / "recipe")
    code, out, err = command_line("train", *recipes, "--out", "all")
    assert code == 1 and "resumed at stage 0, step 1" in err and "1 of 2 runs failed" in err
    assert "broken.jsonl" in out.splitlines()[1] and "failed" in out.splitlines()[1]
    assert f"{whole.metrics['loss']:.4g}" in out.splitlines()[2]
    resumed = tmp_path / "all" / "bob" / "recipe" / WEIGHTS
    assert resumed.read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    facts = json.loads((tmp_path / "all" / "runs.json").read_text())
    assert [one["value"] is None for one in facts] == [True, False]
    assert "completion" in facts[0]["error"]


def test_other_rows_are_refused_and_replace_the_run_where_that_is_asked(
    recipes: list[Path], command_line: CommandLine, tmp_path: Path
) -> None:
    assert command_line("train", *recipes)[0] == 0
    before = times(tmp_path / "runs")
    own = write_rows(tmp_path / "own.jsonl", action_rows()[2:])
    text = recipes[1].read_text()
    recipes[1].write_text(text.replace(str(tmp_path / "actions.jsonl"), str(own)))
    code, out, _ = command_line("train", *recipes)
    assert code == 1 and "of another recipe or of other data" in out
    assert times(tmp_path / "runs") == before
    assert command_line("train", *recipes, "--replace")[0] == 0
    after = times(tmp_path / "runs")
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)


def test_a_finished_run_that_another_version_wrote_is_replaced_only_where_that_is_asked(
    recipes: list[Path], command_line: CommandLine, tmp_path: Path
) -> None:
    assert command_line("train", *recipes)[0] == 0
    own = tmp_path / "runs" / "bob" / "recipe.toml"
    own.write_text(f"of_a_later_version = 1\n{own.read_text()}")
    before = times(tmp_path / "runs")
    code, out, _ = command_line("train", *recipes)
    assert code == 1 and "a finished run is there already" in out and "--replace" in out
    alone = command_line("train", recipes[1], "--resume")
    assert alone[0] == 2 and "a finished run is there already" in alone[2]
    assert times(tmp_path / "runs") == before
    assert command_line("train", *recipes, "--replace")[0] == 0
    after = times(tmp_path / "runs")
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["ann/recipe.toml"], "is given twice"),
        (["--set", "out=runs/one"], "bob/recipe.toml: its run folder is the one of another"),
        (["bad.toml"], 'bad.toml: unknown key "sead"'),
        (["none.toml"], "none.toml: there is no such recipe file"),
        (["--set", "seeds=3"], 'unknown key "seeds"'),
        (["--search", "10m"], "go with one RECIPE"),
        (["--migrate"], "go with one RECIPE"),
        (["--out", "ann/recipe.toml"], "cannot write the comparison there"),
        (["--workers", "2"], "--workers belongs to --ray"),
        (["--ray", "more.toml"], "write --ray last"),
    ],
)
def test_what_makes_no_sense_is_a_line_before_anything_trains(
    more: list[str], said: str, recipes: list[Path], command_line: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "bad.toml").write_text(recipes[0].read_text().replace("seed =", "sead ="))
    code, out, err = command_line("train", "ann/recipe.toml", "bob/recipe.toml", *more)
    assert (code, out) == (2, "") and said in err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "word"),
    [("train", "ann/recipe.toml"), ("sweep", "ann/recipe.toml"), ("predict", "bundles/desk")],
)
def test_what_stands_behind_ray_is_told_from_an_address(
    command: str, word: str, command_line: CommandLine
) -> None:
    code, _, err = command_line(command, "--ray", word)
    assert code == 2 and "write --ray last" in err.splitlines()[-1]


def test_all_files_that_are_no_recipes_are_named(recipes: list[Path]) -> None:
    for path in recipes:
        path.write_text(path.read_text().replace("seed =", "sead ="))
    with pytest.raises(RecipeError) as refused:
        plan_runs(recipes)
    assert str(refused.value).startswith("2 recipes are refused:\n")
    assert all(str(path) in str(refused.value) for path in recipes)


@pytest.mark.parametrize(
    ("outs", "common"),
    [(("runs/a", "runs/b"), "runs"), (("runs/a", "more/b"), "."), (("/a", "/b"), ".")],
)
def test_the_page_lies_where_all_runs_do(
    outs: tuple[str, str], common: str, recipes: list[Path], tmp_path: Path
) -> None:
    for path, out in zip(recipes, outs, strict=True):
        path.write_text(path.read_text().replace(f"runs/{path.parent.name}", out))
    assert common_folder(plan_runs(recipes)) == (tmp_path / common).resolve()


def test_a_run_inside_another_is_refused(recipes: list[Path]) -> None:
    text = recipes[1].read_text()
    for out, above in (("runs/ann/x", "runs/ann"), ("runs", "runs")):
        recipes[1].write_text(text.replace("runs/bob", out))
        with pytest.raises(RecipeError, match="lies in it") as refused:
            plan_runs(recipes)
        assert above in str(refused.value)


def test_a_run_that_begins_with_another_one_goes_after_it_not_beside_it(
    recipes: list[Path], command_line: CommandLine, tmp_path: Path
) -> None:
    check_independent(plan_runs(recipes))
    start = f'[parameters]\nstart = "{tmp_path}/runs/ann"\n'
    recipes[1].write_text(recipes[1].read_text().replace("[parameters]\n", start))
    with pytest.raises(RecipeError, match="bob begins with what ann trains"):
        check_independent(plan_runs(recipes))
    assert command_line("train", *recipes)[0] == 0


def test_what_nobody_expected_is_the_outcome_of_its_run_alone(
    recipes: list[Path], command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(recipe: Any, **settings: Any) -> Any:
        if recipe.seed == 0:
            raise RuntimeError("not enough memory\nto go on")
        return run_recipe(recipe, **settings)

    monkeypatch.setattr("edgetune.training.many.run_recipe", train)
    code, out, _ = command_line("train", *recipes)
    assert code == 1 and "failed: RuntimeError: not enough memory. Train this" in out
    assert "loss" in out.splitlines()[2]
