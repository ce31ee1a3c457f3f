"""reward, dpo and grpo against TRL on the same batch, fp32: loss and every gradient to 1e-5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from preference_helpers import adapted, pair_batch, tiny
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

from edgetune.data.batching import IGNORE
from edgetune.objectives.grpo import (
    AnswerBatch,
    AnswerExample,
    collate_rollouts,
    group_advantages,
    grpo,
    k3,
    without_flat,
)
from edgetune.objectives.preference import answer_log_probs, bradley_terry, dpo
from edgetune.training.dpo_stage import store_references
from edgetune.training.fast.fused_layers import fused_ops
from edgetune.training.fast.lora_products import fused_lora

PLAIN = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "gradient_checkpointing": False,
}
PAIRS = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: Tensor, theirs: Tensor, model: Any) -> None:
    """Loss and gradient of two losses that were computed with the same model."""
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    expected, got = gradients(model, theirs), gradients(model, ours)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


def test_reward_loss_and_gradient_are_trls(tiny_decoder: Path, tmp_path: Path) -> None:
    batch = pair_batch(tiny_decoder, tmp_path, "reward")
    ours_model = adapted(tiny_decoder, task="reward")
    theirs_model = AutoModelForSequenceClassification.from_pretrained(
        tiny_decoder, num_labels=1, dtype=torch.float32
    )
    theirs_model = PeftModel(theirs_model, ours_model.peft_config["default"]).eval()
    state = {k: v for k, v in ours_model.state_dict().items() if "lora_" in k or "score" in k}
    assert not theirs_model.load_state_dict(state, strict=False).unexpected_keys
    trainer = RewardTrainer(
        model=theirs_model,
        args=RewardConfig(output_dir=str(tmp_path), **PLAIN),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny(tiny_decoder)[1],
    )
    theirs = trainer.compute_loss(
        theirs_model, {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    )
    ours, count = bradley_terry(ours_model, batch)
    assert count == batch.targets == 5
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    expected, got = gradients(theirs_model, theirs), gradients(ours_model, ours)
    assert got.keys() == expected.keys() and any("score" in name for name in got)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def dpo_trainer(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    folder = tmp_path_factory.mktemp("dpo")
    args = DPOConfig(output_dir=str(folder), beta=0.3, max_length=128, **PLAIN)
    rows, tokenizer = Dataset.from_list(PAIRS), tiny(tiny_decoder)[1]
    return DPOTrainer(
        model=adapted(tiny_decoder), args=args, train_dataset=rows, processing_class=tokenizer
    )


def test_dpo_loss_and_gradient_are_trls(
    tiny_decoder: Path, tmp_path: Path, dpo_trainer: DPOTrainer
) -> None:
    model = (
        dpo_trainer.model.eval()
    )  # TRL keeps a copy of the adapter as the reference; edgetune keeps its answers
    batch = pair_batch(tiny_decoder, tmp_path, "dpo")
    with torch.no_grad():
        batch = type(batch)(*_values(batch, reference=answer_log_probs(model, batch)))
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(
                    0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
                )
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": (batch.labels != IGNORE).long(),
    }
    ours, _ = dpo(model, batch, beta=0.3)
    assert_same(ours, dpo_trainer.compute_loss(model, inputs), model)


def _values(batch: Any, **changed: Any) -> list[Any]:
    return [changed.get(name, getattr(batch, name)) for name in batch.__dataclass_fields__]


def test_the_stored_reference_is_the_policy_at_the_start(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    from preference_helpers import pair_recipe

    from edgetune.data.loaders import load_examples
    from edgetune.objectives.preference import collate_pairs

    base, tokenizer = tiny(tiny_decoder)
    pairs: list[Any] = list(
        load_examples(pair_recipe(tiny_decoder, tmp_path, "dpo").stage[0], tokenizer, base).train
    )
    model = adapted(tiny_decoder)
    store_references(model, pairs, pad_id=tokenizer.pad_token_id, precision="fp32")
    with fused_lora(model, "fp32"), fused_ops(model):  # as the loop computes
        loss, _ = dpo(model, collate_pairs(pairs, tokenizer.pad_token_id), beta=1.0)
    assert loss.item() == pytest.approx(0.6931472, abs=1e-5)


GrpoTrainer = Callable[..., GRPOTrainer]


@pytest.fixture(scope="module")
def grpo_trainer(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> GrpoTrainer:
    folder = tmp_path_factory.mktemp("grpo")

    def make(**settings: Any) -> GRPOTrainer:
        args = GRPOConfig(
            output_dir=str(folder), num_generations=2, max_completion_length=12, **PLAIN, **settings
        )
        rows = Dataset.from_list([{"prompt": "a"}] * 4)
        return GRPOTrainer(
            model=adapted(tiny_decoder),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=rows,
            processing_class=tiny(tiny_decoder)[1],
        )

    return make


def answers() -> list[AnswerExample]:
    """Four answers of different lengths, with old and reference log-probabilities of every size."""
    torch.manual_seed(1)
    found = []
    for index, (prompt, length) in enumerate(((5, 9), (7, 3), (5, 6), (2, 12))):
        ids = torch.randint(3, 300, (prompt + length,)).tolist()
        old, reference = (
            (-6.0 + torch.randn(length)).tolist(),
            (-6.0 + torch.randn(length)).tolist(),
        )
        advantage = (1.5, -0.5, 0.25, -1.25)[index]
        found.append(
            AnswerExample(ids, [IGNORE] * prompt + ids[prompt:], index, advantage, old, reference)
        )
    return found


def trl_inputs(batch: AnswerBatch, examples: list[AnswerExample]) -> dict[str, Tensor]:
    """The same answers as TRL lays them out: prompts padded on the left, completions on the
    right.
    """
    prompts = [
        [t for t, label in zip(e.input_ids, e.labels, strict=True) if label == IGNORE]
        for e in examples
    ]
    completions = [e.input_ids[len(prompt) :] for e, prompt in zip(examples, prompts, strict=True)]

    def right(rows: list[list[Any]]) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    longest = max(map(len, prompts))
    return {
        "prompt_ids": torch.tensor([[0] * (longest - len(p)) + p for p in prompts]),
        "prompt_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": right(completions),
        "completion_mask": right([[1] * len(c) for c in completions]),
        "advantages": batch.advantages,
        "old_per_token_logps": right([e.old or [] for e in examples]),
        "ref_per_token_logps": right([e.reference or [] for e in examples]),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }


@pytest.mark.parametrize(
    ("loss_type", "kl", "temperature"),
    [("grpo", 0.0, 1.0), ("grpo", 0.1, 0.7), ("dapo", 0.1, 1.0), ("dr_grpo", 0.04, 1.0)],
)
def test_grpo_loss_and_gradient_are_trls(
    grpo_trainer: GrpoTrainer, loss_type: str, kl: float, temperature: float
) -> None:
    trainer = grpo_trainer(beta=kl, temperature=temperature, loss_type=loss_type)
    trainer.current_gradient_accumulation_steps = 1
    model, examples = trainer.model.eval(), answers()
    batch = collate_rollouts(examples, 0, loss_type=loss_type, longest=12)
    ours, _ = grpo(model, batch, clip=0.2, kl=kl, temperature=temperature, loss_type=loss_type)
    # TRL scales by its accumulation steps in training only; this adapter has no dropout
    model.train()
    assert_same(ours, trainer._compute_loss(model, trl_inputs(batch, examples)), model)


def test_without_old_log_probabilities_the_ratio_is_one(tiny_decoder: Path) -> None:
    model, examples = adapted(tiny_decoder), answers()
    for example in examples:
        example.old = None
    loss, _ = grpo(model, collate_rollouts(examples, 0), clip=0.2, kl=0.0)
    assert loss.item() == pytest.approx(-sum(e.advantage for e in examples) / 4, abs=1e-6)
    assert max(gradient.abs().max() for gradient in gradients(model, loss).values()) > 1e-4


def test_parts_of_a_step_add_up_to_the_whole(tiny_decoder: Path) -> None:
    model, examples = adapted(tiny_decoder), answers()
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        batches = [
            collate_rollouts(part, 0, loss_type=loss_type, longest=12)
            for part in (examples, examples[:1], examples[1:])
        ]
        whole, *parts = [
            grpo(model, b, clip=0.2, kl=0.1, loss_type=loss_type)[0].item() for b in batches
        ]
        targets = [batch.targets for batch in batches]
        assert targets[0] == targets[1] + targets[2]
        assert sum(loss * n for loss, n in zip(parts, targets[1:], strict=True)) / targets[
            0
        ] == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_flat_groups_can_be_left_out_without_a_change(tiny_decoder: Path, loss_type: str) -> None:
    model, examples = adapted(tiny_decoder), answers()
    examples[1].advantage = examples[3].advantage = 0.0
    kept = without_flat(examples, [False, True, False, True], loss_type=loss_type)
    assert [example.row for example in kept] == [0, 2]
    whole, few = (
        grpo(
            model,
            collate_rollouts(some, 0, loss_type=loss_type, longest=12),
            clip=0.2,
            kl=0.0,
            loss_type=loss_type,
        )[0]
        for some in (examples, kept)
    )
    assert_same(few, whole, model)
    assert without_flat(examples, [True] * 4, loss_type=loss_type)[0].advantage == 0.0


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_processes_leave_flat_groups_out_together(tiny_decoder: Path, loss_type: str) -> None:
    """Two processes with two answers each; of the first one's none is left."""
    model, examples, flat = adapted(tiny_decoder), answers(), [True, True, False, True]
    for example, skip in zip(examples, flat, strict=True):
        example.advantage *= not skip
    counted: list[Sequence[int]] = []

    def total(counts: Sequence[int]) -> Sequence[int]:
        """Of both: the second process is asked when the first one has said its own."""
        counted.append(counts)
        return [sum(each) for each in zip(*counted, strict=True)]

    def loss_of(some: Sequence[AnswerExample]) -> Tensor:
        batch = collate_rollouts(some, 0, loss_type=loss_type, longest=12)
        return grpo(model, batch, clip=0.2, kl=0.0, loss_type=loss_type)[0]

    without_flat(examples[:2], flat[:2], loss_type=loss_type, total=total)
    kept = without_flat(examples[2:], flat[2:], loss_type=loss_type, total=total)
    assert (
        without_flat(examples[:2], flat[:2], loss_type=loss_type, total=lambda counts: [1, 2]) == []
    )
    assert_same(loss_of(kept), loss_of(examples), model)


def test_advantages_are_trls_formula() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    std = rewards.std(dim=1, keepdim=True)
    torch.testing.assert_close(
        group_advantages(rewards), (rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4)
    )
    assert group_advantages(rewards)[1].tolist() == [0.0] * 4
    assert group_advantages(rewards, scale_by_std=False)[0].tolist() == [0.5, -0.5, -0.5, 0.5]


def test_k3_is_zero_for_equal_policies_and_else_positive() -> None:
    log_probs = torch.tensor([-1.0, -2.0, -0.1])
    assert k3(log_probs, log_probs).tolist() == [0.0, 0.0, 0.0]
    assert (k3(log_probs, log_probs + torch.tensor([0.5, -0.5, 1.0])) > 0).all()
