"""The recipe: read strictly, every default written out, every complaint one clear line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetune.core.errors import RecipeError
from edgetune.recipe.read import load_recipe, recipe_from_dict, recipe_to_toml
from edgetune.recipe.schema import Recipe

RECIPE = """
base = "builtin:smollm2-135m-instruct"
out = "runs/restaurant"
[parameters]
rank = 4
rank_pattern = {"q_proj" = 2}
[[stage]]
method = "sft"
data.train = "train.jsonl"
data.validation = "dev.jsonl.gz"
data.prompt = "{{ mr }}\\n"
data.completion = "ref"
data.system = ""
learning_rate = 1
[[stage]]
method = "sft"
data.train = "more.jsonl"
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def stage(**changes: Any) -> dict[str, Any]:
    return {"base": "b", "stage": [{"method": "sft", "data": {"train": "t.jsonl"}, **changes}]}


def test_values_are_read_and_defaults_filled_in(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert (recipe.parameters.rank, recipe.parameters.alpha, recipe.seed) == (4, "auto", 0)
    assert recipe.stage[0].learning_rate == 1.0 and isinstance(recipe.stage[0].learning_rate, float)
    assert recipe.stage[0].data.system == "" and recipe.stage[1].data.system is None
    assert recipe.task == "text-generation"


def test_toml_with_every_default_reads_back_equal(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    again = tmp_path / "elsewhere" / "recipe.toml"
    again.parent.mkdir()
    again.write_text(recipe_to_toml(recipe))
    assert load_recipe(again) == recipe


def test_toml_names_every_setting(recipe_file: Path) -> None:
    text = recipe_to_toml(load_recipe(recipe_file))
    for name in (
        "dropout = 0.0",
        "warmup_ratio = 0.05",
        "skip_invalid = false",
        "# threads is not set",
    ):
        assert name in text


def test_toml_keeps_awkward_text(tmp_path: Path) -> None:
    awkward = 'a"b\\c\n\t\x7f é 😀'
    recipe = recipe_from_dict(stage(data={"train": "t.jsonl", "prompt": "{{ x }}" + awkward}))
    path = tmp_path / "r.toml"
    path.write_text(recipe_to_toml(recipe), encoding="utf-8")
    assert load_recipe(path).stage[0].data.prompt == "{{ x }}" + awkward


def test_data_paths_are_relative_to_the_recipe(recipe_file: Path) -> None:
    assert load_recipe(recipe_file).stage[0].data.train == str(recipe_file.parent / "train.jsonl")


def test_variables_in_paths_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_DATA", "/somewhere")
    recipe = recipe_from_dict(
        stage(data={"train": "$SOME_DATA/a.jsonl", "validation": "${SOME_DATA}/b.csv"})
    )
    assert (recipe.stage[0].data.train, recipe.stage[0].data.validation) == (
        "/somewhere/a.jsonl",
        "/somewhere/b.csv",
    )


def test_an_unset_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_DATA", raising=False)
    with pytest.raises(
        RecipeError, match=r"stage\.0\.data\.train uses \$SOME_DATA, which is not set"
    ):
        recipe_from_dict(stage(data={"train": "$SOME_DATA/a.jsonl"}))


def test_a_hub_data_set_stays_as_it_is() -> None:
    recipe = recipe_from_dict(stage(data={"train": "owner/name:train"}))
    assert recipe.stage[0].data.train == "owner/name:train"


def test_a_local_base_is_relative_to_the_recipe(recipe_file: Path) -> None:
    (recipe_file.parent / "model").mkdir()
    assert load_recipe(recipe_file, ["base=model"]).base == str(recipe_file.parent / "model")
    assert load_recipe(recipe_file, ["base=model#a.gguf"]).base == str(
        recipe_file.parent / "model#a.gguf"
    )


def test_set_changes_one_value(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file, ["stage.0.epochs=2", "parameters.rank=16", "base=builtin:minilm-l6"]
    )
    assert (recipe.stage[0].epochs, recipe.parameters.rank, recipe.base) == (
        2.0,
        16,
        "builtin:minilm-l6",
    )
    unchanged = load_recipe(recipe_file)
    assert recipe.stage[1] == unchanged.stage[1]
    assert (
        replace(recipe, base=unchanged.base, parameters=unchanged.parameters, stage=unchanged.stage)
        == unchanged
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.2.epochs=2", r'no stage "2" \(expected a number from 0 to 1\)'),
        ("stage.epochs=2", r'"epochs" is not a setting'),
        ("epochs", r"not a setting \(expected KEY=VALUE"),
        ("epoch=1", r'--set epoch=1: unknown key "epoch". Did you mean "stage.0.epochs"\?'),
        ("rank=4", r'Did you mean "parameters.rank"\?'),
        ("sed=4", r'Did you mean "seed"\?'),
        ("parameters.ranc=4", r'unknown key "parameters.ranc".*Did you mean "rank"\?'),
        (
            "parameters.rank=four",
            r'parameters.rank has a wrong value \(expected an integer or "auto", got "four"\)',
        ),
        ("parameters.rank=true", r'expected an integer or "auto", got true'),
        ("parameters.rank=0", r"out of range \(expected at least 1, got 0\)"),
        ("parameters.rank_pattern={q=0}", r"out of range \(expected at least 1"),
        ("parameters.dropout=1.0", r"expected at least 0 and less than 1"),
        ("stage.0.learning_rate=nan", r"expected a number"),
        (
            "stage.0.method=dpo",
            (
                r"stage.0.data.completion has no meaning for dpo \(expected of these, prompt,"
                r" chosen, rej"
            ),
        ),
        ("stage.0.method=stf", r'Did you mean "sft"\?'),
        ("parameters.train=full", r'parameters.rank has no meaning with train = "full"'),
        ("parameters.target_modules=[1]", r"expected a string or a list of strings"),
        ("stage.0.data.label=intent", r"stage.0.data.label has no meaning for sft"),
        ("stage.1.method=sequence-classification", r'cannot follow "sft"'),
        ("base.name=x", r'"base" has no settings inside'),
    ],
)
def test_a_wrong_setting_gives_one_clear_line(
    recipe_file: Path, override: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(recipe_file, [override])
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(RecipeError, match=r'the key "stage\.0\.data\.train" is missing'):
        recipe_from_dict(stage(data={}))


def test_a_recipe_needs_a_stage() -> None:
    with pytest.raises(RecipeError, match="there is no stage"):
        recipe_from_dict({"base": "b", "stage": []})


def test_stage_must_be_a_list_of_tables() -> None:
    with pytest.raises(RecipeError, match=r"stage has a wrong value .*expected a list of tables"):
        recipe_from_dict({"base": "b", "stage": {"method": "sft"}})


def test_a_missing_recipe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(tmp_path / "none.toml")


def test_a_syntax_error_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('base = "b"\nseed = = 1\n')
    with pytest.raises(RecipeError, match=r"not valid TOML.*line 2"):
        load_recipe(path)


def test_every_setting_has_a_help_text() -> None:
    from dataclasses import fields

    from edgetune.recipe.own_settings import Dpo, Grpo
    from edgetune.recipe.schema import Data, Parameters, Stage

    for part in (Recipe, Parameters, Stage, Data, Dpo, Grpo):
        assert all(field.metadata["help"] for field in fields(part))
