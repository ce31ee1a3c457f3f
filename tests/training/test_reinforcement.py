"""reward, dpo and grpo from recipe to run folder on a tiny model: they learn, repeat, and follow
one another.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_helpers import VOWELS, pair_recipe, prompt_recipe, records, run, tiny
from training_helpers import sft_recipe, write_rows

from edgetune.adapters.runs import load_adapted_model
from edgetune.core.errors import TrainingError
from edgetune.core.files import sha256_file
from edgetune.export.proof.probe import probe_rows

WEIGHTS = "adapter/adapter_model.safetensors"


def test_reward_accuracy_rises(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = pair_recipe(tiny_decoder, tmp_path, "reward", epochs=6, head_init="random")
    summary = run(recipe, tmp_path / "run")
    losses = [record["loss"] for record in records(tmp_path / "run", "train")]
    assert summary.task == "reward" and summary.metrics["preference_accuracy"] == 1.0
    assert losses[-1] < 0.2 < losses[0]
    assert summary.metrics["length_baseline"] == pytest.approx(4 / 6, abs=1e-6)
    assert summary.base_metrics is None  # a random head prefers nothing


def test_the_probe_is_a_reward_before_training(tiny_decoder: Path, tmp_path: Path) -> None:
    summary = run(pair_recipe(tiny_decoder, tmp_path, "reward"), tmp_path / "run")
    assert summary.base_metrics is not None and summary.base_metrics["preference_accuracy"] == 1.0
    assert summary.metrics["loss"] < summary.base_metrics["loss"]


def test_the_dpo_margin_rises_from_zero(tiny_decoder: Path, tmp_path: Path) -> None:
    summary = run(
        pair_recipe(tiny_decoder, tmp_path, "dpo", epochs=6, learning_rate=3e-3), tmp_path / "run"
    )
    assert summary.base_metrics is not None
    assert summary.base_metrics["margin"] == pytest.approx(0.0, abs=1e-4)
    assert summary.base_metrics["preference_accuracy"] == 0.5
    assert summary.metrics["margin"] > 0.5 and summary.metrics["preference_accuracy"] == 1.0
    assert records(tmp_path / "run", "train")[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)


def test_grpo_raises_the_reward(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = prompt_recipe(
        tiny_decoder,
        tmp_path,
        VOWELS,
        epochs=8,
        group_size=16,
        kl=0.01,
        learning_rate=5e-2,
        validate_every=8,
    )
    summary = run(recipe, tmp_path / "run")
    steps = records(tmp_path / "run", "train")
    assert (
        summary.base_metrics is not None
        and summary.metrics["reward"] > summary.base_metrics["reward"]
    )
    first, last = (sum(step["reward"] for step in part) / 3 for part in (steps[:3], steps[-3:]))
    assert last > first + 0.1
    facts = {"reward", "reward_std", "kl", "completion_length", "flat_groups", "ended"}
    assert facts <= steps[0].keys()
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-6) and steps[-1]["kl"] > 0.001


def test_a_trained_reward_adapter_scores_the_policy(tiny_decoder: Path, tmp_path: Path) -> None:
    run(pair_recipe(tiny_decoder, tmp_path, "reward", epochs=3), tmp_path / "reward")
    summary = run(
        prompt_recipe(
            tiny_decoder, tmp_path, "reward", epochs=8, kl=0.0, group_size=16, learning_rate=5e-2
        ),
        tmp_path / "run",
    )
    steps = records(tmp_path / "run", "train")
    assert sum(s["reward"] for s in steps[-3:]) > sum(s["reward"] for s in steps[:3])
    assert "kl" not in steps[0] and summary.task == "text-generation"
    model, _, metadata = load_adapted_model(tmp_path / "run")
    assert list(model.peft_config) == ["default"] and metadata["generation"] == {
        "max_new_tokens": 8
    }
    base, tokenizer = tiny(tiny_decoder)
    rows = probe_rows(
        tmp_path / "run" / "adapter", tokenizer, base
    )  # what an export compares torch and engine on
    assert [tokenizer.decode(row)[-20:] for row in rows] == ["<|im_start|>assistant\n"[-20:]] * 2


def test_steps_on_the_same_samples_move_the_ratio(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = prompt_recipe(tiny_decoder, tmp_path, VOWELS, epochs=2, iterations=3, kl=0.0)
    run(recipe, tmp_path / "run")
    steps = records(tmp_path / "run", "train")
    assert len(steps) == 6 and [round(step["epoch"], 3) for step in steps[:3]] == [
        0.333,
        0.667,
        1.0,
    ]
    assert len({step["reward"] for step in steps[:3]}) == 1  # one rollout
    assert steps[0]["loss"] == pytest.approx(0.0, abs=1e-6) and steps[2]["loss"] < -0.01


@pytest.mark.parametrize("method", ["reward", "dpo", "grpo"])
def test_the_same_seed_gives_the_same_adapter_bit_for_bit(
    tiny_decoder: Path, tmp_path: Path, method: str
) -> None:
    settings: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-3}
    recipe = (
        prompt_recipe(tiny_decoder, tmp_path, VOWELS, **settings)
        if method == "grpo"
        else pair_recipe(tiny_decoder, tmp_path, method, **settings)
    )
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        torch.manual_seed(len(name))
        run(replace(recipe, seed=seed), tmp_path / name)
    digests = {name: sha256_file(tmp_path / name / WEIGHTS) for name in ("one", "two", "other")}
    assert digests["one"] == digests["two"] != digests["other"]


def test_sft_then_dpo_then_grpo_make_one_adapter(tiny_decoder: Path, tmp_path: Path) -> None:
    sft = sft_recipe(tiny_decoder, tmp_path, epochs=3)
    dpo = pair_recipe(tiny_decoder, tmp_path, "dpo", epochs=1, learning_rate=1e-3)
    grpo = prompt_recipe(
        tiny_decoder, tmp_path, VOWELS, epochs=1, kl_to="start", learning_rate=1e-3
    )
    recipe = replace(sft, stage=(*sft.stage, *dpo.stage, *grpo.stage))
    summary = run(recipe, tmp_path / "run")
    assert [stage["method"] for stage in summary.stages] == ["sft", "dpo", "grpo"]
    steps = records(tmp_path / "run", "train")
    first = {stage: next(step for step in steps if step["stage"] == stage) for stage in (0, 1, 2)}
    # Each stage's reference is the policy it starts from, not the base, from which sft has moved
    # far away.
    assert first[1]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert first[2]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert summary.effect["mean_kl"] > 0.01
    assert load_adapted_model(tmp_path / "run")[2]["task"] == "text-generation"


def test_kl_to_the_base_sees_what_an_earlier_stage_trained(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    sft = sft_recipe(tiny_decoder, tmp_path, epochs=3)
    grpo = prompt_recipe(tiny_decoder, tmp_path, VOWELS, epochs=1)
    run(replace(sft, stage=(*sft.stage, *grpo.stage)), tmp_path / "run")
    first = next(step for step in records(tmp_path / "run", "train") if step["stage"] == 1)
    assert first["kl"] > 0.1


@pytest.mark.parametrize(
    "settings", [{"precision": "bf16"}, {"parameters": {"rank": 2, "dropout": 0.1}}]
)
def test_reward_and_dpo_train_in_bf16_and_with_dropout(
    tiny_decoder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    for method in ("reward", "dpo"):
        summary = run(pair_recipe(tiny_decoder, tmp_path, method, **settings), tmp_path / method)
        assert summary.metrics["margin"] > 0


def test_grpo_trains_in_bf16_with_a_reward_adapter(tiny_decoder: Path, tmp_path: Path) -> None:
    run(pair_recipe(tiny_decoder, tmp_path, "reward", epochs=1), tmp_path / "reward")
    recipe = prompt_recipe(
        tiny_decoder, tmp_path, "reward", precision="bf16", iterations=2, loss_type="dapo"
    )
    assert run(recipe, tmp_path / "run").effect["mean_kl"] > 0


def test_a_reward_that_fails_in_the_middle_leaves_nothing_behind(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    recipe = prompt_recipe(
        tiny_decoder, tmp_path, "def score(prompt, completion, row):\n    return float('nan')\n"
    )
    with pytest.raises(
        TrainingError,
        match=r"scoring\.py|score, row \d of the data file: the reward function returned nan",
    ):
        run(recipe, tmp_path / "out" / "run")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_dpo_adapter_is_evaluated_as_text_generation(tiny_decoder: Path, tmp_path: Path) -> None:
    from edgetune.evaluation.evaluate import evaluate

    run(pair_recipe(tiny_decoder, tmp_path, "dpo", epochs=1), tmp_path / "run")
    rows = [{"prompt": "Hello", "chosen": "Yes", "rejected": "No"}]
    result = evaluate(tmp_path / "run", write_rows(tmp_path / "more.jsonl", rows))
    assert result.metrics.keys() == {"exact_match", "bleu", "rouge_l"}


def test_the_report_shows_rewards_and_preferences(tiny_decoder: Path, tmp_path: Path) -> None:
    run(pair_recipe(tiny_decoder, tmp_path, "reward", epochs=1), tmp_path / "reward")
    page = (tmp_path / "reward" / "report.html").read_text()
    assert "preference accuracy" in page and "length baseline" in page and "100.00 %" in page
    run(prompt_recipe(tiny_decoder, tmp_path, VOWELS, epochs=3), tmp_path / "grpo")
    page = (tmp_path / "grpo" / "report.html").read_text()
    assert "<figcaption>Reward" in page and "<figcaption>KL" in page
