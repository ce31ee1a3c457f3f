"""A reward stage in the recipe of the grpo stage that it guides: one run, two adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_helpers import pair_recipe, prompt_recipe, run
from resume_helpers import WEIGHTS, journal, stopped_at
from training_helpers import sft_recipe, silent, write_rows

from edgetune.adapters.runs import load_adapted_model
from edgetune.core.errors import RecipeError
from edgetune.core.files import sha256_file
from edgetune.recipe.read import load_run_recipe, recipe_from_dict, recipe_to_toml
from edgetune.recipe.schema import Recipe, Stage
from edgetune.training import run_recipe

JUDGE = "adapters/judge"
PARAMETERS = {"rank": 2, "dropout": 0.2}


def judge_stage(base: Path, folder: Path) -> Stage:
    reward = pair_recipe(base, folder, "reward", epochs=2, parameters=PARAMETERS)
    return replace(reward.stage[0], adapter="judge")


def all_ways(base: Path, folder: Path, **grpo: Any) -> Recipe:
    """causal-lm, sft, the judge, then grpo by it; a checkpoint at every third step."""
    texts = write_rows(folder / "texts.jsonl", [{"text": "lights in the hall " * 9}] * 8)
    first = sft_recipe(base, folder, epochs=1, parameters=PARAMETERS)
    text = replace(
        first.stage[0],
        method="causal-lm",
        data=replace(first.stage[0].data, train=str(texts), validation=None),
        max_length=32,
    )
    last = asked(base, folder, **grpo)
    stages = (text, *first.stage, judge_stage(base, folder), last)
    return replace(first, stage=stages, checkpoint_every=3)


def asked(base: Path, folder: Path, **settings: Any) -> Stage:
    """A grpo stage that the judge guides."""
    values = {"batch_size": 2, "epochs": 2, **settings}
    (stage,) = prompt_recipe(base, folder, "judge", **values).stage
    assert stage.grpo is not None
    return replace(stage, grpo=replace(stage.grpo, reward="judge"))


@pytest.fixture(scope="module")
def whole(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A finished run of all ways, and its recipe."""
    folder = tmp_path_factory.mktemp("all-ways")
    recipe = all_ways(tiny_decoder, folder)
    run(recipe, folder / "run")
    return recipe, folder / "run"


def test_all_ways_of_training_are_one_run(whole: tuple[Recipe, Path]) -> None:
    _, folder = whole
    summary = json.loads((folder / "summary.json").read_text())
    methods = [stage["method"] for stage in summary["stages"]]
    assert methods == ["causal-lm", "sft", "reward", "grpo"]
    assert all(stage["steps"] for stage in summary["stages"])
    assert summary["task"] == "text-generation" and not (folder / "checkpoints").exists()
    judge = summary["adapters"]["judge"]
    assert judge["stage"] == 2
    assert {"preference_accuracy", "length_baseline", "above_length_low"} <= judge["metrics"].keys()
    page = (folder / "report.html").read_text()
    assert "Judge judge, trained by stage 2" in page and "length baseline" in page
    grpo = load_run_recipe(folder / "recipe.toml").stage[3].grpo
    assert grpo is not None and grpo.rewards == ("judge",)


def test_a_judge_is_a_run_of_its_own_in_the_run(whole: tuple[Recipe, Path], tmp_path: Path) -> None:
    """Bit for bit the adapter that its stage trains as a recipe alone."""
    recipe, folder = whole
    model, _, metadata = load_adapted_model(folder / JUDGE)
    assert metadata["task"] == "reward" and list(model.peft_config) == ["default"]
    summary = json.loads((folder / JUDGE / "summary.json").read_text())
    assert summary["out"] == str(folder / JUDGE) and (folder / JUDGE / "report.html").exists()
    alone = replace(recipe, stage=(replace(recipe.stage[2], adapter=None),))
    run_recipe(alone, out=tmp_path / "alone", progress=silent())
    assert sha256_file(folder / JUDGE / WEIGHTS) == sha256_file(tmp_path / "alone" / WEIGHTS)


@pytest.mark.parametrize("stop", [2, 5, 12])
def test_a_killed_run_goes_on_wherever_it_was(
    whole: tuple[Recipe, Path], tmp_path: Path, stop: int
) -> None:
    """In the judge before and after its checkpoint, and after it in the policy."""
    recipe, folder = whole
    stopped_at(stop, recipe, tmp_path / "run")
    torch.manual_seed(stop)  # what was drawn in between does not matter
    run_recipe(recipe, out=tmp_path / "run", progress=silent(), resume=True)
    for weights in (WEIGHTS, f"{JUDGE}/{WEIGHTS}"):
        assert sha256_file(tmp_path / "run" / weights) == sha256_file(folder / weights)
    assert journal(tmp_path / "run") == journal(folder)


def values(base: Path, folder: Path) -> dict[str, Any]:
    """A right recipe, to be made wrong."""
    pairs, prompts = folder / "pairs.jsonl", folder / "prompts.jsonl"
    write_rows(pairs, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    write_rows(prompts, [{"prompt": "a"}])
    judge = {"method": "reward", "adapter": "judge", "data": {"train": str(pairs)}}
    grpo = {"method": "grpo", "data": {"train": str(prompts)}, "grpo": {"reward": "judge"}}
    return {"base": str(base), "stage": [judge, grpo]}


def test_a_recipe_with_a_judge_is_read_and_written(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = recipe_from_dict(values(tiny_decoder, tmp_path))
    (tmp_path / "again.toml").write_text(recipe_to_toml(recipe))
    assert load_run_recipe(tmp_path / "again.toml") == recipe


def wrong_name(stages: list[Any]) -> None:
    stages[0]["adapter"] = "../judge"


def unknown(stages: list[Any]) -> None:
    stages[1]["grpo"]["reward"] = ["judge", "jugde"]


def after_its_use(stages: list[Any]) -> None:
    stages.reverse()
    stages.append(stages[0])


def twice(stages: list[Any]) -> None:
    stages.insert(0, stages[0])


def nobody_asks(stages: list[Any]) -> None:
    stages[1]["grpo"]["reward"] = "rewards:short"


def of_another_method(stages: list[Any]) -> None:
    stages[1]["adapter"] = "policy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_name, "stage.0.adapter cannot be an adapter's name"),
        (unknown, "stage.1.grpo.reward names no adapter that this recipe trains"),
        (after_its_use, 'stage.0.grpo.reward names "judge", which a later stage trains'),
        (twice, 'two stages train the adapter "judge"'),
        (nobody_asks, 'no grpo stage learns by the adapter "judge"'),
        (of_another_method, "stage.1.adapter has no meaning for grpo"),
    ],
)
def test_what_cannot_be_a_judge_is_one_line(
    tiny_decoder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    wrong = values(tiny_decoder, tmp_path)
    change(wrong["stage"])
    with pytest.raises(RecipeError) as error:
        recipe_from_dict(wrong)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_judge_needs_the_base_that_the_policy_leaves_as_it_is(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    wrong = values(tiny_decoder, tmp_path) | {"parameters": {"train": "full"}}
    with pytest.raises(RecipeError, match='"full" does not fit stage'):
        recipe_from_dict(wrong)
