"""A finished run of version 0.1 opens wherever runs are read."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from preference_helpers import pair_recipe, tiny
from training_helpers import silent

from edgetune.cli import main
from edgetune.core.errors import RecipeError
from edgetune.core.progress import Progress
from edgetune.core.settings import toml_value
from edgetune.export.inputs.calibration_text import run_examples
from edgetune.recipe.migrate import MOVED
from edgetune.recipe.read import load_recipe, load_run_recipe, tomllib
from edgetune.recipe.schema import Recipe
from edgetune.training import run_recipe


def write_as_0_1(recipe: Path) -> None:
    """Every stage holds the settings of every method, as version 0.1 wrote them."""
    values = tomllib.loads(recipe.read_text())
    defaults = {key: value for key, (_, value) in MOVED.items() if value is not None}
    values["stage"] = [
        {**defaults, **stage, **stage.pop("dpo", {}), **stage.pop("grpo", {})}
        for stage in values["stage"]
    ]
    for stage in values["stage"]:
        del stage["dpo"]
    recipe.write_text("".join(f"{key} = {toml_value(value)}\n" for key, value in values.items()))


@pytest.fixture(scope="module")
def recipe(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("old")
    made = pair_recipe(tiny_decoder, folder, "dpo", epochs=1, dpo={"beta": 0.3})
    return replace(made, out=str(folder / "run"))


@pytest.fixture(scope="module")
def run(recipe: Recipe) -> Path:
    folder = Path(recipe.out)
    run_recipe(recipe, out=folder, progress=silent())
    now = load_recipe(folder / "recipe.toml")
    write_as_0_1(folder / "recipe.toml")
    assert load_run_recipe(folder / "recipe.toml") == now
    return folder


def test_its_recipe_is_refused_as_a_recipe_to_train(run: Path) -> None:
    with pytest.raises(RecipeError, match=r"stage\.0: beta lives in the table \[stage\.dpo\] now"):
        load_recipe(run / "recipe.toml")


@pytest.mark.parametrize("command", ["eval", "report"])
def test_commands_read_it(command: str, run: Path, recipe: Recipe, tmp_path: Path) -> None:
    held_out = str(recipe.stage[0].data.validation)
    options = {
        "eval": ["--data", held_out],
        "report": [str(run), "--out", str(tmp_path / "page.html")],
    }[command]
    with pytest.raises(SystemExit) as stopped:
        main([command, str(run), *options])
    assert stopped.value.code == 0


def test_export_finds_the_rows_it_was_trained_on(run: Path, tiny_decoder: Path) -> None:
    base, tokenizer = tiny(tiny_decoder)
    examples = run_examples(run / "adapter", tokenizer, base)
    assert examples is not None and len(examples.train) == 12


def test_resume_finds_it_finished(run: Path, recipe: Recipe) -> None:
    said = io.StringIO()
    run_recipe(recipe, out=run, progress=Progress(said), resume=True)
    assert "is finished" in said.getvalue()


def test_its_adapter_goes_on_learning(run: Path, recipe: Recipe, tmp_path: Path) -> None:
    parameters = replace(recipe.parameters, start=str(run))
    run_recipe(replace(recipe, parameters=parameters), out=tmp_path / "on", progress=silent())
    assert load_recipe(tmp_path / "on" / "recipe.toml").parameters.start == str(run)
