"""A recipe says how its adapter answers; the files it names are read before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.core.errors import RecipeError
from edgetune.recipe.generation import generation_defaults
from edgetune.recipe.read import load_recipe, recipe_from_dict, recipe_to_toml
from edgetune.recipe.schema import Recipe

SCHEMA = {"type": "object", "properties": {"intent": {"type": "string"}}}


def recipe(folder: Path, *, method: str = "sft", **generation: Any) -> Recipe:
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    (folder / "list.json").write_text("[1]")
    (folder / "yes.lark").write_text('start: "yes"')
    stage = [{"method": method, "data": {"train": "rows.jsonl"}}]
    return recipe_from_dict({"base": "b", "stage": stage, "generation": generation}, folder=folder)


def test_what_is_set_goes_with_the_adapter(tmp_path: Path) -> None:
    found = generation_defaults(
        recipe(tmp_path, schema="schema.json", temperature=0.5, stop=["\n"]), 40
    )
    assert found == {"max_new_tokens": 40, "schema": SCHEMA, "temperature": 0.5, "stop": ["\n"]}
    found = generation_defaults(recipe(tmp_path, grammar="yes.lark", max_new_tokens=3), 40)
    assert found == {"max_new_tokens": 3, "grammar": 'start: "yes"'}


def test_without_the_section_only_the_length_is_recorded(tmp_path: Path) -> None:
    stage = [{"method": "sft", "data": {"train": "rows.jsonl"}}]
    assert generation_defaults(
        recipe_from_dict({"base": "b", "stage": stage}, folder=tmp_path), 40
    ) == {"max_new_tokens": 40}


def test_auto_is_no_file_and_gives_way_to_what_is_derived(tmp_path: Path) -> None:
    made = recipe(tmp_path, schema="auto")
    assert made.generation is not None and made.generation.schema == "auto"
    assert generation_defaults(made, 40, derived=SCHEMA)["schema"] == SCHEMA


def test_the_written_recipe_reads_back_from_anywhere(tmp_path: Path) -> None:
    first = recipe(tmp_path, schema="schema.json")
    (tmp_path / "elsewhere").mkdir()
    written = tmp_path / "elsewhere" / "recipe.toml"
    written.write_text(recipe_to_toml(first))
    assert load_recipe(written) == first


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        (
            {"schema": "missing.json"},
            r"generation\.schema cannot be read.*expected a JSON schema file",
        ),
        ({"schema": "yes.lark"}, r"generation\.schema cannot be read"),
        ({"schema": "list.json"}, "generation.schema is no JSON object"),
        (
            {"schema": "schema.json", "regex": "a"},
            r"an answer has one form \(expected one of schema, regex, grammar",
        ),
        (
            {"method": "sequence-classification"},
            r"\[generation\] has no meaning for sequence-classification",
        ),
        ({"beams": 2}, "beams"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, generation: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, **generation)
