"""dpo and grpo refer to the policy at the start of their stage, also where they go on in the middle
of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_helpers import pair_recipe, prompt_recipe
from resume_helpers import WEIGHTS, journal, stopped_at
from training_helpers import sft_recipe, silent

from edgetune.core.errors import DataError
from edgetune.core.files import sha256_file
from edgetune.recipe.schema import Recipe
from edgetune.training import run_recipe

VOWELS = (
    "def score(prompt, completion, row):\n    return sum(c in 'aeiou' for c in completion) / 8\n"
)


def after_sft(base: Path, folder: Path, second: Recipe) -> Recipe:
    """Three steps of sft before, a checkpoint at every third step."""
    first = sft_recipe(base, folder, epochs=1, parameters={"rank": 2, "dropout": 0.2})
    return replace(first, stage=(*first.stage, *second.stage), checkpoint_every=3)


def assert_it_goes_on(recipe: Recipe, folder: Path, *, stop: int, stage: int, step: int) -> None:
    """Stopped at its `stop`-th step and resumed at `step` of `stage`, it ends as the run that
    nobody stopped.
    """
    run_recipe(recipe, out=folder / "whole", progress=silent())
    stopped_at(stop, recipe, folder / "run")
    newest = max(path.name for path in (folder / "run" / "checkpoints").glob("*.pt"))
    assert newest == f"stage-{stage}-step-{step:08d}.pt"
    torch.manual_seed(stop)  # what was drawn in between does not matter
    run_recipe(recipe, out=folder / "run", progress=silent(), resume=True)
    assert sha256_file(folder / "run" / WEIGHTS) == sha256_file(folder / "whole" / WEIGHTS)
    assert journal(folder / "run") == journal(folder / "whole")


@pytest.mark.parametrize(("stop", "step"), [(5, 0), (8, 3)])
def test_dpo_keeps_the_log_probabilities_of_the_policy_it_started_from(
    tiny_decoder: Path, tmp_path: Path, stop: int, step: int
) -> None:
    dpo = pair_recipe(tiny_decoder, tmp_path, "dpo", epochs=2, learning_rate=5e-3)
    assert_it_goes_on(
        after_sft(tiny_decoder, tmp_path, dpo), tmp_path, stop=stop, stage=1, step=step
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_to": "start"},
        {"kl_to": "start", "iterations": 2},  # step 4 learns from the samples of step 3
        {"kl_to": "base", "iterations": 2},
        {"kl": 0.0},
    ],
)
def test_grpo_keeps_its_start_and_its_samples(
    tiny_decoder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    epochs = 4 // settings.get("iterations", 1)
    grpo = prompt_recipe(tiny_decoder, tmp_path, VOWELS, batch_size=2, epochs=epochs, **settings)
    assert_it_goes_on(after_sft(tiny_decoder, tmp_path, grpo), tmp_path, stop=8, stage=1, step=3)


def test_a_reward_function_that_was_edited_is_another_run(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    recipe = replace(
        prompt_recipe(tiny_decoder, tmp_path, VOWELS, batch_size=2, epochs=2), checkpoint_every=1
    )
    stopped_at(2, recipe, tmp_path / "run")
    file = tmp_path / "scoring.py"
    file.write_text(VOWELS.replace("/ 8", "/ 9"), encoding="utf-8")
    with pytest.raises(DataError, match=r"--resume needs the data .*reward .*scoring.py:score"):
        run_recipe(recipe, out=tmp_path / "run", progress=silent(), resume=True)


def test_a_reward_adapter_moves_no_generator(tiny_decoder: Path, tmp_path: Path) -> None:
    """PEFT draws the weights of an adapter before it loads them; the dropout after that must be the
    same.
    """
    run_recipe(
        pair_recipe(tiny_decoder, tmp_path, "reward"), out=tmp_path / "reward", progress=silent()
    )
    grpo = prompt_recipe(tiny_decoder, tmp_path, "reward", batch_size=2, epochs=4)
    assert_it_goes_on(after_sft(tiny_decoder, tmp_path, grpo), tmp_path, stop=8, stage=1, step=3)


def test_a_reward_stage_goes_on(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = pair_recipe(
        tiny_decoder, tmp_path, "reward", epochs=2, parameters={"rank": 2, "dropout": 0.2}
    )
    assert_it_goes_on(replace(recipe, checkpoint_every=3), tmp_path, stop=5, stage=0, step=3)
