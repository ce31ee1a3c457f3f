"""Methods of both kinds together: text, answers and preferences in one run, with an adapter or with
all weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from preference_helpers import pair_recipe, prompt_recipe, tiny
from resume_helpers import WEIGHTS, journal, stopped_at
from training_helpers import recipe, sft_recipe, silent, write_rows

from edgetune.adapters.runs import load_adapted_model
from edgetune.core.errors import InputError, RecipeError
from edgetune.core.files import sha256_file
from edgetune.data.loaders import load_examples
from edgetune.evaluation.forgetting.subjects import forgetting
from edgetune.objectives.preference import collate_pairs
from edgetune.recipe.read import recipe_from_dict
from edgetune.recipe.schema import Parameters, Recipe, Replay
from edgetune.training import run_recipe
from edgetune.training.inputs import step_tokens
from edgetune.training.replay import load_replay
from edgetune.training.validation import measure_rewards

VOWELS = (
    "def score(prompt, completion, row):\n    return sum(c in 'aeiou' for c in completion) / 8\n"
)
TEXT = [
    {"text": f"The quick brown fox number {n} jumps over the lazy dog again and again."}
    for n in range(30)
]
FULL = {"train": "full"}


def all_four(base: Path, folder: Path) -> Recipe:
    text = recipe(
        base, "causal-lm", write_rows(folder / "text.jsonl", TEXT), None, epochs=1, max_length=64
    )
    sft = sft_recipe(base, folder, epochs=2)
    dpo = pair_recipe(base, folder, "dpo", epochs=1, learning_rate=1e-3)
    grpo = prompt_recipe(base, folder, VOWELS, epochs=1, kl_to="start", learning_rate=1e-3)
    return replace(
        text, stage=(*text.stage, *sft.stage, *dpo.stage, *grpo.stage), checkpoint_every=1
    )


def with_parameters(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    return replace(recipe, parameters=Parameters(**settings))


def first_steps(run: Path) -> dict[int, dict[str, Any]]:
    steps = [record for record in journal(run) if record["kind"] == "train"]
    return {record["stage"]: record for record in reversed(steps)}


@pytest.mark.parametrize("parameters", [{"rank": 4}, FULL], ids=["lora", "full"])
def test_text_then_answers_then_preferences_then_rewards(
    tiny_decoder: Path, tmp_path: Path, parameters: dict[str, Any]
) -> None:
    summary = run_recipe(
        with_parameters(all_four(tiny_decoder, tmp_path), parameters),
        out=tmp_path / "run",
        progress=silent(),
    )
    assert [stage["method"] for stage in summary.stages] == ["causal-lm", "sft", "dpo", "grpo"]
    first = first_steps(tmp_path / "run")
    # Each reference is the policy at the start of its stage.
    assert first[2]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first[3]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert summary.effect["mean_kl"] > 0.01 and summary.base_metrics is not None
    assert load_adapted_model(tmp_path / "run")[2]["generation"] == {"max_new_tokens": 8}
    assert (tmp_path / "run" / "model").is_dir() == (parameters is FULL)


def test_a_run_of_all_four_that_was_killed_twice_ends_the_same(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    whole = all_four(tiny_decoder, tmp_path)
    run_recipe(whole, out=tmp_path / "whole", progress=silent())
    before_dpo = sum(
        record["kind"] == "train" and record["stage"] < 2 for record in journal(tmp_path / "whole")
    )
    stopped_at(before_dpo + 2, whole, tmp_path / "resumed")  # in the middle of dpo
    stopped_at(2, whole, tmp_path / "resumed", resume=True)
    run_recipe(whole, out=tmp_path / "resumed", progress=silent(), resume=True)
    assert journal(tmp_path / "resumed") == journal(tmp_path / "whole")
    assert sha256_file(tmp_path / "resumed" / WEIGHTS) == sha256_file(tmp_path / "whole" / WEIGHTS)


def test_dpo_of_all_weights_is_compared_with_the_base(tiny_decoder: Path, tmp_path: Path) -> None:
    dpo = with_parameters(
        pair_recipe(tiny_decoder, tmp_path, "dpo", epochs=4, learning_rate=1e-3), FULL
    )
    summary = run_recipe(dpo, out=tmp_path / "run", progress=silent())
    assert summary.base_metrics is not None
    assert summary.base_metrics["margin"] == pytest.approx(0.0, abs=1e-4)
    assert summary.metrics["preference_accuracy"] == 1.0 and summary.metrics["margin"] > 0.1


@pytest.mark.parametrize("method", ["reward", "dpo"])
def test_a_start_out_of_the_base_is_saved_for_the_base_as_it_ships(
    tiny_decoder: Path, tmp_path: Path, method: str
) -> None:
    pairs = with_parameters(
        pair_recipe(tiny_decoder, tmp_path, method, learning_rate=1e-3),
        {"rank": 4, "init": "pissa"},
    )
    summary = run_recipe(pairs, out=tmp_path / "run", progress=silent())
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 8
    if method == "dpo":
        assert summary.base_metrics is not None and summary.base_metrics["margin"] == pytest.approx(
            0.0, abs=1e-4
        )
        return
    base, tokenizer = tiny(tiny_decoder)
    batch: Any = load_examples(pairs.stage[0], tokenizer, base).validation
    found = measure_rewards(
        load_adapted_model(tmp_path / "run")[0], [collate_pairs(batch, 0)], precision="fp32"
    )
    assert found["loss"] == pytest.approx(summary.metrics["loss"], rel=1e-4)


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_general_text_is_replayed_in_reinforcement_too(
    tiny_decoder: Path, tmp_path: Path, method: str
) -> None:
    text = Replay(data=str(write_rows(tmp_path / "general.jsonl", TEXT)), share=0.3)
    made = (
        pair_recipe(tiny_decoder, tmp_path, "dpo")
        if method == "dpo"
        else prompt_recipe(tiny_decoder, tmp_path, VOWELS)
    )
    stage = replace(made.stage[0], replay=text)
    run_recipe(replace(made, stage=(stage,)), out=tmp_path / "run", progress=silent())
    assert all(
        record["replay_loss"] > 0
        for record in journal(tmp_path / "run")
        if record["kind"] == "train"
    )
    base, tokenizer = tiny(tiny_decoder)
    examples: Any = load_examples(stage, tokenizer, base).train
    tokens = step_tokens(stage, examples, kind=base.kind)
    found = load_replay(text, tokenizer, step_tokens=tokens, limit=128, pad_id=0, seed=0)
    answers = 1 if stage.grpo is None else stage.grpo.group_size
    step = (
        answers
        * sum(example.padded_length for example in examples)
        / (len(examples) / stage.batch_size)
    )
    assert found.batch(1).tokens / (found.batch(1).tokens + step) == pytest.approx(0.3, abs=0.07)


def grpo_values(**settings: Any) -> dict[str, Any]:
    own = {"reward": "rewards:score", **settings}
    return {"method": "grpo", "data": {"train": "x.jsonl"}, "grpo": own}


@pytest.mark.parametrize("parameters", [{"train": "full"}, {"init": "pissa"}])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, 'kl_to = "base" needs the base as it ships .* Set kl_to = "start" or kl = 0'),
        (
            {"kl": 0.0, "reward": ["rewards:score", "runs/hh"]},
            r'reward = ".*runs/hh" needs the base as it ships',
        ),
        (
            {"kl_to": "start", "rollout": "engine"},
            'rollout = "engine" needs the base as it ships .* Set rollout = "torch"',
        ),
    ],
)
def test_grpo_that_needs_the_base_is_refused_where_training_changes_it(
    parameters: dict[str, str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict(
            {"base": "b", "parameters": parameters, "stage": [grpo_values(**settings)]}
        )
    recipe_from_dict({"base": "b", "stage": [grpo_values(**settings)]})
    recipe_from_dict({"base": "b", "parameters": parameters, "stage": [grpo_values(kl_to="start")]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"parameters": {"train": "full"}},
            r'train = "full" does not fit stage\.0\.method = "reward"',
        ),
        (
            {"parameters": {"train": "head"}},
            r'train = "head" does not fit stage\.0\.method = "reward"',
        ),
        ({"forgetting": {"general": "general"}}, r"\[forgetting\] has no meaning for reward"),
        ({"replay": {"data": "general.txt"}}, r"stage\.0\.replay has no meaning for reward"),
    ],
)
def test_a_reward_has_an_adapter_and_no_text(values: dict[str, Any], message: str) -> None:
    replayed = {"replay": values.pop("replay")} if "replay" in values else {}
    stage = {"method": "reward", "data": {"train": "x.jsonl"}, **replayed}
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict({"base": "b", "stage": [stage], **values})


@pytest.mark.parametrize(
    ("methods", "possible"),
    [
        (("causal-lm", "sft", "dpo", "grpo"), True),
        (("grpo", "sft", "causal-lm"), True),
        (("masked-lm", "sequence-classification"), True),
        (("masked-lm", "sft"), False),
        (("sft", "reward"), False),
        (("reward", "grpo"), False),
        (("sequence-classification", "masked-lm"), False),
    ],
)
def test_what_may_follow_what(methods: tuple[str, ...], possible: bool) -> None:
    stages = [
        grpo_values() if method == "grpo" else {"method": method, "data": {"train": "x.jsonl"}}
        for method in methods
    ]
    if possible:
        assert len(recipe_from_dict({"base": "b", "stage": stages}).stage) == len(methods)
        return
    with pytest.raises(RecipeError, match=f'method = "{methods[1]}" cannot follow "{methods[0]}"'):
        recipe_from_dict({"base": "b", "stage": stages})


def test_what_a_reward_forgets_cannot_be_measured(tiny_decoder: Path, tmp_path: Path) -> None:
    run_recipe(
        pair_recipe(tiny_decoder, tmp_path, "reward", max_steps=1),
        out=tmp_path / "run",
        progress=silent(),
    )
    with pytest.raises(InputError, match="a reward predicts no text"):
        forgetting(tmp_path / "run", tmp_path)
