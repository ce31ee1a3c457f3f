"""Recipes of version 0.1: refused with the new place, rewritten with everything else kept, read as
they are in a run folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.cli import main
from edgetune.core.errors import RecipeError
from edgetune.recipe.migrate import MOVED, migrate_text
from edgetune.recipe.own_settings import Dpo, Grpo
from edgetune.recipe.read import load_recipe, load_run_recipe, recipe_from_dict, tomllib
from edgetune.recipe.schema import Stage

OLD = '''# Two stages
base = "b"  # the base

[[stage]]
method = "dpo"
beta = 0.3       # how near
data.train = "pairs.jsonl"

[[stage]]
# what scores
method = "grpo"
reward = [       # two of them
    "rewards.py:a",
    "rewards.py:b",
]
epochs = 2
"group_size" = 4 # answers

kl = 0.0
[stage.data]
train = "prompts.jsonl"
prompt = """
kl = {{ kl }}
"""
'''
NEW = (
    OLD.replace("beta =", "dpo.beta =")
    .replace("reward = [", "grpo.reward = [")
    .replace('"group_size"', 'grpo."group_size"')
    .replace("kl = 0.0", "grpo.kl = 0.0")
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(OLD)
    return path


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def test_migrating_moves_each_key_and_keeps_all_else_to_the_letter(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", recipe, "--migrate") == 0
    assert recipe.read_text() == NEW
    assert capsys.readouterr().out.splitlines() == [
        "stage.0.beta → stage.0.dpo.beta",
        "stage.1.reward → stage.1.grpo.reward",
        "stage.1.group_size → stage.1.grpo.group_size",
        "stage.1.kl → stage.1.grpo.kl",
        f"{recipe} is written",
    ]
    loaded = load_recipe(recipe)
    assert loaded.stage[0].dpo == Dpo(beta=0.3)
    assert loaded.stage[1].own(Grpo).group_size == 4 and loaded.stage[1].own(Grpo).kl == 0.0
    assert loaded.stage[1].data.prompt == "kl = {{ kl }}\n"


def test_a_recipe_that_needs_nothing_says_so_and_stays(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(NEW)
    before = recipe.stat()
    assert run("train", recipe, "--migrate") == 0
    assert capsys.readouterr().out == f"{recipe} needs nothing: every key is in place\n"
    after = recipe.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_migrating_into_another_file_leaves_the_recipe(recipe: Path, tmp_path: Path) -> None:
    assert run("train", recipe, "--migrate", "--out", tmp_path / "new.toml") == 0
    assert (recipe.read_text(), (tmp_path / "new.toml").read_text()) == (OLD, NEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.toml", "recipe.toml"]


def test_line_ends_are_kept(recipe: Path) -> None:
    recipe.write_bytes(OLD.replace("\n", "\r\n").encode())
    assert run("train", recipe, "--migrate") == 0
    assert recipe.read_bytes() == NEW.replace("\n", "\r\n").encode()


def test_migrating_goes_with_no_other_option(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", recipe, "--migrate", "--resume") == 2
    assert "--migrate goes with --out alone" in capsys.readouterr().err


def test_an_inline_stage_is_migrated_too() -> None:
    text = 'base = "b"\nstage = [{ method = "dpo", beta = 0.3, data = { train = "t.jsonl" } }]\n'
    assert migrate_text(text, where="r")[0] == text.replace("beta", "dpo.beta")


def test_a_key_goes_below_the_header_of_its_table() -> None:
    text = (
        '[[stage]]\nmethod = "grpo"\nkl = 0.1  # little\nepochs = 2\n[stage.grpo]\nreward = "a:b"\n'
    )
    assert migrate_text(text, where="r")[0] == (
        '[[stage]]\nmethod = "grpo"\nepochs = 2\n[stage.grpo]\nkl = 0.1  # little\nreward = "a:b"\n'
    )


def test_a_key_that_is_there_twice_is_refused() -> None:
    text = '[[stage]]\nmethod = "dpo"\nbeta = 0.1\n[stage.dpo]\nbeta = 0.2\n'
    with pytest.raises(RecipeError, match=r"r: stage\.0 has beta and dpo\.beta\. Remove beta"):
        migrate_text(text, where="r")


def test_defaults_that_version_0_1_wrote_into_every_stage_are_left_out() -> None:
    text = '[[stage]]\nmethod = "sft"\nbeta = 0.1\nepochs = 1.0\ngroup_size = 8\n'
    assert migrate_text(text, where="r")[0] == '[[stage]]\nmethod = "sft"\nepochs = 1.0\n'


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            'method = "grpo"\nreward = "a:b"\nkl = 0.0',
            "stage.0: reward, kl live in the table [stage.grpo] now."
            " `edgetune train {} --migrate` rewrites the recipe.",
        ),
        (
            'method = "dpo"\nbeta = 0.3',
            "stage.0: beta lives in the table [stage.dpo] now."
            " `edgetune train {} --migrate` rewrites the recipe.",
        ),
        (
            'method = "dpo"\ngroup_size = 4',
            "stage.0.group_size has no meaning for dpo (expected only with grpo)."
            " Remove group_size.",
        ),
        (
            'method = "sft"\ngrpo.group_size = 4',
            "stage.0.grpo has no meaning for sft (expected only with grpo). Remove [stage.grpo].",
        ),
        (
            'method = "grpo"',
            'the key "stage.0.grpo.reward" is missing. Add it: stage.0.grpo.reward = …',
        ),
        ('method = "dpo"\ndpo.bete = 1', 'unknown key "stage.0.dpo.bete". Did you mean "beta"?'),
    ],
)
def test_a_key_in_the_wrong_place_is_one_line(recipe: Path, stage: str, message: str) -> None:
    recipe.write_text(f'base = "b"\n[[stage]]\n{stage}\ndata.train = "t.jsonl"\n')
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    line = str(caught.value)
    assert line.startswith(f"{recipe}: {message.format(recipe)}") and "\n" not in line


def test_setting_an_old_key_names_the_new_one(recipe: Path) -> None:
    recipe.write_text(NEW)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, ["stage.1.group_size=6"])
    assert str(caught.value) == (
        "--set stage.1.group_size=6: stage.1.group_size is stage.1.grpo.group_size now."
        " Write --set stage.1.grpo.group_size=6."
    )
    changed = load_recipe(recipe, ["stage.1.grpo.group_size=6"])
    assert changed.stage[1].own(Grpo).group_size == 6


def test_a_method_without_its_table_has_the_defaults() -> None:
    made = recipe_from_dict({"base": "b", "stage": [stage_of("dpo"), stage_of("sft")]})
    assert [stage.dpo for stage in made.stage] == [Dpo(), None]


def stage_of(method: str) -> dict[str, Any]:
    return {"method": method, "data": {"train": "t.jsonl"}}


@pytest.mark.parametrize(
    "method",
    [
        "causal-lm",
        "sft",
        "dpo",
        "grpo",
        "reward",
        "masked-lm",
        "sequence-classification",
        "token-classification",
    ],
)
def test_a_run_of_version_0_1_reads_as_its_recipe(method: str, tmp_path: Path) -> None:
    own = {"grpo": {"reward": "a:b", "kl": 0.5}, "dpo": {"beta": 0.3}}.get(method, {})
    tables = {method: own} if own else {}
    expected = recipe_from_dict({"base": "b", "stage": [{**stage_of(method), **tables}]})
    defaults = {key: value for key, (_, value) in MOVED.items() if value is not None}
    written = "".join(
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}\n"
        for key, value in {**defaults, **own}.items()
    )
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'base = "b"\n[[stage]]\nmethod = "{method}"\n{written}'
        f'[stage.data]\ntrain = "{expected.stage[0].data.train}"\n'
    )
    assert load_run_recipe(path) == expected
    migrated_file, _ = migrate_text(path.read_text(), where="r")
    assert not set(MOVED) & set(tomllib.loads(migrated_file)["stage"][0])
    path.write_text(migrated_file)
    assert load_recipe(path) == expected


def test_every_table_is_named_like_its_method() -> None:
    names = {table for table, _ in MOVED.values()}
    assert names <= set(Stage.__dataclass_fields__)
