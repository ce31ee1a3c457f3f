"""Sampling: against transformers' generate, its probabilities, its seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from preference_helpers import adapted, tiny

from edgetune.data.batching import IGNORE
from edgetune.data.collation import collate
from edgetune.objectives.grpo import AnswerExample
from edgetune.objectives.preference import token_log_probs
from edgetune.training.reinforcement.rollout import Answer, Sampling, TorchRollout, draw, nucleus

TEXTS = ("Where is my card?", "Turn on the lights in the kitchen, please!", "Hello")


@pytest.fixture(scope="module")
def policy(tiny_decoder: Path) -> Any:
    return adapted(tiny_decoder)


@pytest.fixture(scope="module")
def prompts(tiny_decoder: Path) -> list[list[int]]:
    ids: list[list[int]] = tiny(tiny_decoder)[1](list(TEXTS))["input_ids"]
    return ids


def roll(
    policy: Any, prompts: list[list[int]], end: int = 2, **settings: Any
) -> list[list[Answer]]:
    count, seed = settings.pop("count", 1), settings.pop("seed", 0)
    sampling = Sampling(**{"max_new_tokens": 12, **settings})
    return TorchRollout(end=end, pad_id=2, precision="fp32")(
        policy, prompts, count=count, sampling=sampling, seed=seed
    )


def test_greedy_answers_are_those_of_generate(policy: Any, prompts: list[list[int]]) -> None:
    answers = roll(policy, prompts, temperature=0.0)
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = policy.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=2,
            eos_token_id=2,
        )
        assert answer.ids == expected[0, len(prompt) :].tolist()


def test_a_row_that_ends_leaves_the_others_as_they_are(
    policy: Any, prompts: list[list[int]]
) -> None:
    free = roll(policy, prompts, temperature=0.0, end=-1)
    end = free[0][0].ids[3]  # a token that the first answer reaches early
    assert free[0][0].ids.index(end) <= 3
    answers = roll(policy, prompts, temperature=0.0, end=end)
    for (answer,), (whole,) in zip(answers, free, strict=True):
        stop = whole.ids.index(end) + 1 if end in whole.ids else 12
        assert answer.ids == whole.ids[:stop]
        assert answer.ended == (end in whole.ids)
    assert len(answers[0][0].ids) < 12


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_probabilities_are_those_of_one_forward_pass(
    policy: Any, prompts: list[list[int]], temperature: float
) -> None:
    answers = roll(policy, prompts, temperature=temperature, count=2, seed=3)
    for prompt, group in zip(prompts, answers, strict=True):
        rows = [
            AnswerExample(prompt + a.ids, [IGNORE] * len(prompt) + a.ids, 0, 0.0) for a in group
        ]
        with torch.no_grad():
            expected, _ = token_log_probs(policy, collate(rows, 2), temperature=temperature)
        got = torch.tensor([x for answer in group for x in answer.log_probs])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_same_seed_draws_the_same_answers(policy: Any, prompts: list[list[int]]) -> None:
    one, two, other = (roll(policy, prompts, count=4, seed=seed) for seed in (1, 1, 2))
    ids = [[[answer.ids for answer in group] for group in groups] for groups in (one, two, other)]
    assert ids[0] == ids[1] != ids[2]
    assert len({tuple(answer.ids) for answer in one[0]}) > 1


def test_drawing_does_not_move_torchs_own_seed(policy: Any, prompts: list[list[int]]) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    roll(policy, prompts, count=2)
    assert torch.equal(torch.rand(3), expected)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1)
    tokens, _ = draw(logits, Sampling(1, temperature=0.8), torch.Generator().manual_seed(0))
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    torch.testing.assert_close(shares, (logits[0] / 0.8).softmax(-1), atol=0.015, rtol=0)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    probabilities = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.05, 0.9, 0.03, 0.02]])
    torch.testing.assert_close(
        nucleus(probabilities, 0.7), torch.tensor([[0.5, 0.0, 0.3, 0.0], [0.0, 0.9, 0.0, 0.0]])
    )
    tokens, _ = draw(
        probabilities.log().repeat(500, 1), Sampling(1, top_p=0.7), torch.Generator().manual_seed(0)
    )
    assert set(tokens[::2].tolist()) == {0, 2} and set(tokens[1::2].tolist()) == {1}
