"""Rollouts by the exported graph: the torch policy's answers, with its adapter, and what they
teach.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_helpers import VOWELS, adapted, prompt_recipe, records, run, tiny

from edgetune.adapters.lora import adapter_off
from edgetune.core.errors import RecipeError
from edgetune.training.reinforcement.engine_rollout import EngineRollout, check_engine, open_engine
from edgetune.training.reinforcement.rollout import Answer, Sampling, TorchRollout

TEXTS = ("Where is my card?", "Turn on the lights in the kitchen, please!", "Hello")
SAMPLING = Sampling(max_new_tokens=10, temperature=0.8)


@pytest.fixture(scope="module")
def policy(tiny_decoder: Path) -> Any:
    return adapted(tiny_decoder, noise=0.2)


@pytest.fixture(scope="module")
def engine(tiny_decoder: Path, policy: Any) -> Iterator[EngineRollout]:
    # ONNX Runtime in float32, whose draws are torch's; the native engine's cache is half precision
    with open_engine(
        tiny(tiny_decoder)[0],
        policy,
        end=2,
        say=lambda line: None,
        precision="fp32",
        engine="onnxruntime",
    ) as rollout:
        yield rollout


def test_the_native_engine_gives_each_answer_nearly_the_torch_policys_probability(
    policy: Any, tiny_decoder: Path
) -> None:
    base, tokenizer = tiny(tiny_decoder)
    prompts = tokenizer(list(TEXTS))["input_ids"]
    lines: list[str] = []
    with open_engine(
        base, policy, end=2, say=lines.append, precision="fp32", engine="native"
    ) as roll:
        groups = roll(policy, prompts, count=3, sampling=SAMPLING, seed=4)
    assert "rollouts by native (" in lines[-1]
    for prompt, group in zip(prompts, groups, strict=True):
        for answer in group:
            row = torch.tensor([[*prompt, *answer.ids]])
            with torch.no_grad():
                scores = policy(row).logits[0, len(prompt) - 1 : -1] / SAMPLING.temperature
            expected = scores.log_softmax(-1)[range(len(answer.ids)), answer.ids]
            assert answer.log_probs == pytest.approx(expected.tolist(), abs=0.02)


def both(engine: EngineRollout, policy: Any, base: Path, **settings: Any) -> list[list[Answer]]:
    prompts = tiny(base)[1](list(TEXTS))["input_ids"]
    sampling = settings.pop("sampling", SAMPLING)
    exact = TorchRollout(end=engine.end, pad_id=2, precision="fp32")
    pair = [
        roll(policy, prompts, count=3, sampling=sampling, seed=4, **settings)
        for roll in (engine, exact)
    ]
    return [[answer for group in groups for answer in group] for groups in pair]


def test_it_draws_the_torch_policys_answers(
    engine: EngineRollout, policy: Any, tiny_decoder: Path
) -> None:
    ours, theirs = both(engine, policy, tiny_decoder)
    assert [a.ids for a in ours] == [a.ids for a in theirs] and len(
        {tuple(a.ids) for a in ours}
    ) == 9
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def test_rows_that_end_leave_the_others_as_they_are(
    engine: EngineRollout, policy: Any, tiny_decoder: Path
) -> None:
    free, _ = both(engine, policy, tiny_decoder)
    engine.end = free[0].ids[2]
    try:
        ours, theirs = both(engine, policy, tiny_decoder, sampling=Sampling(10, temperature=0.0))
    finally:
        engine.end = 2
    assert [(a.ids, a.ended) for a in ours] == [(a.ids, a.ended) for a in theirs]


def test_it_follows_the_weights_and_the_switch(
    engine: EngineRollout, policy: Any, tiny_decoder: Path
) -> None:
    on, _ = both(engine, policy, tiny_decoder)
    with adapter_off(policy):
        off, exact = both(engine, policy, tiny_decoder)
    assert [a.ids for a in off] == [a.ids for a in exact] != [a.ids for a in on]
    weight = next(p for name, p in policy.named_parameters() if "lora_B" in name)
    before = weight.detach().clone()
    with torch.no_grad():
        weight.normal_(generator=torch.Generator().manual_seed(1))
    moved, exact = both(engine, policy, tiny_decoder)
    weight.data = before
    assert [a.ids for a in moved] == [a.ids for a in exact] != [a.ids for a in on]


def test_grpo_learns_from_it(tiny_decoder: Path, tmp_path: Path) -> None:
    settings = {
        "epochs": 8,
        "group_size": 16,
        "kl": 0.01,
        "learning_rate": 5e-2,
        "validate_every": 8,
    }
    recipe = prompt_recipe(tiny_decoder, tmp_path, VOWELS, rollout="engine", **settings)
    run(recipe, tmp_path / "run")
    steps = records(tmp_path / "run", "train")
    assert sum(s["reward"] for s in steps[-3:]) > sum(s["reward"] for s in steps[:3]) + 0.3
    assert steps[0]["kl"] < 0.01


def test_a_family_that_cannot_be_exported_is_refused_before_training(tiny_decoder: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot run bloom \(expected one of .*llama"):
        check_engine(replace(tiny(tiny_decoder)[0], model_type="bloom"))


def test_dora_is_refused(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = prompt_recipe(tiny_decoder, tmp_path, VOWELS, rollout="engine")
    dora = replace(recipe, parameters=replace(recipe.parameters, dora=True))
    with pytest.raises(
        RecipeError, match=r"DoRA cannot go into the engine's adapter inputs.*rollout = .torch"
    ):
        run(dora, tmp_path / "run")
