"""What scores answers: Python functions with every way to be wrong, and reward adapters on the
policy's base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from preference_helpers import QUESTIONS, adapted, pair_recipe, pair_rows, prompt_recipe, tiny
from training_helpers import sft_recipe, silent
from transformers import AutoModelForSequenceClassification

from edgetune.adapters.lora import adapter_off
from edgetune.core.errors import AdapterError, RecipeError, TrainingError
from edgetune.data.preferences import encode_answered
from edgetune.evaluation.torch_answers import TorchAnswers
from edgetune.recipe.own_settings import Grpo
from edgetune.recipe.read import load_recipe
from edgetune.training import run_recipe
from edgetune.training.reinforcement.rewards import (
    Answered,
    FunctionScorer,
    load_function,
    open_rewards,
)

ANSWERED = [
    Answered(question, f"Yes, {question}", {"wanted": "W"}, row)
    for row, question in enumerate(QUESTIONS, 1)
]


@pytest.fixture(scope="module")
def reward_run(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    run_recipe(
        pair_recipe(tiny_decoder, folder, "reward", epochs=3), out=folder / "run", progress=silent()
    )
    return folder / "run"


def function(folder: Path, body: str) -> Any:
    (folder / "mine.py").write_text(
        f"import math\n\ndef score(prompt, completion, row):\n    {body}\n"
    )
    return FunctionScorer("mine.py:score", load_function(f"{folder / 'mine.py'}:score"))


def test_a_function_sees_prompt_completion_and_row(tmp_path: Path) -> None:
    scorer = function(
        tmp_path, "return len(completion) - len(prompt) + (row['wanted'] == prompt[0])"
    )
    assert scorer(ANSWERED) == [5.0 + (q[0] == "W") for q in QUESTIONS]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return 1 / 0",
            (
                r"mine\.py:score, row 1 of the data file: the reward function raised"
                r" ZeroDivisionError: division by zero"
            ),
        ),
        (
            "return row['missing']",
            r"raised KeyError: 'missing'.*completion 'Yes, Where is my card\?'",
        ),
        ("return math.nan", r"returned nan \(expected a finite number"),
        ("return math.inf", "returned inf"),
        ("return None", "returned None"),
        ("return 'good'", "returned 'good'"),
    ],
)
def test_a_function_that_gives_no_number_is_named_with_the_row(
    tmp_path: Path, body: str, message: str
) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        function(tmp_path, body)(ANSWERED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/none.py:score", "there is no such file"),
        ("no_such_module_at_all:score", "cannot be loaded: ModuleNotFoundError"),
        (
            "{folder}/scoring.py:scores",
            r"there is no function 'scores' in .*scoring\.py \(expected one of other, score",
        ),
        ("{folder}/scoring.py:other", "other cannot be called with three values"),
        ("{folder}/broken.py:score", "cannot be loaded: SyntaxError"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "scoring.py").write_text(
        "def score(p, c, r):\n    return 1\n\ndef other(p):\n    return 1\n"
    )
    (tmp_path / "broken.py").write_text("def score(:\n")
    with pytest.raises(RecipeError, match=message):
        load_function(name.format(folder=tmp_path))


def test_a_missing_function_stops_the_run_before_training(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="there is no function 'nothing'"):
        (tmp_path / "scoring.py").write_text("def score(p, c, r):\n    return 1\n")
        recipe = prompt_recipe(tiny_decoder, tmp_path, "scoring:nothing")
        run_recipe(recipe, out=tmp_path / "out" / "run", progress=silent())
    assert not (tmp_path / "out" / "run").exists()


def test_a_function_is_found_beside_the_recipe_and_by_the_recorded_recipe(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    (tmp_path / "helper.py").write_text("BONUS = 2.0\n")
    reward = (
        "def score(prompt, completion, row):\n    import helper\n    return helper.BONUS +"
        " len(completion)\n"
    )
    text = reward.replace("def score", "import helper\n\ndef score", 1).replace(
        "    import helper\n", ""
    )
    (tmp_path / "scoring.py").write_text(text)
    recipe = prompt_recipe(tiny_decoder, tmp_path, "scoring:score", epochs=1, kl=0.1)
    assert recipe.stage[0].own(Grpo).reward == f"{tmp_path / 'scoring.py'}:score"
    summary = run_recipe(recipe, out=tmp_path / "run", progress=silent())
    assert summary.metrics["reward"] > 2.0
    assert load_recipe(tmp_path / "run" / "recipe.toml").stage[0].grpo == recipe.stage[0].grpo


def test_a_reward_adapter_scores_as_in_its_own_run_and_in_transformers(
    tiny_decoder: Path, tmp_path: Path, reward_run: Path
) -> None:
    base, tokenizer = tiny(tiny_decoder)
    policy = adapted(tiny_decoder, seed=5)
    stage = prompt_recipe(tiny_decoder, tmp_path, str(reward_run)).stage[0].own(Grpo)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    with open_rewards(stage, policy, tokenizer, base) as rewards:
        scores, _ = rewards(ANSWERED)
        with adapter_off(policy):
            switched_off, _ = rewards(ANSWERED)
        assert {
            name for name, parameter in policy.named_parameters() if parameter.requires_grad
        } == trained
    expected = TorchAnswers.open(reward_run).rewards(
        [a.prompt for a in ANSWERED], [a.completion for a in ANSWERED]
    )
    assert scores == pytest.approx(expected, abs=1e-5) and switched_off == scores
    assert len(set(scores)) == len(scores)
    fresh = AutoModelForSequenceClassification.from_pretrained(
        tiny_decoder, num_labels=1, dtype=torch.float32
    )
    theirs = PeftModel.from_pretrained(fresh, str(reward_run / "adapter")).eval()
    form = TorchAnswers.open(reward_run).prompt_format
    rows = encode_answered(
        [a.prompt for a in ANSWERED], [a.completion for a in ANSWERED], form, tokenizer, limit=128
    )
    padded = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    assert theirs(**padded).logits.squeeze(-1).tolist() == pytest.approx(expected, abs=1e-5)
    assert {name for name, _ in policy.named_parameters()} == before.keys()
    assert all(
        torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters()
    )


def test_several_rewards_are_weighed(tiny_decoder: Path, tmp_path: Path, reward_run: Path) -> None:
    base, tokenizer = tiny(tiny_decoder)
    (tmp_path / "scoring.py").write_text("def score(p, c, r):\n    return len(c)\n")
    names = ["scoring:score", str(reward_run)]
    stage = (
        prompt_recipe(tiny_decoder, tmp_path, names, reward_weights=[0.5, 2.0]).stage[0].own(Grpo)
    )
    with open_rewards(stage, adapted(tiny_decoder), tokenizer, base) as rewards:
        totals, each = rewards(ANSWERED)
    assert list(each) == ["score", "run"]
    assert totals == pytest.approx([0.5 * a + 2.0 * b for a, b in zip(*each.values(), strict=True)])


def test_an_adapter_that_gives_no_rewards_is_refused(tiny_decoder: Path, tmp_path: Path) -> None:
    run_recipe(
        sft_recipe(tiny_decoder, tmp_path, epochs=1), out=tmp_path / "sft", progress=silent()
    )
    recipe = prompt_recipe(tiny_decoder, tmp_path, str(tmp_path / "sft"))
    with pytest.raises(
        AdapterError, match=r"gives no rewards \(expected task reward, got task text-generation\)"
    ):
        run_recipe(recipe, out=tmp_path / "run", progress=silent())


def test_a_reward_adapter_of_another_base_is_refused(
    tiny_decoder: Path, tmp_path: Path, reward_run: Path
) -> None:
    from dataclasses import replace

    from edgetune.training.reinforcement.rewards import check_rewards

    base, _ = tiny(tiny_decoder)
    with pytest.raises(AdapterError, match="trained on another base than this policy"):
        check_rewards(
            prompt_recipe(tiny_decoder, tmp_path, str(reward_run)).stage[0].own(Grpo),
            replace(base, digest="sha256:0"),
        )


def test_a_reward_run_is_evaluated_beside_the_length_baseline(
    tiny_decoder: Path, tmp_path: Path, reward_run: Path
) -> None:
    from training_helpers import write_rows

    from edgetune.evaluation.evaluate import evaluate

    result = evaluate(reward_run, write_rows(tmp_path / "pairs.jsonl", pair_rows(6)))
    assert result.task == "reward" and result.rows == 6
    right = sum(p["chosen"] > p["rejected"] for p in result.predictions) / 6
    assert result.metrics["preference_accuracy"] == right
    assert result.metrics["length_baseline"] == pytest.approx(4 / 6)
    low, high = (result.metrics[f"length_baseline_{end}"] for end in ("low", "high"))
    assert low < 4 / 6 < high
